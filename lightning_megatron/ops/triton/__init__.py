"""The Triton backend: kernels, and what they are launched with."""
