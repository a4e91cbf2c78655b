"""`ternarize smoke`: one small model with every kind of block, run once for its times, its memory and its integers."""
