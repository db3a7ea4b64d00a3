"""The commands for a request's stages, made from its record. Decides nothing, sends nothing."""

from __future__ import annotations

from mmserve import messages as m
from mmserve.workers.records import Record


def encode_media(record: Record, item: int) -> m.EncodeMedia:
    prompt = record.submitted
    return m.EncodeMedia(
        request_id=record.request_id,
        attempt=record.attempt,
        item=item,
        media=prompt.media[item],
        methods=prompt.methods,
        salt=prompt.salt,
        report_tokens=prompt.report_tokens,
        is_only_image=sum(ref.modality == "image" for ref in prompt.media) == 1,
    )


def encode_frames(record: Record, item: int, positions: tuple[int, ...]) -> m.EncodeFrames:
    return m.EncodeFrames(
        request_id=record.request_id,
        attempt=record.attempt,
        item=item,
        media=record.submitted.media[item],
        positions=positions,
    )


def await_frames(record: Record, item: int) -> m.AwaitFrames:
    """Everything that helpers still have of an item."""
    left = [position for positions in record.items[item].helpers.values() for position in positions]
    return m.AwaitFrames(
        request_id=record.request_id, attempt=record.attempt, item=item, positions=tuple(sorted(left))
    )


def take_frames(event: m.FramesEncoded) -> m.TakeFrames:
    return m.TakeFrames(
        request_id=event.request_id, attempt=event.attempt, item=event.item, frames=event.frames
    )


def prefill_prompt(record: Record, *, hand_off: bool) -> m.PrefillPrompt:
    prompt = record.submitted
    return m.PrefillPrompt(
        request_id=record.request_id,
        attempt=record.attempt,
        token_ids=prompt.token_ids,
        items=tuple(item.for_prefill() for item in record.items),
        sampling=prompt.sampling,
        methods=prompt.methods,
        forced=record.token_ids,
        hand_off=hand_off,
        salt=prompt.salt,
        priority=prompt.priority,
        report_tokens=prompt.report_tokens,
        report_attention=prompt.report_attention,
    )


def extend_prompt(event: m.MediaEncoded) -> m.ExtendPrompt:
    return m.ExtendPrompt(
        request_id=event.request_id,
        attempt=event.attempt,
        item=event.item,
        part=event.part,
        is_last=event.whole is not None,
    )


def decode_from(record: Record) -> m.DecodeFrom:
    prompt, prefilled = record.submitted, record.prefilled
    assert prefilled is not None, "only a prefilled request is decoded"
    return m.DecodeFrom(
        request_id=record.request_id,
        attempt=record.attempt,
        tokens=record.token_ids,
        sampling=prompt.sampling,
        next_order=prefilled.next_order,
        next_position=prefilled.next_position,
        lease=record.kv_lease,
        slots=prefilled.slots,
        prompt_ids=prompt.token_ids if prompt.sampling.repetition_penalty != 1 else (),
        priority=prompt.priority,
        methods=prompt.methods,
    )
