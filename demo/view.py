"""What the page shows, as HTML and CSS: the answer in its states, and where its time and tokens went.

Pure functions; everything that is not ours is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

# in the order in which they happen; each has a colour that holds on light and dark
STAGES = {
    "fetch": ("fetch", "#8a94a6"),
    "decode": ("decode", "#e07a3f"),
    "preprocess": ("preprocess", "#e5b53c"),
    "encode": ("encode", "#3f9d6d"),
    "prune": ("prune", "#57b8a5"),
    "transfer": ("transfer", "#4c8fd6"),
    "queue": ("queue", "#a8a2d6"),
    "prefill": ("prefill", "#7a5cd0"),
    "other": ("other", "#b9b2a8"),
}
_GENERATE = ("generate", "#c2568f")


def header(is_ready: bool, status: str) -> str:
    kind = "is-good" if is_ready else "is-bad"
    return (
        '<header class="mm-head"><h1>mmserve</h1><p>Ask a question about a short video.</p>'
        f'<span class="mm-pill {kind}" role="status"><i></i>{escape(status)}</span></header>'
    )


def empty_answer() -> str:
    return _answer("empty", "<p>Choose a clip, ask about it, and the answer appears here word by word.</p>")


def waiting_answer() -> str:
    return _answer("busy", '<p class="mm-wait"><i></i><i></i><i></i><span>Watching the clip</span></p>')


def running_answer(text: str) -> str:
    return _answer("busy", f'<p class="mm-text">{escape(text)}<b class="mm-caret"></b></p>')


def finished_answer(text: str, note: str = "") -> str:
    shown = f'<p class="mm-text">{escape(text)}</p>' if text else ""
    if not text and not note:
        note = "The model had nothing to say."
    return _answer("done", shown + (f'<p class="mm-note">{escape(note)}</p>' if note else ""))


def failed_answer(message: str, text: str = "") -> str:
    said = f'<p class="mm-text">{escape(text)}</p>' if text else ""
    return _answer("error", f'{said}<p class="mm-error" role="alert">{escape(message)}</p>')


def _answer(state: str, inner: str) -> str:
    return f'<section class="mm-answer is-{state}" aria-live="polite" aria-label="Answer">{inner}</section>'


def report(data: Mapping[str, Any]) -> str:
    """Tiles of the headline numbers and a bar of the milliseconds per stage."""
    times, usage = data["timings_ms"], data["usage"]
    return (
        f'<section class="mm-report" aria-label="Where the time went">'
        f"{_tiles(data, times, usage)}{_bar(times)}{_table(times)}</section>"
    )


def _tiles(data: Mapping[str, Any], times: Mapping[str, float], usage: Mapping[str, int]) -> str:
    tokens = usage["completion_tokens"]
    per_s = (tokens - 1) / times["generate"] * 1e3 if tokens > 1 and times["generate"] else 0
    before, kept, cached = (usage[f"visual_tokens{end}"] for end in ("", "_kept", "_cached"))
    frames = sum(item["frames"] for item in data["media"])
    share = f"{kept / before:.0%} kept" if before else "no picture"
    tiles = (
        ("First token", _ms(times["ttft"]), f"{_ms(times['total'])} in all"),
        ("Answer", f"{tokens} token{'' if tokens == 1 else 's'}", f"{per_s:.0f} per second" if per_s else ""),
        ("Visual tokens", f"{before} → {kept}", f"{share}, {cached} from cache"),
        ("Frames", str(frames), _methods(data["methods"])),
        ("KV cache", _bytes(usage["kv_bytes"]), f"of {_bytes(usage['kv_bytes_uncompressed'])}"),
    )
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(detail)}</small></div>"
        for name, value, detail in tiles
    )
    return f'<dl class="mm-tiles">{cells}</dl>'


def _methods(methods: Mapping[str, Any]) -> str:
    chosen = [str(methods[kind]) for kind in ("prune", "kv") if methods[kind] != "none"]
    return " + ".join(chosen) if chosen else "no method at work"


def _bar(times: Mapping[str, float]) -> str:
    total = max(times["total"], 1e-9)
    parts = [(label, colour, times[name]) for name, (label, colour) in STAGES.items()]
    parts.append((*_GENERATE, times["generate"]))
    cells = "".join(
        f'<span style="width:{value / total:.3%};background:{colour}" title="{label}: {_ms(value)}"></span>'
        for label, colour, value in parts
        if value > 0
    )
    return f'<div class="mm-bar" role="img" aria-label="Time per stage">{cells}</div>'


def _table(times: Mapping[str, float]) -> str:
    rows = [(label, colour, times[name]) for name, (label, colour) in STAGES.items()]
    rows.append((*_GENERATE, times["generate"]))
    cells = "".join(
        f'<li><i style="background:{colour}"></i><span>{label}</span><b>{_ms(value)}</b></li>'
        for label, colour, value in rows
    )
    return f'<ul class="mm-stages">{cells}</ul>'


def _bytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def _ms(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1e3:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#head, #answer, #report { padding: 0 !important; }
#head .html-container, #answer .html-container, #report .html-container { padding: 0 !important; }
.mm-head { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: baseline; padding: .5rem 0; }
.mm-head h1 { font-size: 1.45rem; font-weight: 650; margin: 0; letter-spacing: -.01em; }
.mm-head p { margin: 0; color: var(--body-text-color-subdued); }
.mm-pill { display: inline-flex; align-items: center; gap: .45rem; font-size: .82rem; padding: .15rem .65rem;
  margin-left: auto; border: 1px solid var(--border-color-primary); border-radius: 99px;
  color: var(--body-text-color-subdued); }
.mm-pill i { width: .55rem; height: .55rem; border-radius: 50%; background: #c9443b; }
.mm-pill.is-good i { background: #3f9d6d; }
#video video { background: #0d1220; width: 100%; }
.mm-answer { min-height: 7.5rem; padding: 1rem 1.15rem; border-radius: var(--block-radius);
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  display: flex; flex-direction: column; justify-content: center; gap: .6rem; }
.mm-answer p { margin: 0; }
.mm-answer.is-empty p, .mm-note { color: var(--body-text-color-subdued); }
.mm-answer.is-busy { border-color: var(--color-accent); }
.mm-text { font-size: 1.18rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--body-text-color); }
.mm-caret { display: inline-block; width: .5ch; height: 1.05em; margin-left: .2ch;
  vertical-align: text-bottom; background: var(--color-accent); animation: mm-blink 1s ease-in-out infinite; }
.mm-wait { display: flex; align-items: center; gap: .3rem; color: var(--body-text-color-subdued); }
.mm-wait i { width: .5rem; height: .5rem; border-radius: 50%; background: var(--color-accent);
  animation: mm-blink 1.2s ease-in-out infinite; }
.mm-wait i:nth-child(2) { animation-delay: .15s; }
.mm-wait i:nth-child(3) { animation-delay: .3s; }
.mm-wait span { margin-left: .5rem; }
.mm-error { padding: .6rem .8rem; border-radius: .4rem; border-left: 3px solid #c9443b;
  background: color-mix(in srgb, #c9443b 12%, transparent); color: var(--body-text-color);
  overflow-wrap: anywhere; }
.mm-report { display: flex; flex-direction: column; gap: .9rem; }
.mm-tiles { display: grid; gap: .6rem; margin: 0; grid-template-columns: repeat(6, 1fr); }
.mm-tiles div { grid-column: span 2; padding: .65rem .8rem; border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); background: var(--block-background-fill); min-width: 0; }
.mm-tiles div:nth-child(n+4) { grid-column: span 3; }
.mm-tiles dt { font-size: .78rem; color: var(--body-text-color-subdued); }
.mm-tiles dd { margin: .1rem 0; font-size: 1.15rem; font-weight: 620; font-variant-numeric: tabular-nums;
  color: var(--body-text-color); }
.mm-tiles small { font-size: .76rem; color: var(--body-text-color-subdued); }
.mm-bar { display: flex; height: 1.1rem; border-radius: .55rem; overflow: hidden; gap: 1px;
  background: var(--border-color-primary); }
.mm-bar span { min-width: 2px; }
.mm-stages { list-style: none; margin: 0; padding: 0; display: grid; gap: .15rem 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(9.4rem, 1fr)); font-size: .86rem; }
.mm-stages li { display: flex; align-items: center; gap: .5rem; margin: 0; color: var(--body-text-color); }
.mm-stages i { flex: none; width: .7rem; height: .7rem; border-radius: .2rem; }
.mm-stages b { margin-left: auto; font-weight: 500; font-variant-numeric: tabular-nums; white-space: nowrap;
  color: var(--body-text-color-subdued); }
@keyframes mm-blink { 0%, 100% { opacity: 1; } 50% { opacity: .2; } }
@media (max-width: 640px) {
  .mm-pill { margin-left: 0; }
  .mm-tiles { grid-template-columns: 1fr 1fr; }
  .mm-tiles div, .mm-tiles div:nth-child(n+4) { grid-column: auto; }
  .mm-tiles div:last-child:nth-child(odd) { grid-column: span 2; }
  .mm-stages { grid-template-columns: 1fr 1fr; gap: .15rem .9rem; font-size: .8rem; }
}
@media (prefers-reduced-motion: reduce) { .mm-caret, .mm-wait i { animation: none; } }
"""
