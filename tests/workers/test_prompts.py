"""Prompts that grow: the same rows in whatever order their parts come, and what may be run meanwhile."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from mmserve import messages as m
from mmserve.engine.rows import MAX_OBSERVED
from mmserve.errors import BadRequest, WireError
from mmserve.request import Methods
from mmserve.sampling import SamplingParams
from mmserve.transfer import MappedLeases
from mmserve.workers.prompts import GrowingPrompt
from tests.workers.fakes import IMAGE, VIDEO, Engine, whole

PROMPT = (1, 2, VIDEO, 3, IMAGE, 4, 5)


class Media:
    """A video in two parts and an image, published."""

    def __init__(self, directory: Path) -> None:
        self.engine = Engine(directory)
        self.directory = directory
        self.video = self.engine.part(6, [0, 2, 5], seed=1), self.engine.part(3, seed=1, first=6)
        self.image = self.engine.part(4, seed=2)

    def prompt(
        self,
        *items: m.PromptItem,
        kv: str = "none",
        prune: str = "none",
        logprobs: int | None = None,
        layers: int = 2,
    ) -> GrowingPrompt:
        command = m.PrefillPrompt(
            request_id="r",
            attempt=0,
            token_ids=PROMPT if len(items) == 2 else (1, VIDEO, 9),
            items=items,
            sampling=SamplingParams(prompt_logprobs=logprobs),
            methods=Methods(kv=kv, prune=prune),
        )
        return GrowingPrompt(
            command,
            arrived=0,
            received_at=0.0,
            media_tokens=(IMAGE, VIDEO),
            num_layers=layers,
            step_rows=2048,
            reader=MappedLeases([self.directory]),
        )

    def extend(self, prompt: GrowingPrompt, item: int, part: m.EncodedPart, *, is_last: bool) -> None:
        prompt.extend(m.ExtendPrompt(request_id="r", attempt=0, item=item, part=part, is_last=is_last))


def nothing(bound: int) -> m.PromptItem:
    return m.PromptItem(parts=(), is_whole=False, keep_bound=bound)


def test_parts_in_any_order_between_items_make_the_same_prompt(tmp_path: Path) -> None:
    media = Media(tmp_path)
    first, second = media.video
    expected = media.prompt(whole(first, second), whole(media.image))
    assert expected.is_whole
    assert expected.order.tolist() == [0, 1, 2, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert expected.position.tolist() == expected.order.tolist()
    assert np.flatnonzero(expected.is_visual).tolist() == [2, 3, 4, 5, 6, 7, 9, 10, 11, 12]

    growing = media.prompt(nothing(9), nothing(4))
    assert (len(growing), growing.ready, growing.capacity, growing.is_whole) == (2, 1, 18, False)
    media.extend(growing, 1, media.image, is_last=True)
    assert len(growing) == 2, "the video comes first"
    media.extend(growing, 0, first, is_last=False)
    assert (len(growing), growing.ready) == (5, 4)
    media.extend(growing, 0, second, is_last=True)
    assert growing.is_whole
    assert growing.ready == len(growing) == len(expected)
    assert growing.length == expected.length == 18
    for name in ("order", "position", "is_visual", "token_ids"):
        assert (getattr(growing, name) == getattr(expected, name)).all()
    assert growing.identity.common(expected.identity) == len(expected)


def test_rows_that_may_be_observed_are_kept_back(tmp_path: Path) -> None:
    media = Media(tmp_path)
    part = media.engine.part(MAX_OBSERVED + 10)
    growing = media.prompt(m.PromptItem(parts=(part,), is_whole=False, keep_bound=200), kv="snapkv")
    assert growing.ready == growing.most_cached == 11
    media.extend(growing, 0, media.engine.part(1), is_last=True)
    assert growing.ready == len(growing) == MAX_OBSERVED + 13


def test_embeddings_are_read_as_they_come(tmp_path: Path) -> None:
    media = Media(tmp_path)
    first, second = media.video
    expected = media.prompt(whole(first, second), whole(media.image)).begin(media.engine.runner)
    growing = media.prompt(nothing(9), whole(media.image))
    rows = growing.begin(media.engine.runner)
    assert (len(rows), rows.ready, rows.is_whole) == (2, 1, False)
    for part in media.video:
        media.extend(growing, 0, part, is_last=part is second)
        growing.load(rows, media.engine.runner)
    assert rows.is_whole
    assert len(rows) == len(expected)
    assert (rows.embeddings[: len(rows)] == expected.embeddings[: len(expected)]).all()


def test_a_prompt_that_found_no_pages_is_read_again(tmp_path: Path) -> None:
    media = Media(tmp_path)
    prompt = media.prompt(whole(*media.video), whole(media.image))
    first, second = (prompt.begin(media.engine.runner) for _ in range(2))
    assert (first.embeddings[: len(first)] == second.embeddings[: len(second)]).all()


def test_an_item_larger_than_was_said_is_refused(tmp_path: Path) -> None:
    media = Media(tmp_path)
    growing = media.prompt(nothing(4))
    media.extend(growing, 0, media.video[0], is_last=False)
    with pytest.raises(WireError, match="at most 6 rows, but got 7"):
        media.extend(growing, 0, media.video[1], is_last=False)


def test_too_many_prompt_logprobs_are_refused_when_the_prompt_is_known(tmp_path: Path) -> None:
    media = Media(tmp_path)
    part = media.engine.part(900)
    with pytest.raises(BadRequest, match="16384 candidates in total, but got 902 tokens with 21 each"):
        media.prompt(whole(part), logprobs=20)


@pytest.mark.parametrize("prune", ["fastv", "holitom+fastv"])
def test_an_inner_method_shares_the_text_before_the_first_item_alone(tmp_path: Path, prune: str) -> None:
    media = Media(tmp_path)
    items = whole(*media.video), whole(media.image)
    dense, inner = media.prompt(*items), media.prompt(*items, prune=prune)
    assert (dense.most_cached, inner.most_cached) == (14, 2)
    assert (len(dense.shared_identity.rows), len(inner.shared_identity.rows)) == (15, 2)
    assert (dense.is_shared, inner.is_shared) == (True, False)
    assert (dense.is_observed, inner.is_observed) == (False, True)
    growing = media.prompt(whole(*media.video), nothing(4), prune=prune)
    assert (growing.ready, growing.most_cached) == (0, 0), "its last rows may turn out to be observed"


def test_the_last_row_of_every_item_is_not_reducible(tmp_path: Path) -> None:
    media = Media(tmp_path)
    growing = media.prompt(whole(*media.video), nothing(4), prune="fastv")
    rows = growing.begin(media.engine.runner)
    assert np.flatnonzero(rows.is_reducible).tolist() == [2, 3, 4, 5, 6]
    media.extend(growing, 1, media.image, is_last=True)
    growing.load(rows, media.engine.runner)
    assert np.flatnonzero(rows.is_reducible).tolist() == [2, 3, 4, 5, 6, 9, 10, 11]


def test_what_acts_on_the_embeddings_waits_for_all_of_them(tmp_path: Path) -> None:
    media = Media(tmp_path)
    growing = media.prompt(whole(*media.video), nothing(4), prune="cdpruner")
    assert (growing.ready, growing.is_observed) == (0, False)
    media.extend(growing, 1, media.image, is_last=True)
    assert growing.ready == len(growing)


def test_a_model_of_one_layer_has_nothing_between_layers(tmp_path: Path) -> None:
    media = Media(tmp_path)
    items = whole(*media.video), whole(media.image)
    assert media.prompt(*items, prune="fastv", layers=1).is_shared
    assert not media.prompt(*items, prune="cdpruner", layers=1).is_shared


def test_log_probabilities_are_refused_with_an_inner_method(tmp_path: Path) -> None:
    media = Media(tmp_path)
    with pytest.raises(BadRequest, match="no prompt_logprobs with prune fastv, but got 2"):
        media.prompt(whole(*media.video), whole(media.image), prune="fastv", logprobs=2)


def test_a_guarded_part_is_not_for_layers_to_reduce(tmp_path: Path) -> None:
    media = Media(tmp_path)
    image = msgspec.structs.replace(media.image, guarded=True)
    prompt = media.prompt(whole(*media.video), whole(image), prune="fastv")
    rows = prompt.begin(media.engine.runner)
    reducible = np.flatnonzero(rows.is_reducible).tolist()
    # of the video all but its newline
    assert reducible == np.flatnonzero(prompt.is_visual).tolist()[:5]
