"""VOC-layout folders: classes, splits, images, masks, image-level labels, errors where they are broken."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pssl.data import (
    VOCFolder,
    check_images,
    check_labels,
    from_annotations,
    from_image_sets,
    resolve_image_labels,
    write_label_png,
)
from pssl.data.image_labels import annotation_objects
from pssl.data.summary import summarise

REPOSITORY = Path(__file__).resolve().parents[2]
IDS = ["2007_000001", "2007_000002", "2008_000003"]
PRESENT = {"cat": {0, 1}, "potted_plant": {2}, "train": {1}}  # VOC has a class called "train"


def annotation(*names: str, difficult: int = 0) -> str:
    things = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        "<part><name>head</name></part></object>"
        for name in names
    )
    return f"<annotation>{things}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images, the first two in split train, the third in val."""
    for name in (
        "JPEGImages",
        "SegmentationClass",
        "Annotations",
        "ImageSets/Main",
        "ImageSets/Segmentation",
    ):
        (tmp_path / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, image_id in enumerate(IDS):
        pixels = rng.integers(0, 256, (20, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{image_id}.jpg")
        names = [name for name, members in PRESENT.items() if number in members]
        regions = np.array(
            [0, *(region for region, name in enumerate(PRESENT, 1) if name in names)], np.uint8
        )
        mask = regions[pixels[..., 0] % len(regions)]
        write_label_png(tmp_path / "SegmentationClass" / f"{image_id}.png", mask)
        (tmp_path / "Annotations" / f"{image_id}.xml").write_text(annotation(*names))
    for split, members in {"train": IDS[:2], "val": IDS[2:], "trainval": IDS}.items():
        plain = "".join(f"{image_id}\n" for image_id in members)
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(plain)
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text(plain)
        for name, present in PRESENT.items():
            lines = [f"{image_id} {1 if IDS.index(image_id) in present else -1:2d}\n" for image_id in members]
            (tmp_path / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))
    return tmp_path


EXPECTED = np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]], np.uint8)


def test_reads_a_folder(voc: Path) -> None:
    folder = VOCFolder(voc)
    assert folder.classes == ("cat", "potted_plant", "train")
    assert folder.splits == ("train", "trainval", "val")
    assert (folder.ids("train"), folder.ids("val")) == (IDS[:2], IDS[2:])
    assert (folder.name, folder.root, folder.num_classes) == (voc.name, voc, 3)
    image, mask = folder.image(IDS[1]), folder.mask(IDS[1])
    assert (image.shape, image.dtype) == ((20, 31, 3), np.uint8)
    assert (mask.shape, mask.dtype, set(np.unique(mask))) == ((20, 31), np.uint8, {0, 1, 3})
    assert image.flags.writeable
    assert folder.parts(IDS[0]) is None
    np.testing.assert_array_equal(folder.image_labels(IDS), EXPECTED)


def test_a_plain_list_with_an_underscore_is_no_class(voc: Path) -> None:
    (voc / "ImageSets" / "Main" / "train_aug.txt").write_text("".join(f"{image_id}\n" for image_id in IDS))
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("".join(f"{i}\n" for i in IDS))
    folder = VOCFolder(voc)
    assert folder.classes == ("cat", "potted_plant", "train")
    assert folder.ids("train_aug") == IDS
    lines = "".join(f"{image_id} 1\n" for image_id in IDS)
    (voc / "ImageSets" / "Main" / "dog_train_aug.txt").write_text(lines)
    assert "dog" in VOCFolder(voc).classes


def test_classes_come_from_classes_txt_then_main_then_annotations(voc: Path) -> None:
    (voc / "classes.txt").write_text("train\ncat\npotted_plant\n")
    folder = VOCFolder(voc)
    assert folder.classes == ("train", "cat", "potted_plant")
    np.testing.assert_array_equal(folder.image_labels(IDS), EXPECTED[:, [2, 0, 1]])
    (voc / "classes.txt").unlink()
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    assert VOCFolder(voc).classes == ("cat", "potted_plant", "train")
    for path in (voc / "Annotations").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no class names: expected classes\.txt"):
        VOCFolder(voc)
    (voc / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="different class names, got cat more than once"):
        VOCFolder(voc)


