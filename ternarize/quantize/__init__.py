"""Dense weights to ternary ones."""
