"""The synthetic set: a true VOC folder, the same bytes for the same configuration, labels that agree."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pssl.data import (
    SyntheticConfig,
    VOCFolder,
    ensure_synthetic,
    from_annotations,
    from_image_sets,
    write_synthetic,
)
from pssl.data.summary import summarise
from pssl.data.synthetic.folder import border_of

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = SyntheticConfig(train=24, val=8, size=64)


def content(root: Path) -> dict[str, str]:
    """Hashes by relative path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module", params=["parts", "uniform"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VOCFolder:
    root = tmp_path_factory.mktemp("synthetic") / "set"
    return VOCFolder(write_synthetic(root, replace(SMALL, variant=request.param)))


def test_same_configuration_same_bytes(tmp_path: Path) -> None:
    first = content(write_synthetic(tmp_path / "a", SMALL))
    assert first == content(write_synthetic(tmp_path / "b", SMALL))
    other = content(write_synthetic(tmp_path / "c", replace(SMALL, seed=1)))
    assert first.keys() == other.keys()
    images = [name for name in first if name.startswith("JPEGImages")]
    assert len(images) == 32
    assert all(first[name] != other[name] for name in images)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = content(write_synthetic(tmp_path / "few", replace(SMALL, train=2, val=2)))
    more = content(write_synthetic(tmp_path / "more", replace(SMALL, train=3, val=4)))
    for name in few:
        if not name.startswith("ImageSets") and name != "synthetic.json":
            assert few[name] == more[name], name


def test_variants_show_the_same_scenes(tmp_path: Path) -> None:
    parts = VOCFolder(write_synthetic(tmp_path / "parts", SMALL))
    uniform = VOCFolder(write_synthetic(tmp_path / "uniform", replace(SMALL, variant="uniform")))
    for image_id in parts.ids("trainval"):
        np.testing.assert_array_equal(parts.mask(image_id), uniform.mask(image_id))
        np.testing.assert_array_equal(parts.parts(image_id), uniform.parts(image_id))
        assert (parts.image(image_id) != uniform.image(image_id)).any()


def test_is_a_voc_folder(small: VOCFolder) -> None:
    assert small.classes == ("disc", "fan", "flower", "gear", "shield", "star")
    assert small.splits == ("train", "trainval", "val")
    assert (len(small.ids("train")), len(small.ids("val"))) == (24, 8)
    assert small.ids("trainval") == small.ids("train") + small.ids("val")
    assert summarise(small, decode=True).problems == []


def test_labels_masks_and_parts_agree(small: VOCFolder) -> None:
    ids = small.ids("trainval")
    labels = small.image_labels(ids)
    np.testing.assert_array_equal(labels, from_image_sets(small.root, ids, small.classes))
    np.testing.assert_array_equal(labels, from_annotations(small.root, ids, small.classes))
    assert (labels.sum(1) >= 1).all()
    assert (labels.sum(0) >= 1).all()
    for image_id, row in zip(ids, labels, strict=True):
        mask, parts = small.mask(image_id), small.parts(image_id)
        assert small.image(image_id).shape == (64, 64, 3)
        np.testing.assert_array_equal(mask == 255, parts == 255)
        np.testing.assert_array_equal(mask == 0, parts == 0)
        assert set(np.unique(mask)) - {0, 255} == set(np.flatnonzero(row) + 1)


def test_the_part_is_about_a_third(small: VOCFolder) -> None:
    parts = np.stack([small.parts(image_id) for image_id in small.ids("trainval")])
    part, body = (parts == 1).sum(), (parts == 2).sum()
    assert 0.25 < part / (part + body) < 0.42
    assert 0.1 < (part + body) / parts.size < 0.4


def test_annotations_hold_boxes_of_the_masks(small: VOCFolder) -> None:
    for image_id in small.ids("val"):
        root = ElementTree.parse(small.root / "Annotations" / f"{image_id}.xml").getroot()
        assert root.findtext("filename") == f"{image_id}.jpg"
        assert [root.findtext(f"size/{key}") for key in ("width", "height", "depth")] == ["64", "64", "3"]
        boxes = np.zeros((64, 64), bool)
        for thing in root.findall("object"):
            assert thing.findtext("name") in small.classes
            assert thing.findtext("difficult") == "0"
            left, top, right, bottom = (
                int(thing.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")
            )
            assert 1 <= left < right <= 64
            assert 1 <= top < bottom <= 64
            boxes[top - 1 : bottom, left - 1 : right] = True
        mask = small.mask(image_id)
        assert boxes[(mask > 0) & (mask < 255)].all()


def test_border_is_one_pixel_on_each_side() -> None:
    instances = np.zeros((5, 6), np.uint8)
    instances[:, 3:] = 1
    expected = np.zeros((5, 6), bool)
    expected[:, 2:4] = True
    np.testing.assert_array_equal(border_of(instances), expected)
    np.testing.assert_array_equal(border_of(instances.T), expected.T)
    assert not border_of(np.ones((4, 4), np.uint8)).any()


def test_a_folder_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        write_synthetic(tmp_path, SMALL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pssl.data.synthetic.folder.draw_image", fail)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", SMALL)
    assert not list(tmp_path.iterdir())


def test_ensure_reuses_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSSL_CACHE", str(tmp_path / "cache"))
    config = SyntheticConfig(train=1, val=1, size=32)
    root = ensure_synthetic(None, config)
    assert root.parent == tmp_path / "cache"
    assert root.name.startswith("synthetic-parts-")
    stamp = (root / "synthetic.json").stat().st_mtime_ns
    assert ensure_synthetic(None, config) == root
    assert (root / "synthetic.json").stat().st_mtime_ns == stamp
    assert ensure_synthetic(None, replace(config, seed=3)) != root
    assert ensure_synthetic(root, config) == root
    with pytest.raises(ValueError, match=r"expected a set with seed 3, got seed 0"):
        ensure_synthetic(root, replace(config, seed=3))
    record = json.loads((root / "synthetic.json").read_text())
    (root / "synthetic.json").write_text(json.dumps({**record, "generator": "older"}))
    with pytest.raises(ValueError, match="got generator 'older'"):
        ensure_synthetic(root, config)


@pytest.mark.parametrize(
    "wrong", [{"variant": "other"}, {"train": 0}, {"val": -1}, {"size": 8}, {"seed": -1}], ids=str
)
def test_configuration_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"synthetic: {next(iter(wrong))} must be"):
        SyntheticConfig(**wrong)


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "pssl.data.synthetic", str(tmp_path / "set")]
    command += ["--variant", "uniform", "--train", "2", "--val", "1", "--size", "40", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    folder = VOCFolder(tmp_path / "set")
    assert len(folder.ids("trainval")) == 3
    expected = write_synthetic(
        tmp_path / "direct", SyntheticConfig("uniform", train=2, val=1, size=40, seed=7)
    )
    assert content(tmp_path / "set") == content(expected)
    again = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert again.returncode == 2
    assert "expected a new or empty folder" in again.stderr
