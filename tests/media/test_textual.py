"""Pages, screenshots and charts are told from everything that is only looked at."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mmserve.evaluation.clipworld import render, sample_scene
from mmserve.media.textual import is_textual

Picture = NDArray[np.uint8]
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "vexed")


def line(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def page(size: int, *, width: int = 900, height: int = 1200, dark: bool = False) -> Picture:
    ground, ink = ((20, 22, 28), (225, 225, 220)) if dark else ((255, 255, 255), (20, 20, 20))
    sheet, rng = Image.new("RGB", (width, height), ground), random.Random(0)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for y in range(width // 12, height - width // 12, round(size * 1.4)):
        pen.text((width // 12, y), line(rng, width // (size * 3)), ink, font)
    return np.asarray(sheet)


def screenshot() -> Picture:
    sheet, rng = Image.new("RGB", (1280, 800), (245, 246, 248)), random.Random(0)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.rectangle((0, 0, 1280, 48), (40, 60, 110))
    for row in range(6):
        for left in (250, 750):
            top = 80 + row * 115
            pen.rectangle((left, top, left + 470, top + 100), (255, 255, 255), (200, 200, 200))
            for part in range(3):
                pen.text((left + 12, top + 12 + part * 24), line(rng, 9), (40, 40, 40), font)
    return np.asarray(sheet)


def chart() -> Picture:
    sheet = Image.new("RGB", (800, 600), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i in range(10):
        pen.line((80, 60 + i * 48, 760, 60 + i * 48), (220, 220, 220))
        pen.text((30, 52 + i * 48), f"{100 - 10 * i}.0", (0, 0, 0), font)
        pen.rectangle((90 + i * 68, 100 + i * 30, 130 + i * 68, 540), (70, 120, 190))
        pen.text((90 + i * 68, 550), f"item {i}", (0, 0, 0), font)
        pen.text((90 + i * 68, 80 + i * 30), f"{90 - i * 5.5:.1f}", (0, 0, 0), font)
    pen.text((200, 20), "Yearly revenue by product and region (millions)", (0, 0, 0), font)
    return np.asarray(sheet)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [10, 14, 20, 32, 48])
def test_a_page_is_text_in_any_size_and_shade(size: int, dark: bool) -> None:
    assert is_textual(page(size, dark=dark))


def test_scans_screenshots_and_charts_are_text() -> None:
    pictures = [page(42, width=2480, height=3508), page(12, width=384, height=384), screenshot(), chart()]
    assert all(map(is_textual, pictures))


def test_what_is_only_looked_at_is_not_text() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)
    soft = [np.asarray(Image.fromarray(noise[: 600 // n, : 800 // n]).resize((800, 600))) for n in (2, 4, 8)]
    ramp = np.broadcast_to(np.linspace(0, 255, 800).astype(np.uint8)[None, :, None], (600, 800, 3))
    columns, rows = np.arange(800), np.arange(600)[:, None]
    stripes = [np.where(columns // n % 2, 255, 0) + 0 * rows for n in (4, 8, 16)]
    checks = [np.where(columns // n % 2 ^ rows // n % 2, 255, 0) for n in (8, 32)]
    drawn = [np.repeat(each[:, :, None].astype(np.uint8), 3, 2) for each in (*stripes, *checks)]
    for picture in (noise, *soft, ramp, *drawn, np.zeros((4, 4, 3), np.uint8)):
        assert not is_textual(picture)


def test_frames_of_clipworld_are_not_text() -> None:
    rng = np.random.default_rng(0)
    for topic in ("order", "digit", "colour", "cuts"):
        frames = render(sample_scene(rng, topic))
        for frame in frames[:2]:
            assert not is_textual(frame)
            assert not is_textual(np.asarray(Image.fromarray(frame).resize((576, 576))))
