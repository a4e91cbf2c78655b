"""The naive reference of every op: ground truth for the other backends, and what runs where they cannot."""
