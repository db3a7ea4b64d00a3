"""Language models: the text decoder, checkpoint loading, and the layout of prompts. `layout` imports no torch."""
