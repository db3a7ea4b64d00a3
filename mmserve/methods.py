"""The names of the registered methods, for parts that hold no torch: the API process, the demo, the CLI.

The registries beside the methods themselves are the truth; a test keeps the two equal. Knows nothing
about what a method does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypedDict

from mmserve.budget import DEFAULT_KEEP, Budget, checked_keep, is_share
from mmserve.config import MethodDefaults, PruneUnderLoad, ServeConfig
from mmserve.errors import BadRequest, ConfigError
from mmserve.request import Methods, Modality, Option

Kind = Literal["prune", "attention", "kv", "kv_dtype"]

# act inside the language model: alone, or after an encoder-side method as in "holitom+fastv"
# with what they keep where nothing is said
INNER = {
    "fastv": 0.5,
    "holitom_m": 0.5,
    "cdpruner": 0.25,
    "sparsevlm": 0.33,
    "prunevid_m": 0.4,
    "framefusion_m": 0.3,
    "flashvid_m": 0.3,
    "dynamic_llava": 0.2,
}

# what needs a file of trained weights, and the setting that names it: clients cannot choose one
WITH_WEIGHTS = ("dynamic_llava", "kvzap", "duo", "locret")
WEIGHTS_SETTING = "weights"

# keep one token of every frame: there is nothing to choose, and no other method to add
CARRIERS = ("carriers",)

NAMES: dict[Kind, tuple[str, ...]] = {
    "prune": (
        "none",
        "random",
        "uniform",
        "holitom",
        *CARRIERS,
        "visionzip",
        "prumerge",
        "dycoke",
        "prunevid",
        "framefusion",
        "fastvid",
        "flashvid",
        "divprune",
        "scissor",
        "sttm",
        "tome",
        "evs",
        "vidcom2",
        "timechat",
        *INNER,
    ),
    "attention": (
        "dense",
        "mminference",
        "vertical_slash",
        "block_sparse",
        "a_shape",
        "tri_shape",
        "triangle_mix",
        "flexprefill",
        "xattention",
        "anchor",
        "vecattention",
        "critiprefill",
        "sparge",
        "power",
        "hip",
        "skip_softmax",
        "zipvl",
        "loopserve",
        "quest",
        "flux",
        "infllm_v2",
    ),
    "kv": (
        "none",
        "random",
        "snapkv",
        "h2o",
        "expected",
        "adakv",
        "kvzip",
        "vl_cache",
        "pyramidkv",
        "dynamickv",
        "sagekv",
        "fastkv",
        "kvzap",
        "duo",
        "streaming",
        "knorm",
        "dapq",
        "laq",
        "elastic",
        "look_m",
        "meda",
        "zipvl",
        "locret",
    ),
    "kv_dtype": ("auto", "bf16", "fp8", "int8", "int4"),
}

# sparse patterns that read an offline profile of the model's heads, where the deployment names one
WITH_PROFILE = ("mminference", "flux")

# methods that choose among the pages of answers, and what those have to hold
READS_FLOATS = ("quest",)
FLOAT_KV = ("auto", "bf16")

MAX_SLOTS = 2**31 - 1
MAX_OPTIONS = 16  # settings of methods in one request


class OtherOptions(TypedDict, total=False):
    """Those of `MethodOptions` that a command line takes as they are."""

    prune: str | None
    prune_text_images: bool | None
    attention: str | None
    attention_dense_below: int | None
    attention_profile: str | None
    kv: str | None
    kv_budget: float | None
    kv_dtype: str | None


class MethodOptions(OtherOptions, total=False):
    """The fields of `Methods` as keyword arguments; what is left out or None is the deployment's."""

    keep: Budget | None
    keep_image: Budget | None
    prune_options: Mapping[str, Option] | None
    attention_options: Mapping[str, Option] | None
    kv_options: Mapping[str, Option] | None


class Part(NamedTuple):
    """One method with how much it keeps, None being what its paper keeps, and its other settings."""

    name: str
    keep: Budget | None
    options: dict[str, Option]


