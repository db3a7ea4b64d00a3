"""What one program of the prefill kernel does with its tile."""
