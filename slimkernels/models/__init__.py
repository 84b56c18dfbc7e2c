"""Models assembled from the library's ops: one config, one block, thin assemblies."""
