"""The engine in the test's own process, on tiny checkpoints."""
