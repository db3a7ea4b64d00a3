"""Content keys never collide by construction (R17)."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmserve.errors import BadRequest
from mmserve.media.arrays import plan_array, save_frames
from mmserve.media.digest import Parameter, file_digest, frame_key
from mmserve.media.framelist import frames_media, save_pictures
from mmserve.media.frames import plan_frames
from mmserve.media.image import plan_image
from mmserve.media.limits import MediaLimits
from mmserve.media.plan import MediaPlan
from mmserve.media.store import ContentStore
from mmserve.media.video import plan_video
from mmserve.request import MediaOptions
from tests.media.clips import make_video

BASE: dict[str, Parameter] = {"name": "x", "threads": 1}


def key(
    source: str = "aa",
    decoder: Parameter | dict[str, Parameter] = "d",
    preprocessing: Parameter | dict[str, Parameter] = "p",
    time_s: float = 0.0,
    revision: str = "r",
    salt: str = "",
) -> bytes:
    return frame_key(source, decoder, preprocessing, time_s, revision, salt)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_the_key_has_32_bytes_and_does_not_depend_on_the_order_of_parameters() -> None:
    assert len(key()) == 32
    assert key(decoder={"a": 1, "b": 2}) == key(decoder={"b": 2, "a": 1})


def test_every_field_and_every_border_between_fields_counts() -> None:
    """R17."""
    keys = [
        key(),
        key(source="ab"),
        key(source="aad"),
        key(source="aad", decoder=""),
        key(decoder="dp", preprocessing=""),
        key(decoder="", preprocessing="dp"),
        key(decoder={"size": (30, 150)}),
        key(decoder={"size": (150, 30)}),
        key(decoder={"size": ((150,), 30)}),
        key(decoder={"size": "150"}),
        key(decoder={"size": 150}),
        key(decoder={"size": 150.0}),
        key(decoder={"size": True}),
        key(decoder={"size": 1}),
        key(decoder={"size": None}),
        key(decoder={"size": b"150"}),
        key(decoder={"size": ()}),
        key(decoder={}),
        key(time_s=0.04),
        key(time_s=0.040000001),
        key(revision="r2"),
        key(revision="", salt="r"),
        key(salt="tenant"),
    ]
    assert len(set(keys)) == len(keys)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(first=_values, second=_values)
def test_different_parameters_have_different_keys(first: Parameter, second: Parameter) -> None:
    """R17."""
    assert (key(decoder=first) == key(decoder=second)) == (repr(first) == repr(second))


Pixels = npt.NDArray[np.uint8]


def keys_of(plan: MediaPlan, digest: str, modality: str) -> set[bytes]:
    """As an encode worker addresses the frames of an item."""
    how: dict[str, Parameter] = {"modality": modality, "settings": "s", "tiled": modality == "image"}
    return {frame_key(digest, plan.decoder, how, time_s, "w") for time_s in plan.times_s}


def of_image(path: Path, image: Image.Image) -> set[bytes]:
    image.save(path, "PNG")
    return keys_of(plan_image(path, MediaLimits()), file_digest(path), "image")


def of_array(folder: Path, pixels: Pixels, fps: float = 1.0) -> set[bytes]:
    ref = save_frames(pixels, ContentStore(folder), "video", fps=fps)
    return keys_of(plan_array(ref, MediaLimits()), ref.digest, "video")


def of_list(folder: Path, *frames: Pixels | bytes) -> set[bytes]:
    limits = MediaLimits()
    ref = frames_media(save_pictures(frames, ContentStore(folder), limits), "frames")
    return keys_of(plan_frames(ref, limits), ref.digest, "video")


def test_media_that_look_alike_to_a_careless_hash_share_no_key(tmp_path: Path) -> None:
    """R17: the pairs that others have mixed up."""
    flat = np.arange(30 * 150 * 3, dtype=np.uint32).astype(np.uint8)
    wide, high = flat.reshape(1, 30, 150, 3), flat.reshape(1, 150, 30, 3)
    grey = Image.fromarray(flat[:4500].reshape(30, 150))
    palette = grey.convert("P")
    twin = palette.copy()
    twin.putpalette(bytes(reversed(palette.getpalette() or [])))
    file = io.BytesIO()
    grey.save(file, "PNG")
    png = file.getvalue()
    found = [
        of_image(tmp_path / "image", Image.fromarray(wide[0])),
        of_image(tmp_path / "image", Image.fromarray(high[0])),
        of_image(tmp_path / "image", grey),
        of_image(tmp_path / "image", palette),
        of_image(tmp_path / "image", twin),
        of_image(tmp_path / "image", Image.fromarray(flat[:4500].reshape(30, 150).astype(np.uint16) * 257)),
        of_image(tmp_path / "image", grey.transpose(Image.Transpose.ROTATE_90)),
        of_array(tmp_path, wide),
        of_array(tmp_path, high),
        of_array(tmp_path, wide.reshape(3, 10, 150, 3)),
        of_list(tmp_path, wide[0]),
        of_list(tmp_path, high[0]),
        of_list(tmp_path, png),
        of_list(tmp_path, png + b"suffix"),
    ]
    everything = [key for keys in found for key in keys]
    assert len(set(everything)) == len(everything)
    assert {len(key) for key in everything} == {32}


def test_other_times_of_one_video_are_other_keys_and_equal_times_equal_ones(tmp_path: Path) -> None:
    """R17: the same video at another rate or size; what is shown at the same time may be shared."""
    path = make_video(tmp_path / "clip.mp4", frames=24, rate=4)
    longer = tmp_path / "longer.mp4"
    longer.write_bytes(path.read_bytes() + b"suffix")

    def keys_at(options: MediaOptions, file: Path = path) -> set[bytes]:
        return keys_of(plan_video(file, options, MediaLimits()), file_digest(file), "video")

    slow, fast = keys_at(MediaOptions(fps=1)), keys_at(MediaOptions(fps=2))
    assert (len(slow), len(fast), len(slow & fast)) == (6, 12, 6)
    assert not keys_at(MediaOptions(fps=2, max_pixels=1000)) & fast
    assert not keys_at(MediaOptions(fps=2), longer) & fast
    # ranges keep to the media's own clock
    early, late = keys_at(MediaOptions(fps=2, end_s=4)), keys_at(MediaOptions(fps=2, start_s=2.3))
    assert (len(early), len(late), len(early & late), early | late) == (8, 7, 3, fast)


def test_no_short_piece_of_a_key_stands_for_it() -> None:
    """R17: all 32 bytes count; cut to 16 bits, 2,000 keys would collide for certain."""
    found = [key(source=str(number)) for number in range(2000)]
    assert len(set(found)) == 2000
    assert len({one[:2] for one in found}) < 2000


def test_arrays_of_another_kind_of_number_are_no_frames(tmp_path: Path) -> None:
    """R17: the twin of uint8 pixels in int8 is refused, not mistaken."""
    pixels = np.full((1, 4, 4, 3), 200, dtype=np.uint8)
    with pytest.raises(BadRequest, match="uint8"):
        save_frames(pixels.view(np.int8), ContentStore(tmp_path), "video", fps=1.0)
