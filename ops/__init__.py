"""Semantic operators, one a file: schema, reference, fake implementation, backward and public function."""

if __name__ != "infuse.ops":
    raise ImportError(
        f"{__name__}: this folder is the package infuse.ops, got an import under the name {__name__!r}, "
        "which would load a second copy of it; write `import infuse.ops` instead"
    )
