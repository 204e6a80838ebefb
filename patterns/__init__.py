"""Recognition: the canonical view of a graph, one pattern family a file, and the order in which they run."""

if __name__ != "infuse.patterns":
    raise ImportError(
        f"{__name__}: this folder is the package infuse.patterns, got an import under the name {__name__!r}, "
        "which would load a second copy of it; write `import infuse.patterns` instead"
    )
