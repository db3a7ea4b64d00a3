"""Whether two sides compute the same: a speed-up with other numbers is none.

Knows nothing about time.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmserve.bench.pairing import Json
from mmserve.bench.requests import Ask
from mmserve.bench.side import Job, Outcome, Worker
from mmserve.errors import MMServeError

TOKENS = 16
FP32_TOLERANCE = 2e-3
FAST_TOLERANCE = 0.3


def check_exactly(ours: Worker, peer: Worker, ask: Ask) -> Json:
    """Greedy tokens and the prompt's log-probabilities, of sides that run in fp32."""
    job = Job(kind="score", asks=(ask,), tokens=TOKENS, prompt_logprobs=True)
    mine, theirs = ours.run(job), peer.run(job)
    if mine.token_ids != theirs.token_ids:
        raise MMServeError(f"Expected the peer's tokens {theirs.token_ids} in fp32, but got {mine.token_ids}")
    what = "prompt log-probabilities in fp32"
    return _judged(what, mine.prompt_logprobs, theirs.prompt_logprobs, FP32_TOLERANCE)


def check_nearly(ours: Outcome, peer: Outcome) -> Json:
    """Log-probabilities of our likeliest first tokens, of sides that run as they are timed."""
    strange = sorted(ours.candidates.keys() - peer.candidates.keys())
    if strange:
        raise MMServeError(f"Expected first tokens that the peer finds likely, but got {strange}")
    tokens = sorted(ours.candidates)
    return _judged(
        "log-probabilities of the first token",
        [ours.candidates[token] for token in tokens],
        [peer.candidates[token] for token in tokens],
        FAST_TOLERANCE,
    )


def _judged(what: str, ours: Sequence[float], peer: Sequence[float], tolerance: float) -> Json:
    if len(ours) != len(peer) or not ours:
        raise MMServeError(f"Expected {len(peer)} {what}, but got {len(ours)}")
    differences = [abs(a - b) for a, b in zip(ours, peer, strict=True)]
    found = max(differences)
    # a NaN is not below anything
    if not all(difference <= tolerance for difference in differences):
        raise MMServeError(
            f"Expected {what} within {tolerance:g} of the peer's, but they differ by {found:.3g}; "
            "no speed is reported for other numbers"
        )
    return {"what": what, "compared": len(ours), "max_abs_difference": found, "tolerance": tolerance}
