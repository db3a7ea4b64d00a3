"""The language-model engine: what to run next (pure), and running it."""
