"""What is reported of an item's tokens, after the tower and after the last layer."""

from __future__ import annotations

import numpy as np
import torch

from mmserve.messages import EncodedMedia, EncodedPart, EncodeTimes, Lease, PromptPrefilled
from mmserve.request import MediaReport, Methods, Prompt, TokenReport
from mmserve.workers.records import Item, Record
from mmserve.workers.survivors import MAX_REPORTED, layout_of, media_reports, token_report

TIMES = EncodeTimes(queue=0, decode=0, preprocess=0, encode=0, prune=0, publish=0)
LEASE = Lease(lease_id="l", path="p", total_bytes=0, arrays=(), checksum=0)


def report(source: list[int], weight: list[float], frame_tokens: int = 4) -> MediaReport:
    layout = layout_of(frame_tokens, [(2, 2)])
    tokens = token_report([(torch.tensor(source), torch.tensor(weight))], layout)
    return MediaReport(
        source="clip", frames=2, timestamps_s=(0.0, 0.5), lost_frames=0, width=8, height=8, tokens=tokens
    )


def record(reports: list[MediaReport], survivors: list[int] | None, prune: str = "fastv") -> Record:
    """Two texts of one token, then an item of 9 tokens, text, and another item of 9."""
    found = Record(request_id="r", admitted_at=0.0, deadline_at=1.0)
    found.prompt = Prompt(
        token_ids=(1, 2, 99, 3, 99, 4), methods=Methods(prune=prune, keep=0.5), report_tokens=True
    )
    for one in reports:
        part = EncodedPart(lease=LEASE, tokens=9, kept=5)
        found.items.append(Item(parts=[part], whole=EncodedMedia(cached_tokens=0, report=one, times=TIMES)))
    found.prefilled = PromptPrefilled(
        request_id="r",
        attempt=0,
        first=None,
        lease=None,
        next_order=22,
        next_position=22,
        slots=1,
        kv_bytes=1,
        kv_bytes_uncompressed=1,
        queue_ms=0.0,
        transfer_ms=0.0,
        prefill_ms=0.0,
        survivors=None if survivors is None else np.array(survivors, "<i4").tobytes(),
    )
    return found


def read(tokens: TokenReport | None) -> tuple[list[int], list[float]]:
    assert tokens is not None
    return np.frombuffer(tokens.kept, "<i4").tolist(), np.frombuffer(tokens.weight, "<f4").tolist()


def test_an_image_lies_as_a_whole_and_in_tiles_with_newlines() -> None:
    assert layout_of(4, [(2, 2)]).grids == ((0, 2, 2, 2),)
    assert layout_of(4 + 8, [(2, 2), (2, 3)]).grids == ((0, 2, 2, 2), (4, 2, 3, 4))


def test_parts_follow_each_other() -> None:
    parts = [(torch.tensor([0, 3]), torch.tensor([1.0, 2.0])), (torch.tensor([5]), torch.tensor([4.0]))]
    assert read(token_report(parts, layout_of(4, [(2, 2)]))) == ([0, 3, 5], [1.0, 2.0, 4.0])


def test_too_many_tokens_for_a_message_are_not_reported() -> None:
    many = torch.arange(MAX_REPORTED + 1)
    assert token_report([(many, many.float())], layout_of(4, [(2, 2)])) is None


def test_what_a_layer_dropped_is_gone() -> None:
    items = [report([0, 2, 5, 7], [1, 2, 1, 3]), report([1, 4], [1, 8])]
    # the items begin at orders 2 and 12; 20 is the newline of the second one
    found = media_reports(record(items, [2, 4, 9, 16, 20]), (98, 99))
    assert [read(one.tokens) for one in found] == [([0, 2, 7], [1, 2, 3]), ([4], [8])]


def test_a_carrier_stands_for_its_frame() -> None:
    items = [report(list(range(8)), [1] * 8), report(list(range(8)), [1] * 8)]
    found = media_reports(record(items, [5, 9, 10, 15, 19, 20], "carriers"), (98, 99))
    assert [read(one.tokens) for one in found] == [([3, 7], [4, 4])] * 2


def test_without_word_of_the_last_layer_nothing_is_said() -> None:
    items = [report([0], [1]), report([0], [1])]
    assert [one.tokens for one in media_reports(record(items, None), (98, 99))] == [None, None]