def choose_methods(
    defaults: MethodDefaults,
    *,
    prune: str | None = None,
    keep: Budget | None = None,
    keep_image: Budget | None = None,
    prune_options: Mapping[str, Option] | None = None,
    prune_text_images: bool | None = None,
    attention: str | None = None,
    attention_options: Mapping[str, Option] | None = None,
    attention_dense_below: int | None = None,
    attention_profile: str | None = None,
    kv: str | None = None,
    kv_budget: float | None = None,
    kv_options: Mapping[str, Option] | None = None,
    kv_dtype: str | None = None,
) -> Methods:
    """What a request asks for over what the deployment does by default; raises BadRequest.

    Settings of the deployment's method are not another one's. What a setting may be, only the method knows.
    """
    name = _known_prune(defaults.prune if prune is None else prune)
    is_default = name == defaults.prune
    options = {**(defaults.prune_options if is_default else {}), **(prune_options or {})}
    reduces_text = defaults.prune_text_images if prune_text_images is None else prune_text_images
    methods = Methods(
        prune=name,
        keep=_keep(name, "keep", keep, defaults.keep, is_default=is_default) or _own_keep(name),
        keep_image=_keep(name, "keep_image", keep_image, defaults.keep_image, is_default=is_default),
        prune_options=_checked_options("prune", name, options),
        prune_text_images=reduces_text and name != "none",
        **_attention(
            defaults, attention, attention_options, attention_dense_below, attention_profile, prune=name
        ),
        kv=_known("kv", defaults.kv if kv is None else kv),
        kv_budget=defaults.kv_budget if kv_budget is None else kv_budget,
        kv_options=_kv_options(defaults, kv or defaults.kv, kv_options),
        kv_dtype=_known("kv_dtype", defaults.kv_dtype if kv_dtype is None else kv_dtype),
    )
    if methods.kv_budget is not None and not 0 < methods.kv_budget < 2**31:
        raise BadRequest(f"Expected kv_budget of more than 0, but got {methods.kv_budget:g}")
    if methods.attention in READS_FLOATS and methods.kv_dtype not in FLOAT_KV:
        raise BadRequest(
            f"Expected kv_dtype {' or '.join(FLOAT_KV)} with attention {methods.attention}, "
            f"but got {methods.kv_dtype}"
        )
    return methods


def check_kv_dtype(methods: Methods, deployed: str) -> None:
    """Raise BadRequest where a deployment keeps KV in another type than a request asks for."""
    if methods.kv_dtype != deployed:
        raise BadRequest(
            f"Expected kv_dtype {deployed}, since that is how this deployment keeps KV, "
            f"but got {methods.kv_dtype}"
        )


def deployed_methods(config: ServeConfig) -> Methods:
    """What a request gets that asks for nothing; raises ConfigError where that is impossible."""
    load = config.prune_under_load
    try:
        methods = choose_methods(config.methods)
    except BadRequest as error:
        raise ConfigError(error.public_message) from error
    is_eased = load.floor is not None or load.floors
    fits = is_share(methods.keep) and not takes_no_keep(methods.prune) and methods.prune not in INNER
    if is_eased and not fits:
        raise ConfigError(
            "Expected prune_under_load only with a method behind the vision tower that keeps a share, "
            f"but got prune {methods.prune} and keep {methods.keep}"
        )
    return methods


def least_keep(load: PruneUnderLoad, priority: int, methods: Methods) -> float | None:
    """How far the share may fall that the deployment keeps; None where it stays."""
    floor = load.floors.get(priority, load.floor)
    keep = methods.keep
    return floor if floor is not None and isinstance(keep, float) and floor < keep else None


def outer_part(methods: Methods, modality: Modality = "video") -> Part:
    """What an encode worker reduces an item with."""
    outer = methods.prune.partition("+")[0]
    if outer in INNER:
        return Part("none", 1.0, {})
    is_other = modality == "image" and methods.keep_image is not None
    return Part(outer, methods.keep_image if is_other else methods.keep, _options_of(methods)[0])


def inner_part(methods: Methods) -> Part | None:
    """What a language worker reduces with; behind another method it keeps what its paper does."""
    outer, _, inner = methods.prune.partition("+")
    own, of_inner = _options_of(methods)
    if inner:
        keep = of_inner.pop("keep", None)
        return Part(inner, None if keep is None else checked_keep(keep), of_inner)
    return Part(outer, methods.keep, own) if outer in INNER else None


def takes_no_keep(prune: str) -> bool:
    """Whether there is nothing to choose about how much is kept."""
    return prune == "none" or prune in CARRIERS


def _options_of(methods: Methods) -> tuple[dict[str, Option], dict[str, Option]]:
    """Settings of the first method, and those of a second one, which are named like "fastv.layer"."""
    inner = methods.prune.partition("+")[2]
    prefix = f"{inner}."
    of_inner = {
        name: value for name, value in methods.prune_options.items() if inner and name.startswith(prefix)
    }
    own = {name: value for name, value in methods.prune_options.items() if name not in of_inner}
    return own, {name.removeprefix(prefix): value for name, value in of_inner.items()}


