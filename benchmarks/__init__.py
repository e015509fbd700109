"""What the speed and memory of `amaml` are measured with: `python -m benchmarks.bench`."""

import os

# torch's profiler otherwise prints a line for each of its stages; it looks here when it is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "3")
