"""Measurements of the running system; each prints a table and writes it to build/."""
