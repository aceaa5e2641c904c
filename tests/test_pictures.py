"""The pictures of the docs are small, and all of them are shown."""

import io
import re

import pytest
from PIL import Image

from tests.pictures import FOLDER, LARGEST, ROOT, small


def png(image):
    found = io.BytesIO()
    image.save(found, "PNG")
    return found.getvalue()


def test_a_picture_is_made_small_or_refused():
    assert len(small(png(Image.new("RGB", (1000, 800), "white")))) < 1000
    with pytest.raises(ValueError, match="more than 60,000"):
        small(png(Image.effect_noise((700, 700), 100)))


def test_pictures_are_small_and_shown():
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    shown = set(re.findall(r"pictures/([\w-]+\.png)", "".join(map(_text, pages))))
    assert shown == {path.name for path in FOLDER.glob("*.png")}
    assert all(path.stat().st_size <= LARGEST for path in FOLDER.glob("*.png"))


def _text(path):
    return path.read_text(encoding="utf-8")
