"""Small files of the data package: palette PNGs, annotation XML, the cache folder's place."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pssl.data import cache_dir, colour_labels, voc_palette, write_label_png
from pssl.data.image_labels import annotation_objects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>',
            "a DTD or entity",
        ),
        (
            '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;">]><annotation>&y;</annotation>',
            "a DTD or entity",
        ),
        ('<!DOCTYPE annotation SYSTEM "http://localhost/a.dtd"><annotation/>', "a DTD or entity"),
        ("<annotation>&x;</annotation>", "well-formed XML"),
        ("<annotation><object>", "well-formed XML"),
        ("", "well-formed XML"),
        ("<html/>", "expected an <annotation> document, got <html>"),
        ("<annotation><object/></annotation>", "object 1 has no <name>"),
    ],
)
def test_unsafe_or_broken_annotations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        annotation_objects(path)
    assert str(path) in str(caught.value)


def test_palette_is_vocs() -> None:
    flat = voc_palette()
    colours = [tuple(flat[3 * label : 3 * label + 3]) for label in range(256)]
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        3: (128, 128, 0),
        7: (128, 128, 128),
        8: (64, 0, 0),
    }
    known |= {15: (192, 128, 128), 19: (128, 192, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: colours[label] for label in known} == known
    assert len(set(colours)) == 256
    assert voc_palette(21) == flat[:63]
    for n in (0, 257):
        with pytest.raises(ValueError, match=r"1\.\.256"):
            voc_palette(n)


@settings(deadline=None)  # a shared machine may stall in any one example
@given(labels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_label_png_round_trip(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("png") / "a.png"
    write_label_png(path, labels)
    first = path.read_bytes()
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), labels)
        np.testing.assert_array_equal(np.array(image.convert("RGB")), colour_labels(labels))
    write_label_png(path, labels)
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "labels", [np.zeros((2, 2), int), np.zeros((2, 2, 3), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_label_png_refuses_other_arrays(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"labels must be uint8 \[H,W\]"):
        write_label_png(tmp_path / "a.png", labels)
    assert not list(tmp_path.iterdir())


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PSSL_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("PSSL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "pssl"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "pssl"
