"""Language models: text decoder, checkpoint loading, prompt layout. `layout` imports no torch."""
