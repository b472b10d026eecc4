"""How fast the parts of dpsims are beside other ways to write them; ``python -m benchmarks``."""
