"""`python -m bench.gpu --part NAME`."""

from __future__ import annotations

import sys

from mmserve.bench.gpu.command import main

sys.exit(main(sys.argv[1:]))
