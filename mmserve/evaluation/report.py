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
    """One question under one setting. A failed question is wrong and has no counts.

    Questions about the same `clip` are not independent of each other.
    """

    question_id: str
    kind: str
    clip: str
    correct: bool
    usage: Usage | None = None
    timings_ms: Timings | None = None


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

    def prefill_flops(self, tokens: int) -> int:
        """Multiplications and additions of all layers for a prompt of this many tokens, causal attention."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        weights = projections + 3 * self.hidden * self.intermediate
        pairs = tokens * (tokens + 1) // 2
        return self.layers * (2 * weights * tokens + 4 * self.heads * self.head_dim * pairs)


def row(
    suite: str, methods: Methods, outcomes: Sequence[Outcome], dense: Sequence[Outcome], geometry: Geometry
) -> Json:
    """One row of the report. Ratios below 1 mean less work than the dense run of the same questions."""
    correct = [outcome.correct for outcome in outcomes]
    expected = [outcome.correct for outcome in dense]
    accuracy, dense_accuracy = _share(correct), _share(expected)
    clips = [outcome.clip for outcome in outcomes]
    differences = [float(ours) - float(base) for ours, base in zip(correct, expected, strict=True)]
    is_dense = methods == Methods()
    pairs = [(ours.usage, base.usage) for ours, base in zip(outcomes, dense, strict=True)]
    both = [(ours, base) for ours, base in pairs if ours is not None and base is not None]
    kinds = sorted({outcome.kind for outcome in outcomes})
    return {
        "suite": suite,
        "settings": msgspec.to_builtins(methods),
        "dense": is_dense,
        "n": len(outcomes),
        "errors": sum(outcome.usage is None for outcome in outcomes),
        "accuracy": round(accuracy, 4),
        "stderr": round(clustered_stderr(list(map(float, correct)), clips), 4),
        "accuracy_kept": _ratio(accuracy, dense_accuracy),
        "accuracy_difference": round(accuracy - dense_accuracy, 4),
        "difference_stderr": round(clustered_stderr(differences, clips), 4),
        "p_value": None if is_dense else _significant(paired_p_value(correct, expected, clips)),
        "visual_tokens_kept_ratio": _ratio(
            sum(ours.visual_tokens_kept for ours, _ in both), sum(ours.visual_tokens for ours, _ in both)
        ),
        "attention_density": 1.0,  # dense attention is the only pattern
        "flops_ratio": _ratio(
            sum(geometry.prefill_flops(_prompt_length(ours)) for ours, _ in both),
            sum(geometry.prefill_flops(_prompt_length(base)) for _, base in both),
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


def markdown(rows: Sequence[Json]) -> str:
    """The rows as a Markdown table; a dash stands where a ratio has no base."""
    head = ["suite", "prune", "keep", "kv", "budget", "n", "accuracy", "to dense", "p", "kept"]
    head += ["visual tokens", "FLOPs", "TTFT", "decode", "KV bytes"]
    lines = [head, ["---", "---", "--:", "---", *["--:"] * 11]]
    for entry in rows:
        settings = entry["settings"]
        budget = settings["kv_budget"]
        lines.append(
            [
                entry["suite"],
                "none (dense)" if entry["dense"] else settings["prune"],
                _kept(settings),
                settings["kv"],
                "-" if budget is None else f"{budget:g}",
                str(entry["n"]),
                f"{100 * entry['accuracy']:.1f} ± {100 * entry['stderr']:.1f} %",
                *_against_dense(entry),
                *(
                    "-" if entry[name] is None else f"{100 * entry[name]:.0f} %"
                    for name in ("accuracy_kept", "visual_tokens_kept_ratio", "flops_ratio")
                ),
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


def _prompt_length(usage: Usage) -> int:
    """Tokens that the language model's layers see; their mean, where a method acts inside it."""
    # without the mean, of a server that does not report it, all that enter are in every layer
    visual = usage.visual_tokens_layer_mean or usage.visual_tokens_kept
    return usage.prompt_tokens - usage.visual_tokens + round(visual)


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
