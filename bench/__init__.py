"""Benchmarks: mmserve beside what people would otherwise run, on the same weights and requests.

Imported as `mmserve.bench`; run by `mmserve bench`.
"""
