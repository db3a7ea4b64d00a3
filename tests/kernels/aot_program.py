"""Compiles kernels for chips that are not there: `served` or `all` variants, then chips, names, or none.

A program of its own, because Triton's interpreter, which the tests use, cannot compile. Writes one JSON
object per variant: what it is, what it has to hold, and what came out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch

from mmserve.kernels.aot import SHARED_LIMIT, compile_ahead
from tests.attention.served_variants import MODELS, codecs, quantized_variants, served_variants
from tests.kernels.aot_others import other_variants
from tests.kernels.aot_variants import Variant, attention_variants


def variants(which: str, chip: int) -> Iterator[Variant]:
    yield from served_variants(chip)
    if which == "all":
        for dtype in (torch.float16, torch.float32):
            yield from served_variants(chip, dtype)
        for name, model in MODELS.items():
            for kind, pages in codecs(chip) if name != "tiny" else ():
                yield from quantized_variants(f"{name}_{kind}", model, pages)
        yield from attention_variants(chip)
        yield from other_variants(chip)


def main(which: str, words: list[str]) -> None:
    chips = [int(word) for word in words if word.isdigit()] or sorted(SHARED_LIMIT)
    names = {word for word in words if not word.isdigit()}
    for chip in chips:
        for variant in variants(which, chip):
            if names and variant.name not in names:
                continue
            try:
                compiled = compile_ahead(
                    variant.kernel, variant.arguments, variant.constants,
                    capability=chip, num_warps=variant.num_warps, num_stages=variant.num_stages,
                )  # fmt: skip
            except Exception as error:
                error.add_note(f"{variant.name} for {chip}")
                raise
            wanted = {"name": variant.name, "products": variant.products, "copies": variant.copies}
            wanted["described"] = "k_desc" in variant.arguments
            sys.stdout.write(json.dumps({**wanted, "chip": chip, **compiled._asdict()}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
