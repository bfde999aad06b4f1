"""Faults of every kind, one after the other, beside sessions that must not notice: `make chaos`."""
