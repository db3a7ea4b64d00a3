"""What clients may send: OpenAI's fields, vLLM's names for its additions, and ours under `mmserve`.

Checks kinds of values and names of fields in our own words. Knows nothing about the pipeline.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmserve.budget import Budget
from mmserve.config import Limits, MethodDefaults
from mmserve.errors import BadRequest
from mmserve.methods import WEIGHTS_SETTING, check_kv_dtype, choose_methods
from mmserve.request import MediaOptions, Methods, Option
from mmserve.sampling import SamplingParams
from mmserve.server.errors import FieldError

T = TypeVar("T", bound=BaseModel)

# until an end-of-sequence token or this, when a request does not say
DEFAULT_MAX_TOKENS = 256

# a description is what an error message says was expected
Text = Annotated[str | None, Field(description="text")]
Whole = Annotated[int | None, Field(description="a whole number")]
Number = Annotated[float | None, Field(description="a number")]
Amount = Annotated[Budget | None, Field(description="a number, or text such as 16/frame")]
Flag = Annotated[bool | None, Field(description="true or false")]

# fields of OpenAI's and vLLM's requests that would change the answer: accepted only where they do not
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
# fields that are parameters of sampling by the same name
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "n", "min_tokens", "stop_token_ids", "ignore_eos"),
    "include_stop_str_in_output",
)
# fields that describe the request without changing its answer
Settings = Annotated[
    dict[str, Option] | None, Field(description="an object from names to numbers, texts, true, false or null")
]
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "request_id"}
    | {"prompt_cache_key", "prompt_cache_retention"}
)


class _Body(BaseModel):
    """The outermost object; what it does not name is judged by `_check_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class StreamOptions(_Part):
    include_usage: Flag = None
    include_obfuscation: Flag = None
    continuous_usage_stats: Annotated[bool | None, Field(description="false")] = None


class VideoOptions(_Part):
    """How videos are sampled; `start` and `end` are seconds, `keyframes` takes those frames alone."""

    num_frames: Whole = None
    fps: Number = None
    start: Number = None
    end: Number = None
    max_pixels: Whole = None
    keyframes: Flag = None


class MediaIoOptions(_Part):
    """vLLM's `media_io_kwargs`."""

    video: Annotated[VideoOptions | None, Field(description="an object")] = None
    image: Annotated[dict[str, Any] | None, Field(description="an object", max_length=0)] = None


class OwnOptions(VideoOptions):
    """The field `mmserve`: how media are sampled, the work is made smaller, and whether to report on it."""

    prune: Text = None
    keep: Amount = None
    keep_image: Amount = None
    prune_options: Settings = None
    prune_text_images: Flag = None
    attention: Text = None
    attention_options: Settings = None
    attention_dense_below: Whole = None
    kv: Text = None
    kv_budget: Number = None
    kv_options: Settings = None
    kv_dtype: Text = None
    report: Flag = None
    report_tokens: Flag = None  # implies `report`: also which tokens of each item survive

    @property
    def wants_report(self) -> bool:
        return bool(self.report or self.report_tokens)


class ChatRequest(_Body):
    messages: Annotated[list[Any], Field(description="a list of messages")]
    model: Text = None
    stream: Flag = None
    stream_options: Annotated[StreamOptions | None, Field(description="an object")] = None
    max_tokens: Whole = None
    max_completion_tokens: Whole = None
    temperature: Number = None
    top_p: Number = None
    top_k: Whole = None
    min_p: Number = None
    repetition_penalty: Number = None
    presence_penalty: Number = None
    frequency_penalty: Number = None
    logit_bias: Annotated[
        dict[str, float] | None, Field(description="an object from token ids to numbers")
    ] = None
    seed: Whole = None
    n: Whole = None
    min_tokens: Whole = None
    stop: Annotated[str | list[str] | None, Field(description="text or a list of texts")] = None
    stop_token_ids: Annotated[list[int] | None, Field(description="a list of token ids")] = None
    ignore_eos: Flag = None
    include_stop_str_in_output: Flag = None
    logprobs: Flag = None
    top_logprobs: Whole = None
    priority: Whole = None
    cache_salt: Text = None
    media_io_kwargs: Annotated[MediaIoOptions | None, Field(description="an object")] = None
    mmserve: Annotated[OwnOptions | None, Field(description="an object")] = None

    @property
    def own(self) -> OwnOptions:
        return self.mmserve or OwnOptions()

    @property
    def wants_usage(self) -> bool:
        """In a stream; elsewhere usage is always there."""
        return bool(self.own.wants_report or (self.stream_options and self.stream_options.include_usage))


class TokenizeRequest(_Body):
    """Either `prompt` or `messages`."""

    model: Text = None
    prompt: Text = None
    messages: Annotated[list[Any] | None, Field(description="a list of messages")] = None
    add_special_tokens: Flag = None
    return_token_strs: Flag = None


class DetokenizeRequest(_Body):
    model: Text = None
    tokens: Annotated[list[int], Field(description="a list of token ids")]


def parse_body(kind: type[T], body: object) -> T:
    """Read a body; raises FieldError that names the first field that is wrong."""
    if not isinstance(body, dict):
        raise BadRequest(f"Expected a body that is an object, but got {_kind(body)}")
    try:
        parsed = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _explained(kind, first["loc"], first["type"], body) from error
    _check_extra(kind, parsed.model_extra or {})
    return parsed


def sampling_of(request: ChatRequest, limits: Limits) -> SamplingParams:
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, limits.max_tokens)
    if not 1 <= max_tokens <= limits.max_tokens:
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise FieldError(name, f"Expected {name} of 1 to {limits.max_tokens}, but got {max_tokens}")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > limits.max_stop or any(len(text) > 1000 for text in stop):
        raise FieldError("stop", f"Expected at most {limits.max_stop} stop texts of at most 1000 characters")
    if request.top_logprobs is not None and not request.logprobs:
        raise FieldError("top_logprobs", "Expected logprobs to be true where top_logprobs is given")
    given = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    return SamplingParams(
        max_tokens=max_tokens,
        stop=tuple(text for text in stop if text),
        logprobs=request.top_logprobs or 0 if request.logprobs else None,
        logit_bias=_logit_bias(request.logit_bias or {}) or None,
        **given,
    )


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    """JSON's names are text, so OpenAI's clients send token ids as text."""
    bias: dict[int, float] = {}
    for name, value in given.items():
        # at most ten digits: longer ones are no token's, and slow to read
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise FieldError("logit_bias", f"Expected logit_bias to name token ids, but got {name[:20]!r}")
        bias[int(name)] = value
    return bias


def methods_of(request: ChatRequest, defaults: MethodDefaults) -> Methods:
    own = request.own
    given = [("prune_options", name) for name in own.prune_options or {}]
    given += [("kv_options", name) for name in own.kv_options or {}]
    for field, name in given:
        if name.rpartition(".")[2] == WEIGHTS_SETTING:
            where = f"mmserve.{field}.{name[:40]}"
            raise FieldError(where, f"Expected no {where}, since only the deployment can name a file")
    methods = choose_methods(
        defaults,
        prune=own.prune,
        keep=own.keep,
        keep_image=own.keep_image,
        prune_options=own.prune_options,
        prune_text_images=own.prune_text_images,
        attention=own.attention,
        attention_options=own.attention_options,
        attention_dense_below=own.attention_dense_below,
        kv=own.kv,
        kv_budget=own.kv_budget,
        kv_options=own.kv_options,
        kv_dtype=own.kv_dtype,
    )
    check_kv_dtype(methods, defaults.kv_dtype)
    return methods


def media_options_of(request: ChatRequest, limits: Limits) -> MediaOptions:
    """Our own fields win over vLLM's."""
    chosen: VideoOptions = request.own
    where = "mmserve"
    is_given = any(getattr(chosen, name) is not None for name in VideoOptions.model_fields)
    if not is_given and request.media_io_kwargs:
        chosen = request.media_io_kwargs.video or VideoOptions()
        where = "media_io_kwargs.video"
    frames, fps = chosen.num_frames, chosen.fps
    if frames is not None and fps is not None:
        raise FieldError(where, f"Expected at most one of num_frames and fps in {where}, but got both")
    if frames is not None and not 1 <= frames <= limits.max_frames:
        raise FieldError(where, f"Expected num_frames of 1 to {limits.max_frames}, but got {frames}")
    if fps is not None and not 0 < fps <= 240:
        raise FieldError(where, f"Expected fps of above 0, at most 240, but got {fps:g}")
    start, end = chosen.start or 0.0, chosen.end
    if start < 0 or (end is not None and end <= start):
        raise FieldError(
            where, f"Expected a start of 0 or later and an end after it, but got {start:g} to {end}"
        )
    if chosen.max_pixels is not None and chosen.max_pixels < 1:
        raise FieldError(where, f"Expected max_pixels of 1 or more, but got {chosen.max_pixels}")
    return MediaOptions(
        num_frames=frames,
        fps=fps,
        start_s=start,
        end_s=end,
        max_pixels=chosen.max_pixels,
        keyframes_only=chosen.keyframes or False,
    )


def _check_extra(kind: type[BaseModel], extra: dict[str, Any]) -> None:
    for name, value in extra.items():
        if value is None or name in _IGNORED:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                allowed = " or ".join(repr(neutral) for neutral in _NEUTRAL[name])
                raise FieldError(
                    name, f"Expected {name} to be left out or {allowed}: it is not supported here"
                )
            continue
        known = [*kind.model_fields, *_NEUTRAL]
        raise FieldError(name[:80], _unknown(name, known))


def _unknown(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.0)[0]
    return f"Expected a known field, but got {name[:80]!r}; the nearest is {nearest!r}"


def _explained(
    kind: type[BaseModel], loc: tuple[int | str, ...], problem: str, body: dict[str, Any]
) -> FieldError:
    """A pydantic error in our words: how far its path names fields, what they take, what was there."""
    path: list[str] = []
    expected = "another value"
    value: object = body
    model: type[BaseModel] = kind
    for step in loc:
        field = model.model_fields.get(str(step))
        if problem == "extra_forbidden" and step == loc[-1]:
            return FieldError(
                ".".join([*path, str(step)[:80]]), _unknown(str(step), list(model.model_fields))
            )
        if field is None:
            break  # an index, or the name of a member of a union
        path.append(str(step))
        expected = field.description or expected
        value = value.get(str(step)) if isinstance(value, dict) else None
        inner = [arg for arg in getattr(field.annotation, "__args__", ()) if _is_model(arg)]
        model = inner[0] if inner else _Leaf
    where = ".".join(path)
    return FieldError(where, f"Expected {where} to be {expected}, but got {_kind(value)}")


class _Leaf(BaseModel):
    """Stands for a field whose value has no fields of its own."""


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list with other values" if value else "an empty list"
    return names.get(type(value), "an object")
