"""The C++ CPU backend: calls into slimkernels._cpu, built from csrc/cpu."""
