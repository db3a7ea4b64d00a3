"""What an evaluation found: accuracy beside tokens, time and memory, each against the dense run.

Pure arithmetic on outcomes, JSON rows and a Markdown table. Knows nothing about how they were run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from mmserve.budget import Budget
from mmserve.evaluation.significance import clustered_stderr, paired_p_value
from mmserve.request import Methods, Timings, Usage

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One question under one setting. A failed question counts as wrong, and has neither usage nor times.

    Questions about the same `clip` are not independent of each other.
    """

    question_id: str
    kind: str
    clip: str
    correct: bool
    usage: Usage | None = None
    timings_ms: Timings | None = None

    @property
    def failed(self) -> bool:
        return self.usage is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes of a language model that its prefill's arithmetic depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """From a model's `config.json`."""
        text = config.get("text_config", config)
        heads = text["num_attention_heads"]
        return cls(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        )

    def prefill_flops(self, lengths: Sequence[int], densities: Sequence[float] = ()) -> float:
        """Multiplications and additions of all layers, each for so many tokens, causal attention.

        `densities`, where it is sparse: which share of its pairs each layer computes.
        """
        assert len(lengths) == self.layers, "every layer has a length"
        return sum(map(self._layer_flops, lengths, densities or (1.0,) * self.layers))

    def _layer_flops(self, tokens: int, density: float) -> float:
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        weights = projections + 3 * self.hidden * self.intermediate
        pairs = density * (tokens * (tokens + 1) // 2)
        return 2 * weights * tokens + 4 * self.heads * self.head_dim * pairs


def row(
    suite: str,
    methods: Methods,
    outcomes: Sequence[Outcome],
    dense: Sequence[Outcome],
    geometry: Geometry,
    recall: float | None = None,
) -> Json:
    """One row of the report. Ratios below 1 mean less work than the dense run of the same questions.

    `recall` is the measured share of the attention's weight that is seen.
    """
    correct = [outcome.correct for outcome in outcomes]
    expected = [outcome.correct for outcome in dense]
    accuracy, dense_accuracy = _share(correct), _share(expected)
    clips = [outcome.clip for outcome in outcomes]
    differences = [float(ours) - float(base) for ours, base in zip(correct, expected, strict=True)]
    is_dense, is_sparse = methods == Methods(), methods.attention != "dense"
    pairs = [(ours.usage, base.usage) for ours, base in zip(outcomes, dense, strict=True)]
    both = [(ours, base) for ours, base in pairs if ours is not None and base is not None]
    kinds = sorted({outcome.kind for outcome in outcomes})
    return {
        "suite": suite,
        "settings": msgspec.to_builtins(methods),
        "dense": is_dense,
        "n": len(outcomes),
        "failed": sum(outcome.failed for outcome in outcomes),
        "accuracy": round(accuracy, 4),
        "stderr": round(clustered_stderr(list(map(float, correct)), clips), 4),
        "accuracy_kept": _ratio(accuracy, dense_accuracy),
        "accuracy_difference": round(accuracy - dense_accuracy, 4),
        "difference_stderr": round(clustered_stderr(differences, clips), 4),
        "p_value": None if is_dense else _significant(paired_p_value(correct, expected, clips)),
        "visual_tokens_kept_ratio": _ratio(
            sum(ours.visual_tokens_kept for ours, _ in both), sum(ours.visual_tokens for ours, _ in both)
        ),
        "attention_density": _density([ours for ours, _ in both]) if is_sparse else 1.0,
        "attention_recall": recall if is_sparse else 1.0,
        "flops_ratio": _ratio(
            sum(_flops(ours, geometry) for ours, _ in both),
            sum(_flops(base, geometry) for _, base in both),
        ),
        "ttft_ratio": _median_ratio(outcomes, dense, _ttft),
        "decode_ratio": _median_ratio(outcomes, dense, _step),
        "kv_bytes_ratio": _ratio(
            sum(ours.kv_bytes for ours, _ in both), sum(base.kv_bytes for _, base in both)
        ),
        "by_kind": {
            kind: round(_share([o.correct for o in outcomes if o.kind == kind]), 4) for kind in kinds
        },
    }


def document(rows: Sequence[Json]) -> Json:
    """The whole report: rows, and what they were measured on."""
    return {"machine": machine(), "commit": commit(), "rows": list(rows)}


_SHARES = (
    *("accuracy_kept", "visual_tokens_kept_ratio"),
    *("attention_density", "attention_recall", "flops_ratio"),
)


def markdown(rows: Sequence[Json]) -> str:
    """The rows as a Markdown table; a dash stands where a ratio has no base."""
    head = ["suite", "prune", "keep", "attention", "kv", "budget", "n", "accuracy", "to dense", "p", "kept"]
    head += ["visual tokens", "density", "recall", "FLOPs", "TTFT", "decode", "KV bytes"]
    lines = [head, ["---", "---", "--:", "---", "---", *["--:"] * 13]]
    for entry in rows:
        settings = entry["settings"]
        budget = settings["kv_budget"]
        lines.append(
            [
                entry["suite"],
                "none (dense)" if entry["dense"] else settings["prune"],
                _kept(settings),
                _attention(settings),
                _kv(settings),
                "-" if budget is None else f"{budget:g}",
                _asked(entry),
                f"{100 * entry['accuracy']:.1f} ± {100 * entry['stderr']:.1f} %",
                *_against_dense(entry),
                *("-" if entry.get(name) is None else f"{100 * entry[name]:.0f} %" for name in _SHARES),
                *(
                    "-" if entry[name] is None else f"{entry[name]:.2f}"
                    for name in ("ttft_ratio", "decode_ratio", "kv_bytes_ratio")
                ),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kept(settings: Json) -> str:
    """What was to be kept, of images too where that differs, and the other settings that were given."""
    parts = [_budget(settings["keep"])]
    if (of_image := settings.get("keep_image")) is not None:
        parts.append(f"images {_budget(of_image)}")
    parts += [f"{name} {value}" for name, value in settings.get("prune_options", {}).items()]
    return ", ".join(parts)


def _attention(settings: Json) -> str:
    given = settings.get("attention_options", {})
    return ", ".join([settings["attention"], *(f"{name} {value}" for name, value in given.items())])


def _kv(settings: Json) -> str:
    options = [f"{name} {value}" for name, value in settings.get("kv_options", {}).items()]
    dtype = settings.get("kv_dtype", "auto")
    return ", ".join([settings["kv"], *([] if dtype == "auto" else [dtype]), *options])


def _asked(entry: Json) -> str:
    """How many questions, and how many of them failed and count as wrong."""
    failed = entry.get("failed", 0)
    return f"{entry['n']} ({failed} failed)" if failed else str(entry["n"])


def _budget(keep: Budget) -> str:
    return keep if isinstance(keep, str) else f"{keep:g}"


def _against_dense(entry: Json) -> tuple[str, str]:
    if entry["dense"]:
        return "-", "-"
    difference, stderr = 100 * entry["accuracy_difference"], 100 * entry["difference_stderr"]
    return f"{difference:+.1f} ± {stderr:.1f}", f"{entry['p_value']:.2g}"


def machine() -> Json:
    """Where something was measured, as far as it decides speed."""
    from mmserve import doctor

    found = doctor.report()
    return {
        "cpu": found["cpu"]["model"],
        "cores": found["cpu"]["cores"],
        "memory_bytes": found["memory"]["total_bytes"],
        "devices": [device["name"] for device in found["cuda"]["devices"]],
        "platform": found["platform"],
        "python": found["python"],
        "torch": found["packages"]["torch"],
    }


def commit() -> str | None:
    """The checked-out commit of the source tree, None when the package is installed without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607  # whichever git the user has
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip()


