"""The kernels on an NVIDIA GPU, in the Triton language."""
