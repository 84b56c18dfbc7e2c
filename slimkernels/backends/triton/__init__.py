"""The Triton backend: each module is one op's kernels and their launchers."""
