"""Training of decoder language models on text: `ternarize train`, and the baselines that it is compared with."""
