"""The benchmarks, in short forms."""