def _known_prune(name: str) -> str:
    outer, plus, inner = name.partition("+")
    if not plus:
        return _known("prune", name)
    alone = [part for part in (outer, inner) if part in (*CARRIERS, "none")]
    if alone:
        raise BadRequest(
            f"Expected prune {alone[0]} alone, since no method goes with it, but got {name[:80]!r}"
        )
    if outer in INNER or inner not in INNER:
        raise BadRequest(
            f"Expected prune of two methods to end with one of {', '.join(INNER)}, which act inside the "
            f"language model, and to begin with another one, but got {name[:80]!r}"
        )
    _known("prune", outer)
    return name


def _keep(
    prune: str, field: str, given: Budget | None, default: Budget | None, *, is_default: bool
) -> Budget | None:
    """What a request asks for, else the deployment's where its method can keep that; None says neither."""
    asked = default if given is None and is_default else given
    if asked is None:
        fits = default is not None and _refusal(prune, field, default) is None
        return default if fits else None
    asked = checked_keep(asked, field)
    if asked == 1 and takes_no_keep(prune):
        return None
    if (why := _refusal(prune, field, asked)) is not None:
        raise BadRequest(
            f"{why}, but got {asked:g}" if isinstance(asked, float) else f"{why}, but got {asked!r}"
        )
    return asked


def _refusal(prune: str, field: str, keep: Budget) -> str | None:
    """Why a method cannot keep that."""
    if prune == "none":
        return f"Expected {field} only with prune, which names the method that keeps so much"
    if prune in CARRIERS:
        return f"Expected no {field} with prune {prune}, which keeps one token per frame"
    if prune in INNER and field == "keep_image":
        return f"Expected no {field} with prune {prune}, which thins out all items together"
    if prune in INNER and not is_share(keep):
        return f"Expected {field} of at most 1 with prune {prune}, which thins out all items together"
    return None


def _own_keep(prune: str) -> float:
    return 1.0 if takes_no_keep(prune) else INNER.get(prune, DEFAULT_KEEP)


class _Attention(TypedDict):
    """The fields of `Methods` that are about attention."""

    attention: str
    attention_options: dict[str, Option]
    attention_dense_below: int | None
    attention_profile: str | None


def _attention(
    defaults: MethodDefaults,
    name: str | None,
    options: Mapping[str, Option] | None,
    dense_below: int | None,
    profile: str | None,
    *,
    prune: str,
) -> _Attention:
    name = _known("attention", defaults.attention if name is None else name)
    own = defaults.attention_options if name == defaults.attention else {}
    is_dense = name == "dense"
    if not is_dense and prune in CARRIERS:
        raise BadRequest(
            f"Expected attention dense with prune {prune}, which says itself what every token sees, "
            f"but got {name}"
        )
    below = defaults.attention_dense_below if dense_below is None else dense_below
    is_misplaced = is_dense and dense_below is not None
    if is_misplaced or (below is not None and not 0 <= below <= MAX_SLOTS):
        raise BadRequest(
            f"Expected attention_dense_below of 0 to {MAX_SLOTS} with a sparse attention, but got "
            f"{below} with {name}"
        )
    if profile is not None and name not in WITH_PROFILE:
        raise BadRequest(
            f"Expected attention_profile only with attention {' or '.join(WITH_PROFILE)}, but got {name}"
        )
    # a profile is of one pattern's making: where the deployment has one of those, it is that one's
    is_others = defaults.attention in WITH_PROFILE and defaults.attention != name
    deployed = None if is_others or name not in WITH_PROFILE else defaults.attention_profile
    return _Attention(
        attention=name,
        attention_options=_checked_options("attention", name, {**own, **(options or {})}),
        attention_dense_below=None if is_dense else below,
        attention_profile=profile or deployed,
    )


def _kv_options(defaults: MethodDefaults, kv: str, given: Mapping[str, Option] | None) -> dict[str, Option]:
    own = defaults.kv_options if kv == defaults.kv else {}
    return _checked_options("kv", kv, {**own, **(given or {})})


def _checked_options(
    kind: Literal["prune", "attention", "kv"], method: str, given: Mapping[str, Option]
) -> dict[str, Option]:
    field = f"{kind}_options"
    if given and method in ("none", "dense"):
        raise BadRequest(f"Expected {field} only with {kind}, which names the method whose settings they are")
    if len(given) > MAX_OPTIONS:
        raise BadRequest(f"Expected at most {MAX_OPTIONS} {field}, but got {len(given)}")
    for name, value in given.items():
        if not isinstance(value, Option) or (isinstance(value, float) and not math.isfinite(value)):
            raise BadRequest(
                f"Expected {field}.{name[:40]} to be a number, true, false, text or null, "
                f"but got {value!r:.40}"
            )
    return dict(given)


def _known(kind: Kind, name: str) -> str:
    if name not in NAMES[kind]:
        raise BadRequest(f"Expected {kind} to be one of {', '.join(NAMES[kind])}, but got {name[:40]!r}")
    return name
