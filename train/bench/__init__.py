"""Benchmarks: what costs how much, side by side in one run. One file a benchmark: `python -m train bench WHAT`."""
