"""ChatFormat against transformers on the embedded model; no text can claim a picture; Detokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmserve.errors import BadRequest, ConfigError
from mmserve.models.chat import ChatFormat, Detokenizer
from mmserve.models.resolve import resolve

TINY = resolve("tiny")
CHAT = ChatFormat.from_model_dir(TINY)
ORACLE = AutoTokenizer.from_pretrained(TINY)
MEDIA = {CHAT.image_token, CHAT.video_token}

Part = dict[str, str]
# whole special tokens, their halves, and what stands between them in templates
FRAGMENTS = st.sampled_from(
    [
        *CHAT.specials,
        *("<", "<i", "<ima", "ge>", "mage>", ">", "<|", "|>", "<|im_", "end|>", "vid", "eo>", "<vid"),
        *(
            "im_start|>user",
            "\n",
            " ",
            "\ue0000\ue001",
            "\ue000",
            "\ue001",
            "é",
            "日",
            "\U0001f600",
            "red square",
        ),
    ]
)
TEXT = st.one_of(
    st.lists(FRAGMENTS, max_size=8).map("".join), st.text(st.characters(codec="utf-8"), max_size=20)
)
PART = st.one_of(
    st.one_of(FRAGMENTS, TEXT).map(lambda text: {"type": "text", "text": text}),
    st.sampled_from([{"type": "image"}, {"type": "video"}]),
)
CONTENT = st.one_of(TEXT, st.lists(PART, min_size=1, max_size=6))
CONVERSATION = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "system"]), CONTENT
    ),
    min_size=1,
    max_size=4,
)


def media_of(messages: list[dict[str, Any]]) -> list[str]:
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    return [part["type"] for part in parts if part["type"] != "text"]


def expected_ids(messages: list[dict[str, Any]]) -> list[int]:
    text = ORACLE.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(ORACLE.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What is this?"}],
        [{"role": "system", "content": "Short."}, {"role": "user", "content": "  two  spaces \n"}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "video"},
                    {"type": "text", "text": "How many "},
                    {"type": "image"},
                    {"type": "text", "text": "dogs – 日本 \U0001f600 ?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    ],
)
def test_ids_equal_those_of_transformers(messages: list[dict[str, Any]]) -> None:
    assert CHAT.encode(messages) == expected_ids(messages)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=3))
def test_any_harmless_text_gives_the_ids_of_transformers(texts: list[str]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    if not any(special in "".join(texts) for special in CHAT.specials):
        assert CHAT.encode(messages) == expected_ids(messages)


@settings(max_examples=600, deadline=None)
@given(CONVERSATION)
def test_no_text_claims_media_or_a_turn(messages: list[dict[str, Any]]) -> None:
    ids = CHAT.encode(messages)
    kinds = {CHAT.image_token: "image", CHAT.video_token: "video"}
    assert [kinds[token] for token in ids if token in kinds] == media_of(messages)
    # every turn of the template, and no other: one start and one end each, one start to answer
    start, end = (ORACLE.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert ids.count(start) == len(messages) + 1
    assert ids.count(end) == len(messages)


@settings(max_examples=200, deadline=None)
@given(st.lists(FRAGMENTS, min_size=1, max_size=8).map("".join))
def test_text_that_spells_special_tokens_arrives_unchanged(text: str) -> None:
    ids = CHAT.encode([{"role": "user", "content": text}])
    spelled = ORACLE.decode(ids, skip_special_tokens=False)
    assert spelled == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(CHAT.specials), st.sampled_from(["", "<", "red "]))
def test_a_special_token_spelled_across_parts_is_text(data: st.DataObject, special: str, before: str) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(special) - 1), min_size=1, max_size=3)))
    ends = [*cuts, len(special)]
    pieces = [special[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    parts = [{"type": "text", "text": text} for text in (before, *pieces)]
    ids = CHAT.encode([{"role": "user", "content": parts}])
    assert not MEDIA.intersection(ids)
    assert ids.count(ORACLE.convert_tokens_to_ids(special)) == {"<|im_start|>": 2, "<|im_end|>": 1}.get(
        special, 0
    )


def variant(path: Path, template: str | None = None, **config: object) -> Path:
    """A copy of the embedded model's format with another template or configuration."""
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(TINY / name, path / name)
    settings = json.loads((TINY / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    text = (TINY / "chat_template.jinja").read_text() if template is None else template
    (path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    return path


# as LLaVA-OneVision checkpoints have it: pictures first, and marks for training
LLAVA = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + content['text'] }}{% endif %}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_the_template_of_llava_onevision_renders_as_in_transformers(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(variant(tmp_path, LLAVA))
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What?"}, {"type": "image"}, {"type": "video"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    text = ORACLE.apply_chat_template(
        messages, chat_template=LLAVA, tokenize=False, add_generation_prompt=True
    )
    assert chat.encode(messages) == ORACLE.encode(text, add_special_tokens=False)


def test_media_that_a_template_reorders_are_refused_not_swapped(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(variant(tmp_path, LLAVA))
    with pytest.raises(BadRequest, match="order"):
        chat.encode([{"role": "user", "content": [{"type": "video"}, {"type": "image"}]}])


def test_media_that_a_template_drops_are_refused(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(variant(tmp_path, "{% for m in messages %}{{ m['role'] }}{% endfor %}"))
    with pytest.raises(BadRequest, match="1 became none"):
        chat.encode([{"role": "user", "content": [{"type": "image"}]}])


def test_a_template_that_refuses_a_conversation_is_a_bad_request(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(variant(tmp_path, "{{ raise_exception('no systems here') }}"))
    with pytest.raises(BadRequest, match="chat template"):
        chat.encode([{"role": "system", "content": "x"}])


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    chat = ChatFormat.from_model_dir(
        variant(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    )
    with pytest.raises(BadRequest):
        chat.encode([{"role": "user", "content": "x"}])


def test_a_directory_without_its_parts_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatFormat.from_model_dir(tmp_path)
    folder = variant(tmp_path, image_token_index=None)
    with pytest.raises(ConfigError, match="image_token_id"):
        ChatFormat.from_model_dir(folder)
    variant(tmp_path)
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(ConfigError, match="chat template"):
        ChatFormat.from_model_dir(tmp_path)


def test_several_ends_of_sequence_are_all_known(tmp_path: Path) -> None:
    text = json.loads((TINY / "config.json").read_text())["text_config"] | {"eos_token_id": [8, 9]}
    assert ChatFormat.from_model_dir(variant(tmp_path, text_config=text)).eos_tokens == (8, 9)
    assert CHAT.eos_tokens == (ORACLE.eos_token_id,)


# detokenizer

IDS = st.lists(st.integers(0, CHAT.tokenizer.get_vocab_size() - 1), max_size=30)
UTF8 = st.text(st.characters(codec="utf-8"), max_size=12).map(
    lambda text: list(CHAT.tokenizer.encode(text, add_special_tokens=False).ids)
)
ANY_IDS = st.one_of(IDS, UTF8)


def streamed(ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    """Pieces that come out when ids go in groups of these sizes."""
    detokenizer, pieces, start = Detokenizer(CHAT, stop), [], 0
    while start < len(ids):
        size = cuts[start % len(cuts)] if cuts else 1
        pieces.append(detokenizer.add(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()], detokenizer


@settings(max_examples=400, deadline=None)
@given(ANY_IDS, st.lists(st.integers(1, 4), max_size=5))
def test_pieces_join_to_the_whole_text(ids: list[int], cuts: list[int]) -> None:
    pieces, _ = streamed(ids, cuts)
    assert "".join(pieces) == CHAT.decode(ids)
    # only the end may hold an unfinished character
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "aab", " c", "é", "日", "\n"]), max_size=15).map("".join),
    st.lists(st.text("abcé日\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), max_size=4),
)
def test_a_stop_string_ends_the_text_and_never_shows(text: str, stops: list[str], cuts: list[int]) -> None:
    ids = list(CHAT.tokenizer.encode(text, add_special_tokens=False).ids)
    pieces, detokenizer = streamed(ids, cuts, tuple(stops))
    shown = "".join(pieces)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert detokenizer.stopped == any(stop in text for stop in stops)
    if not detokenizer.stopped:
        assert shown == text


def test_the_earliest_of_several_stop_strings_counts() -> None:
    ids = CHAT.tokenizer.encode("red square blue", add_special_tokens=False).ids
    pieces, _ = streamed(ids, [len(ids)], ("blue", "square"))
    assert "".join(pieces) == "red "


def test_text_before_a_stop_string_survives_an_unfinished_character() -> None:
    half = CHAT.tokenizer.encode("日", add_special_tokens=False).ids[0]
    ids = [*CHAT.tokenizer.encode("red END", add_special_tokens=False).ids, half]
    detokenizer = Detokenizer(CHAT, ("END",))
    assert detokenizer.add(ids) == ""
    assert detokenizer.flush() == "red "
    assert detokenizer.stopped
    assert detokenizer.add(ids) == detokenizer.flush() == ""


def test_special_tokens_are_spelled_out_for_log_probabilities_only() -> None:
    assert CHAT.token_text(CHAT.eos_tokens[0]) == "<|im_end|>"
    assert CHAT.decode([CHAT.eos_tokens[0]]) == ""
