"""The command line of `python -m bench.gpu`, and the report as JSON and as a Markdown table.

Knows nothing about what a part measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from mmserve.bench.gpu import codec, decode, dense, engine, sparse
from mmserve.bench.gpu.measure import Part, Session
from mmserve.bench.pairing import Json
from mmserve.errors import MMServeError

PARTS: Mapping[str, Part] = {
    "dense": dense.run,
    "sparse": sparse.run,
    "decode": decode.run,
    "codec": codec.run,
    "engine": engine.run,
}
HEADER = ("metric", "ours", "peer", "ratio", "gate", "runs", "notes")
# all else in a row is a note
PLAIN = {"metric", "unit", "ours", "peer", "ratio", "gate", "goal", "passed", "runs", "samples"}


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 where nothing could be measured or a check failed, not where a gate was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--rounds", type=int, default=5, help="paired runs of every metric")
    parser.add_argument("--json", metavar="OUT", help="write the report as JSON; - prints it")
    parser.add_argument("--smoke", action="store_true", help="very small sizes, on any device")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if not torch.cuda.is_available() and not options.smoke:
        _tell("bench.gpu: Expected a CUDA device, but there is none")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(device=device, rounds=options.rounds, is_smoke=options.smoke, tell=_tell)
    names = list(PARTS) if options.part == "all" else [options.part]
    failed = False
    for name in names:
        session.start_part()
        try:
            PARTS[name](session)
        except MMServeError as error:
            failed = True
            _tell(f"bench.gpu: {name}: {error.public_message}")
        except Exception:
            # whatever a part dies of, what was measured before is reported
            failed = True
            _tell(f"bench.gpu: {name} failed\n{traceback.format_exc()}")
    settings = {"part": options.part, "rounds": options.rounds, "smoke": options.smoke}
    report = document(session, settings)
    text = json.dumps(report)
    if options.json == "-":
        sys.stdout.write(text + "\n")
        _tell(markdown(report["rows"]))
    else:
        sys.stdout.write(markdown(report["rows"]) + "\n")
        if options.json:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    return int(failed)


def document(session: Session, settings: Json) -> Json:
    """In the form of all reports of this project; `checks` came before what they are about was timed."""
    return {
        "bench": "gpu",
        "machine": machine(session.device),
        "commit": commit(),
        "settings": settings,
        "rows": session.rows,
        "checks": session.checks,
        "missing": session.missing,
    }


def markdown(rows: Sequence[Json]) -> str:
    """One line per row; a gate is marked as passed or missed."""
    lines = [HEADER, tuple("---" for _ in HEADER)]
    for row in rows:
        gate = "-"
        if "gate" in row:
            gate = f"{row['gate']:g} {'passed' if row['passed'] else 'missed'}"
            if "goal" in row:
                gate += f" (goal {row['goal']:g})"
        peer, ratio = ("-" if row[key] is None else f"{row[key]:g}" for key in ("peer", "ratio"))
        notes = "; ".join(f"{name.replace('_', ' ')} {row[name]}" for name in row if name not in PLAIN)
        ours = f"{row['ours']:g} {row['unit']}"
        lines.append((row["metric"], ours, peer, ratio, gate, str(row["runs"]), notes or "-"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: torch.device) -> Json:
    """Where something was measured, as far as it decides speed."""
    found: Json = {name: version(name) for name in ("torch", "triton")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "devices": [properties.name],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def commit() -> str | None:
    """The checked-out commit, None where there is no git."""
    root = Path(__file__).resolve().parents[2]
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


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
