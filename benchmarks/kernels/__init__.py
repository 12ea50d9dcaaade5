"""Operators and single layers against their peers: ``pytest benchmarks/kernels``."""