def mean_by_layer(usages: Sequence[Usage], values: Callable[[Usage], Sequence[float]]) -> float | None:
    """Mean over layers, and over requests by how many rows they ran; None where nobody says."""
    weights = [max(usage.prompt_tokens - usage.cached_tokens, 1) for usage in usages]
    found = [
        (weight, sum(layers) / len(layers))
        for weight, usage in zip(weights, usages, strict=True)
        if (layers := values(usage))
    ]
    total = sum(weight for weight, _ in found)
    return round(sum(weight * value for weight, value in found) / total, 4) if found else None


def _density(usages: Sequence[Usage]) -> float | None:
    return mean_by_layer(usages, lambda usage: usage.attention_density)


def _flops(usage: Usage, geometry: Geometry) -> float:
    return geometry.prefill_flops(_lengths(usage, geometry), usage.attention_density)


def _lengths(usage: Usage, geometry: Geometry) -> list[int]:
    """Tokens of the prompt in every layer of the model."""
    # a server of before says nothing of layers: all that enter are in every one then
    alike = round(usage.visual_tokens_layer_mean or usage.visual_tokens_kept)
    visual = usage.visual_tokens_by_layer or (alike,) * geometry.layers
    return [usage.prompt_tokens - usage.visual_tokens + tokens for tokens in visual]


def _ttft(outcome: Outcome) -> float | None:
    return outcome.timings_ms.ttft if outcome.timings_ms else None


def _step(outcome: Outcome) -> float | None:
    """Milliseconds per generated token after the first."""
    if outcome.timings_ms is None or outcome.usage is None or outcome.usage.completion_tokens < 2:
        return None
    return outcome.timings_ms.generate / (outcome.usage.completion_tokens - 1)


def _median_ratio(
    outcomes: Sequence[Outcome], dense: Sequence[Outcome], value: Callable[[Outcome], float | None]
) -> float | None:
    """Median over the questions of ours against dense: one slow first request does not move it."""
    pairs = [(value(ours), value(base)) for ours, base in zip(outcomes, dense, strict=True)]
    ratios = [ours / base for ours, base in pairs if ours is not None and base]
    return round(median(ratios), 4) if ratios else None


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _significant(p_value: float) -> float:
    """Two digits: what decides is how small it is."""
    return float(f"{p_value:.2g}")


def _ratio(ours: float, base: float) -> float | None:
    return round(ours / base, 4) if base else None