def test_missing_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        VOCFolder(tmp_path / "nowhere")
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"missing JPEGImages; did you mean .*VOC2012"):
        VOCFolder(tmp_path)


def test_splits_and_ids_are_checked(voc: Path) -> None:
    folder = VOCFolder(voc)
    with pytest.raises(ValueError, match="no split 'test'; expected one of train, trainval, val"):
        folder.ids("test")
    path = voc / "ImageSets" / "Segmentation" / "val.txt"
    path.write_text("a\n../../etc/passwd\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 2: expected an image id"):
        folder.ids("val")
    path.write_text("a\n\na\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 3: image 'a' is already on line 1"):
        folder.ids("val")
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"val\.txt: expected text in UTF-8"):
        folder.ids("val")


def test_lists_elsewhere_may_name_files(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """SBD's train_aug: image and mask by their paths below the folder."""
    (voc / "SegmentationClassAug").mkdir()
    mask = np.full((20, 30), 3, np.uint8)
    Image.fromarray(mask).save(voc / "SegmentationClassAug" / f"{IDS[0]}.png")  # grey, as SBD's masks come
    path = tmp_path_factory.mktemp("lists") / "train_aug.txt"
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png" for i in IDS[:2]]
    path.write_text("\n".join(lines) + f"\nJPEGImages/{IDS[2]}.jpg\n")
    folder = VOCFolder(voc)
    assert folder.ids(str(path)) == IDS
    assert folder.mask_path(IDS[0]) == voc / "SegmentationClassAug" / f"{IDS[0]}.png"
    assert folder.image_path(IDS[0]).is_file() and folder.mask_path(IDS[2]).is_file()
    np.testing.assert_array_equal(folder.mask(IDS[0]), mask)
    assert VOCFolder(voc, masks="SegmentationClassAug").mask(IDS[0]).max() == 3
    for wrong in ("/JPEGImages/../../secret.jpg", "/JPEGImages/a.jpg ../m.png", "/JPEGImages/.jpg", "/.jpg"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"train_aug\.txt, line 1: expected"):
            folder.ids(str(path))
    with pytest.raises(FileNotFoundError):
        folder.ids(str(path.with_name("none.txt")))


def test_classes_of_a_file(voc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("classes") / "own.txt"
    path.write_text("train\npotted_plant\ncat\n")
    assert VOCFolder(voc, classes=path).classes == ("train", "potted_plant", "cat")
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file of class names"):
        VOCFolder(voc, classes=path.with_name("none.txt"))


def test_check_tells_what_can_be_used(voc: Path) -> None:
    folder = VOCFolder(voc)
    image = folder.image_path(IDS[0])
    whole = image.read_bytes()
    assert not check_images(folder, IDS, masks=True).lines() and not check_labels(folder, IDS)
    image.write_bytes(whole + b"\0" * 100)  # cameras append
    assert not check_images(folder, IDS, masks=True).lines()
    image.write_bytes(whole[:-40])
    found = check_images(folder, IDS, masks=True)
    assert list(found.images) == [IDS[0]] and not found.masks and "whole image file" in found.lines()[0]
    folder.mask_path(IDS[1]).write_bytes(b"none")
    (voc / "Annotations" / f"{IDS[2]}.xml").write_text("<annotation>")
    found = check_images(folder, IDS, masks=True)
    assert list(found.masks) == [IDS[1]] and list(check_labels(folder, IDS)) == [IDS[2]]


def test_damaged_images_and_masks_are_named(voc: Path) -> None:
    folder = VOCFolder(voc)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg: no such file"):
        folder.image("nothing")
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: no such file"):
        folder.mask("nothing")
    for path, read in ((folder.image_path(IDS[0]), folder.image), (folder.mask_path(IDS[0]), folder.mask)):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{path.name}: expected a whole image file"):
            read(IDS[0])
        path.write_bytes(b"no picture")
        with pytest.raises(ValueError, match=f"{path.name}: expected a whole image file, got 10 bytes"):
            read(IDS[0])
    write_label_png(folder.mask_path(IDS[0]), np.array([[0, 3, 4, 200, 255]], np.uint8))
    with pytest.raises(
        ValueError, match=r"\.png: expected labels 0\.\.3 and 255, got \[4, 200\] \(2 pixels\)"
    ):
        folder.mask(IDS[0])
    Image.new("RGB", (4, 4)).save(folder.mask_path(IDS[0]))
    with pytest.raises(ValueError, match="expected a palette or 8-bit grey PNG, got mode RGB"):
        folder.mask(IDS[0])


def test_grey_images_and_grey_masks_are_read(voc: Path) -> None:
    folder = VOCFolder(voc)
    Image.new("L", (4, 3), 77).save(folder.image_path(IDS[0]))
    assert folder.image(IDS[0]).shape == (3, 4, 3)
    Image.new("L", (4, 3), 2).save(folder.mask_path(IDS[0]))
    assert (folder.mask(IDS[0]) == 2).all()


def test_difficult_objects_count_and_part_names_do_not(voc: Path) -> None:
    (voc / "Annotations" / f"{IDS[0]}.xml").write_text(annotation("train", "train", difficult=1))
    np.testing.assert_array_equal(from_annotations(voc, IDS[:1], VOCFolder(voc).classes), [[0, 0, 1]])
    (voc / "ImageSets" / "Main" / "train_train.txt").write_text(f"{IDS[0]}  0\n{IDS[1]}  1\n")
    (voc / "ImageSets" / "Main" / "train_trainval.txt").unlink()
    np.testing.assert_array_equal(from_image_sets(voc, IDS[:1], ("cat", "train")), [[1, 1]])


def test_label_sources(voc: Path) -> None:
    classes = VOCFolder(voc).classes
    for source in ("auto", "main", "annotations"):
        labels = resolve_image_labels(voc, IDS, classes, source)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, EXPECTED)
    assert resolve_image_labels(voc, [], classes).shape == (0, 3)
    (voc / "Annotations" / f"{IDS[1]}.xml").unlink()
    np.testing.assert_array_equal(resolve_image_labels(voc, IDS, classes), EXPECTED)
    with pytest.raises(FileNotFoundError, match=rf"{IDS[1]}\.xml"):
        from_annotations(voc, IDS, classes)
    with pytest.raises(
        FileNotFoundError, match=r"no image-level labels for other: expected Annotations/other\.xml or"
    ):
        resolve_image_labels(voc, [*IDS, "other"], classes)
    with pytest.raises(FileNotFoundError, match="no class list names other"):
        from_image_sets(voc, ["other"], classes)
    with pytest.raises(FileNotFoundError, match="no list of class 'dog'"):
        from_image_sets(voc, IDS, ["dog"])
    with pytest.raises(ValueError, match=r"must be 'auto', 'main', 'annotations' or a .* file, got 'guess'"):
        resolve_image_labels(voc, IDS, classes, "guess")


def test_contradicting_lists_are_named(voc: Path) -> None:
    path = voc / "ImageSets" / "Main" / "cat_val.txt"
    path.write_text(f"{IDS[2]} 1\n")
    with pytest.raises(
        ValueError, match=r"cat_val\.txt, line 1: 2008_000003 has 1 here and -1 in another list"
    ):
        from_image_sets(voc, IDS, ["cat"])
    path.write_text(f"{IDS[2]} yes\n")
    with pytest.raises(ValueError, match=r"cat_val\.txt, line 1: expected an image id and -1, 0 or 1"):
        from_image_sets(voc, IDS, ["cat"])
    path.write_text("")
    (voc / "ImageSets" / "Main" / "cat_trainval.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"name 2008_000003, those of 'cat' \(.*\) do not"):
        from_image_sets(voc, IDS, VOCFolder(voc).classes)


def test_unknown_class_and_huge_annotation(voc: Path) -> None:
    path = voc / "Annotations" / f"{IDS[0]}.xml"
    path.write_text(annotation("dog"))
    with pytest.raises(ValueError, match=r"expected objects of cat, potted_plant, train; got 'dog'"):
        from_annotations(voc, IDS, VOCFolder(voc).classes)
    path.write_text("<annotation>" + " " * (5 << 20) + "</annotation>")
    with pytest.raises(ValueError, match="at most 4194304 bytes"):
        annotation_objects(path)


def test_summary_finds_problems(voc: Path) -> None:
    folder = VOCFolder(voc)
    clean = summarise(folder, decode=True)
    assert clean.problems == []
    path = folder.root / "Annotations" / f"{IDS[2]}.xml"
    whole = path.read_text()
    path.write_text(annotation("cat"))
    (problem,) = summarise(folder, decode=True).problems
    assert f"{IDS[2]}.png: shows potted_plant, which the image-level labels do not name" in problem
    assert summarise(folder).problems == []
    path.write_text("no XML")
    other = folder.root / "Annotations" / f"{IDS[0]}.xml"
    kept = other.read_text()
    other.write_text(annotation("zebra"))
    found = summarise(folder)
    assert [Path(line.split(": ")[0]).name for line in found.problems] == [f"{IDS[0]}.xml", f"{IDS[2]}.xml"]
    assert found.usable == {"train": 1, "trainval": 1, "val": 0}
    assert sum(found.class_images["trainval"]) > 0, "the others are counted"
    other.write_text(kept)
    path.write_text(whole)
    assert clean.usable == clean.images
    assert clean.images == {"train": 2, "trainval": 3, "val": 1}
    assert clean.class_images["trainval"] == [2, 1, 1]
    assert clean.overlap == {("train", "trainval"): 2, ("trainval", "val"): 1}
    folder.mask_path(IDS[0]).unlink()
    Image.new("L", (4, 3)).save(folder.mask_path(IDS[1]))
    path = folder.image_path(IDS[2])
    path.write_bytes(path.read_bytes()[:-200])
    problems = summarise(folder, decode=True).problems
    assert len(problems) == 3
    assert f"{IDS[0]}.png: no such file" in problems[0]
    assert "expected the image's (31, 20) pixels (width, height), got (4, 3)" in problems[1]
    assert "expected a whole image file" in problems[2]
    assert summarise(folder).problems == problems, "a truncated image shows in its last bytes"


def test_summary_command(voc: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "pssl.data", str(voc)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert "potted_plant" in done.stdout
    assert "train and val share no image" in done.stdout
    (voc / "JPEGImages" / f"{IDS[0]}.jpg").unlink()
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert f"{IDS[0]}.jpg: no such file" in done.stdout
    done = subprocess.run(
        [*command[:-1], str(voc / "no")], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a folder of pictures, found none" in done.stderr


def test_real_photographs(photographs: Path) -> None:
    folder = VOCFolder(photographs)
    assert len(folder.classes) == 20
    assert (folder.classes[0], folder.classes[18], folder.classes[19]) == ("aeroplane", "train", "tvmonitor")
    assert not set(folder.ids("train")) & set(folder.ids("val"))
    ids = folder.ids("val")[:40]
    labels = folder.image_labels(ids)
    for image_id, row in zip(ids, labels, strict=True):
        mask = folder.mask(image_id)
        assert folder.image(image_id).shape[:2] == mask.shape
        assert set(np.unique(mask)) - {0, 255} <= set(np.flatnonzero(row) + 1)
