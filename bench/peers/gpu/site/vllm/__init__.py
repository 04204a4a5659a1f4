"""As much of vLLM as its attention kernels import, for machines where it is not installed."""
