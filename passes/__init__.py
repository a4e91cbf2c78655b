"""FX passes: dense layers to ternary ops, ternary ops to kernels. README.md beside this states their invariants."""

if __name__ != "ternarize.passes":  # reached as top-level `passes` from the repository's root
    raise ImportError("import ternarize.passes, not passes")
