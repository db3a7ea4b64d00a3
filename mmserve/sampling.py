"""How the next token is chosen: parameters as vLLM names them. Knows nothing about tensors."""

from __future__ import annotations

import msgspec

from mmserve.errors import BadRequest


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of one request.

    `temperature` 0 is greedy. `logprobs` is how many alternatives to report per generated token
    (the chosen one is always among them), None for none. `seed` makes a sampled answer reproducible.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        msgspec.structs.force_setattr(self, "stop", stop)
        if self.top_k == -1:  # vLLM's other name for all
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._check_types()
        checks = (
            (1 <= self.max_tokens <= 65536, "max_tokens", "1 to 65536", self.max_tokens),
            (0 <= self.temperature <= 10, "temperature", "0 to 10", self.temperature),
            (0 < self.top_p <= 1, "top_p", "above 0, at most 1", self.top_p),
            (self.top_k >= 0, "top_k", "0 or more", self.top_k),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "0 to 2^63 - 1", self.seed),
            (len(self.stop) <= 16, "stop", "at most 16 strings", len(self.stop)),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "0 to 20", self.logprobs),
        )
        for holds, name, expected, found in checks:
            if not holds:
                raise BadRequest(f"Expected {name} of {expected}, but got {found}")

    def _check_types(self) -> None:
        """What is wrong here would be refused by the worker's decoder, too late to be answered."""
        whole = ("max_tokens", "top_k", "seed", "logprobs")
        for name in (*whole, "temperature", "top_p"):
            value = getattr(self, name)
            if name in ("seed", "logprobs") and value is None:
                continue
            kinds = (int,) if name in whole else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool):
                expected = "a whole number" if name in whole else "a number"
                raise BadRequest(f"Expected {name} as {expected}, but got {type(value).__name__}")
        if not all(isinstance(text, str) for text in self.stop):
            raise BadRequest("Expected stop as text or a list of texts, but got something else")


class Logprob(msgspec.Struct, frozen=True):
    """Log-probability of one candidate token; `rank` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str = ""
