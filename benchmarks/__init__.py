"""What the speed and memory of `amaml` are measured with: `python -m benchmarks.bench`."""
