"""A real Triton server, and clients of it."""
