"""From a model's name to its directory. Knows nothing about what is in it; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from mmserve.errors import ConfigError

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


def resolve(path_or_name: str | Path) -> Path:
    """The directory of an embedded model, a local path, or a hub name (downloaded when not cached)."""
    name = str(path_or_name)
    if name in EMBEDDED:
        return EMBEDDED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"Expected a model directory, a hub name or {', '.join(EMBEDDED)}, but got {name}")
    # slow to import, and needed for hub names only
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:  # bases of every hub and network error
        raise ConfigError(f"Expected to find the model {name} on the hub, but it cannot be had") from error
