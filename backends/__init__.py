"""The torch.compile backend "ternary" and the kernels that it lowers to."""

if __name__ != "ternarize.backends":  # reached as top-level `backends` from the repository's root
    raise ImportError("import ternarize.backends, not backends")
