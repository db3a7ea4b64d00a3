"""`python -m mmserve`, the same as the `mmserve` command."""

from __future__ import annotations

import sys

from mmserve.cli import main

sys.exit(main())
