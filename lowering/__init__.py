"""What a semantic operator becomes in Inductor, one operator a file."""

if __name__ != "infuse.lowering":
    raise ImportError(
        f"{__name__}: this folder is the package infuse.lowering, got an import under the name {__name__!r}, "
        "which would load a second copy of it; write `import infuse.lowering` instead"
    )
