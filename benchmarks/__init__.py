"""One file per claim; `python -m benchmarks.run` measures and rewrites docs/benchmarks.md."""
