"""The torch.compile backend "ternary" and the kernels that it lowers to.

Nothing but the backend lives here: the subpackage `torch` would hide PyTorch in this namespace.
"""

if __name__ != "ternarize.backends":  # reached as top-level `backends` from the repository's root
    raise ImportError("import ternarize.backends, not backends")

from ternarize.backends.compiler import ternary as ternary
