"""Commands say what the record knows."""

from __future__ import annotations

import pytest

from mmserve import messages as m
from mmserve.request import MediaRef, Modality, Prompt
from mmserve.sampling import SamplingParams
from mmserve.workers.commands import decode_from, encode_media, prefill_prompt
from mmserve.workers.records import Item, Record

LEASE = m.Lease(lease_id="0" * 32, path="/x", total_bytes=1, arrays=(), checksum=0)


def record(modalities: tuple[Modality, ...] = (), repetition_penalty: float = 1.0) -> Record:
    refs = tuple(MediaRef(modality=kind, path="/x", digest="d", source="s") for kind in modalities)
    made = Record(request_id="r", admitted_at=0.0, deadline_at=9.0, attempt=3)
    made.prompt = Prompt(
        token_ids=(5, 6, 7),
        media=refs,
        sampling=SamplingParams(repetition_penalty=repetition_penalty),
        salt="tenant",
        priority=-2,
    )
    made.items = [Item(parts=[m.EncodedPart(lease=LEASE, tokens=9, kept=4)], keep_bound=6) for _ in refs]
    made.tokens = [m.Sampled(request_id="r", attempt=0, seq=i, token_id=40 + i) for i in range(2)]
    return made


@pytest.mark.parametrize(
    ("modalities", "is_only_image"),
    [(("image",), True), (("image", "video"), True), (("image", "image"), False), (("video",), False)],
)
def test_only_a_single_image_is_cut_into_tiles(modalities: tuple[Modality, ...], is_only_image: bool) -> None:
    made = record(modalities)
    command = encode_media(made, 0)
    assert command.is_only_image is is_only_image
    assert (command.request_id, command.attempt, command.salt) == ("r", 3, "tenant")
    assert command.media == made.submitted.media[0]


@pytest.mark.parametrize("hand_off", [True, False])
def test_a_prompt_travels_with_everything_that_its_kv_depends_on(hand_off: bool) -> None:
    made = record(("image",))
    command = prefill_prompt(made, hand_off=hand_off)
    assert (command.request_id, command.attempt, command.hand_off) == ("r", 3, hand_off)
    assert (command.token_ids, command.forced) == ((5, 6, 7), (40, 41))
    assert (command.salt, command.priority) == ("tenant", -2)
    assert [(len(item.parts), item.is_whole, item.keep_bound) for item in command.items] == [(1, False, 6)]


@pytest.mark.parametrize(("penalty", "prompt_ids"), [(1.0, ()), (1.2, (5, 6, 7))])
def test_prompt_tokens_reach_decoding_only_when_they_are_penalised(
    penalty: float, prompt_ids: tuple[int, ...]
) -> None:
    made = record(repetition_penalty=penalty)
    made.take_prefilled(
        m.PromptPrefilled(
            request_id="r",
            attempt=3,
            first=None,
            lease=LEASE,
            next_order=11,
            next_position=7,
            slots=7,
            kv_bytes=1,
            kv_bytes_uncompressed=1,
            queue_ms=0.0,
            transfer_ms=0.0,
            prefill_ms=0.0,
        )
    )
    command = decode_from(made)
    assert command.prompt_ids == prompt_ids
    assert (command.tokens, command.lease, command.priority) == ((40, 41), LEASE, -2)
    assert (command.next_order, command.next_position) == (11, 7)
