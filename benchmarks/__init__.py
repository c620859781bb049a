"""Benchmarks: each prints a table and, last, one JSON line. docs/benchmarks.md says what they mean.

Nothing of the product imports this package.
"""
