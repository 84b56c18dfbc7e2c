"""The CUDA C++ backend: calls into slimkernels._cuda, built from csrc/cuda."""
