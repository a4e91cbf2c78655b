"""Triton kernels: the default in training graphs, the fallback of TileLang in inference graphs."""
