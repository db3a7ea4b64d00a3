"""The HTTP front door. Imports no torch, transformers, PIL or av."""
