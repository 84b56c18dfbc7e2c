"""The library's kernels inside models that were not written for it."""
