"""Does the released base really get better? `python -m benchmarks.cold --help`."""
