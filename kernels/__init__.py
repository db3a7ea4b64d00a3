"""GPU and CPU kernels, one folder per operation: `naive.py` is the oracle, `triton.py` the fast one.

Imported as `mmserve.kernels`; imports nothing of mmserve, so it runs on a bare GPU machine.
"""
