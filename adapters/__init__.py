"""One file per model family, each a declaration: see `lp_patch.registry.Adapter` and CONTRIBUTING.md."""

if __name__ != "lp_patch.adapters":
    # PyPI has a package of this name: from a checkout as working folder, ours must not stand in for it
    raise ImportError("this folder is imported as lp_patch.adapters; the PyPI package 'adapters' is something else")
