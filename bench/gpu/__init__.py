"""`python -m bench.gpu`: the kernels and the engine's steps on a CUDA GPU, beside torch's own attention.

Needs torch, triton, numpy, safetensors and transformers alone. Nothing is timed whose numbers were not
checked before.
"""
