"""The benchmark suite of dskernels: ``python -m benchmarks --help``."""
