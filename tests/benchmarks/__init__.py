"""Benchmarks of the operator against its peers: ``python -m tests.benchmarks.attention --help``."""
