"""What runs on an NVIDIA GPU: memory, kernels, and the paths between host and device."""
