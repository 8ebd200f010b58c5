"""Figures that the docs quote. `make bench` runs `benchmarks.loop`."""
