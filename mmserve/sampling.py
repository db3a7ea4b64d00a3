"""How the next token is chosen: parameters as vLLM names them. Knows nothing about tensors."""

from __future__ import annotations

import msgspec

from mmserve.errors import BadRequest

MAX_TOKEN_IDS = 1024  # entries of one list or table of token ids
_LARGEST_ID = 2**31 - 1

_WHOLE: dict[str, tuple[int, int]] = {
    "n": (1, 16),
    "max_tokens": (1, 65536),
    "min_tokens": (0, 65536),
    "top_k": (0, _LARGEST_ID),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_p": (0, 1),
    "min_p": (0, 1),
    # further from 1, products with fp32 logits overflow
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_FLAGS = ("ignore_eos", "include_stop_str_in_output")
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling parameters of one request.

    `temperature` 0 is greedy. `logprobs` is how many alternatives to report per generated token
    (the chosen one is always among them), None for none; `prompt_logprobs` the same per prompt token.
    `seed` makes a sampled answer reproducible. Repetition is judged over prompt and answer, presence and
    frequency over the answer alone.
    """

    n: int = 1
    max_tokens: int = 64
    min_tokens: int = 0  # before an end-of-sequence or stop token is possible
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        msgspec.structs.force_setattr(self, "stop", _listed("stop", stop, "texts"))
        stop_ids = _listed("stop_token_ids", self.stop_token_ids, "token ids")
        msgspec.structs.force_setattr(self, "stop_token_ids", stop_ids)
        if self.top_k == -1:  # vLLM's other name for all
            msgspec.structs.force_setattr(self, "top_k", 0)
        self._check_numbers()
        self._check_token_ids()
        for name in _FLAGS:
            _check_kind(name, getattr(self, name), (bool,), "true or false")
        if not all(isinstance(text, str) for text in self.stop):
            raise BadRequest("Expected stop as text or a list of texts, but got something else")
        if len(self.stop) > 16:
            raise BadRequest(f"Expected stop of at most 16 strings, but got {len(self.stop)}")

    def _check_numbers(self) -> None:
        """What is wrong here would be refused by the worker's decoder, too late to be answered."""
        for name, (low, high) in (_WHOLE | _NUMBERS).items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if name in _WHOLE:
                _check_kind(name, value, (int,), "a whole number")
            else:
                _check_kind(name, value, (int, float), "a number")
            if not low <= value <= high:
                raise BadRequest(f"Expected {name} of {low} to {high}, but got {value}")
        if self.top_p == 0:
            raise BadRequest("Expected top_p of above 0, but got 0")
        if self.n > 1 and self.temperature == 0:
            given = f"but got {self.n}; temperature is 0 unless it is given"
            raise BadRequest(f"Expected n of 1 with temperature 0, which has one answer, {given}")
        if self.min_tokens > self.max_tokens:
            raise BadRequest(
                f"Expected min_tokens of at most max_tokens, {self.max_tokens}, but got {self.min_tokens}"
            )

    def _check_token_ids(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, dict):
            raise BadRequest(f"Expected logit_bias from token ids to numbers, but got {type(bias).__name__}")
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", bias)):
            if len(tokens) > MAX_TOKEN_IDS:
                raise BadRequest(
                    f"Expected {name} of at most {MAX_TOKEN_IDS} token ids, but got {len(tokens)}"
                )
            for token in tokens:
                if type(token) is not int or not 0 <= token <= _LARGEST_ID:
                    raise BadRequest(f"Expected {name} of token ids, 0 or more, but got {token!r}"[:200])
        for value in bias.values():
            if type(value) not in (int, float) or not -100 <= value <= 100:
                raise BadRequest(f"Expected logit_bias of numbers from -100 to 100, but got {value!r}"[:200])


def _check_kind(name: str, value: object, kinds: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise BadRequest(f"Expected {name} as {expected}, but got {type(value).__name__}")


def _listed(name: str, values: object, what: str) -> tuple[object, ...]:
    if values is None:  # vLLM's default
        return ()
    if not isinstance(values, list | tuple):
        raise BadRequest(f"Expected {name} as a list of {what}, but got {type(values).__name__}")
    return tuple(values)


class Logprob(msgspec.Struct, frozen=True):
    """Log-probability of one candidate token; `rank` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str = ""
