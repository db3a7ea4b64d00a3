"""Fetching, planning and decoding of images and video. Submodules are imported directly.

`intake` and what it needs, `limits`, `plan` and `digest` import no torch, PIL or av; `preprocess` alone
imports torch.
"""
