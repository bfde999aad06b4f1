"""The kernels on a CPU: C++, compiled where they run."""
