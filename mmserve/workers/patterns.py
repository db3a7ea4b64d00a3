"""The sparse pattern of a prompt, from its command. Knows nothing about what a pattern computes."""

from __future__ import annotations

from mmserve import messages as m
from mmserve.attention.base import AttentionPattern, FitsModels, make_pattern, reuse_every
from mmserve.attention.probe import Probe
from mmserve.attention.rules import Rules
from mmserve.attention.sparse import PromptPattern
from mmserve.engine.runner import Runner
from mmserve.methods import CARRIERS
from mmserve.request import Methods


def pattern_of(methods: Methods) -> AttentionPattern | None:
    """What rows of the prompt see, None being everything; raises BadRequest where its settings are wrong."""
    if methods.attention == "dense":
        return None
    found = make_pattern(methods.attention, methods.attention_profile, **methods.attention_options)
    return found if found.acts_at == "prefill" else None


def prompt_pattern(
    command: m.PrefillPrompt, pattern: AttentionPattern | None, slots: int, runner: Runner
) -> PromptPattern | None:
    """For a prompt of at most so many slots; None where attention is dense and nobody asks what it does.

    Raises BadRequest where the pattern's settings are not for this model.
    """
    methods, layers, config = command.methods, runner.table.layers, runner.decoder.config
    if isinstance(pattern, FitsModels):
        pattern.check_model(layers=layers, heads=config.heads, width=config.head_dim)
    # where slots leave during prefill there is no map of them
    is_probed = command.report_attention and methods.prune not in CARRIERS
    if pattern is None and not is_probed:
        return None
    rules, probe = Rules.of(layers, runner.device.type, methods.attention_dense_below), None
    if is_probed:
        probe = Probe(slots=slots, layer=layers // 2, head=config.heads // 2)
    every = reuse_every(methods.attention_options)
    return PromptPattern(pattern=pattern, rules=rules, reuse_every=every, probe=probe)


def attention_settings(methods: Methods) -> str:
    """What of them changes the KV of a prompt."""
    if methods.attention == "dense":
        return "dense"
    options, profile = sorted(methods.attention_options.items()), methods.attention_profile
    return f"{methods.attention} {options} {methods.attention_dense_below} {profile}"
