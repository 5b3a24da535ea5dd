"""The benchmarks: ``python -m bench run | readme | plot | memory``, from the repository's root."""
