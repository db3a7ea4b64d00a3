"""Questions from a file, answers to a file: `questions` reads, `runner` answers, `score` marks.

Knows nothing about how an answer is computed.
"""
