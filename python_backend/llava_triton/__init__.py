"""Chat about a picture with low latency: LLaVA sessions on NVIDIA Triton."""
