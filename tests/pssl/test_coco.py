"""COCO's layout: classes, lists, masks from polygons and run lengths, errors that name the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pssl.data import COCOFolder, open_folder
from pssl.data.outlines import decode_run_lengths, fill_polygon, parse_run_lengths
from pssl.data.summary import summarise
from pssl.scoring.thresholds import choose_threshold

NAMES = ["COCO_train2014_000000000009", "COCO_train2014_000000000025", "COCO_train2014_000000000030"]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images of 8 x 6 (width, height), the last without objects; categories 1, 3 and 90."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2014").mkdir()
    rng = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(
            tmp_path / f"train2014/{name}.jpg"
        )
    square = [1, 1, 4, 1, 4, 4, 1, 4]
    counts = [0, 6, 12, 6, 24]  # the first column, and the fourth
    things = [
        {"image_id": 9, "category_id": 90, "iscrowd": 0, "area": 9.0, "segmentation": [square]},
        {
            "image_id": 9,
            "category_id": 1,
            "iscrowd": 0,
            "area": 30.0,
            "segmentation": [[0, 0, 8, 0, 8, 3, 0, 3]],
        },
        {
            "image_id": 9,
            "category_id": 3,
            "iscrowd": 1,
            "area": 12,
            "segmentation": {"size": [6, 8], "counts": counts},
        },
        {
            "image_id": 25,
            "category_id": 3,
            "area": 1.0,
            "segmentation": [[0, 5, 1, 5, 1, 6, 0, 6], square],
        },
    ]
    content = {
        "images": [{"id": int(n[-3:]), "file_name": f"{n}.jpg", "height": 6, "width": 8} for n in NAMES],
        "annotations": things,
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 3, "name": "car"},
        ],
    }
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps(content))
    return tmp_path


def test_reads_a_folder(coco):
    folder = open_folder(coco)
    assert isinstance(folder, COCOFolder)
    assert folder.classes == ("person", "car", "toothbrush") and folder.splits == ("train2014",)
    assert folder.ids("train2014") == NAMES[:2], "images without objects are left out"
    np.testing.assert_array_equal(folder.image_labels(NAMES[:2]), [[1, 1, 1], [0, 1, 0]])
    assert folder.image(NAMES[0]).shape == (6, 8, 3) and folder.parts(NAMES[0]) is None
    expected = np.zeros((6, 8), np.uint8)
    expected[:, [0, 3]] = 2  # the crowd lies behind
    expected[:3] = 1  # the largest object
    expected[1:4, 1:4] = 3
    np.testing.assert_array_equal(folder.mask(NAMES[0]), expected)
    second = np.zeros((6, 8), np.uint8)
    second[5, 0] = second[1:4, 1:4] = 2
    np.testing.assert_array_equal(folder.mask(NAMES[1]), second)
    found = summarise(folder, decode=True)
    assert found.problems == [] and found.class_images == {"train2014": [1, 2, 1]}


def test_drawn_masks_choose_a_threshold(coco, tmp_path, quiet):
    """Of pseudo labels: masks without files are masks."""
    folder = open_folder(coco)

    def label(image_id, threshold):
        return torch.from_numpy(folder.mask(image_id) * np.uint8(abs(threshold - 0.35) < 0.01))

    path = tmp_path / "threshold.json"
    assert choose_threshold(label, folder, NAMES[:2], 9, 0.4, path, 1, quiet) == (0.35, 2)


def test_problems_are_named(coco, tmp_path):
    folder = COCOFolder(coco)
    with pytest.raises(ValueError, match="no split 'val2014'; annotations has train2014"):
        folder.ids("val2014")
    with pytest.raises(FileNotFoundError, match="no annotation file names image 'x'"):
        folder.mask("x")
    path = coco / "train2014" / f"{NAMES[1]}.jpg"
    path.write_bytes(path.read_bytes()[:-50])
    (problem,) = summarise(folder).problems
    assert f"{NAMES[1]}.jpg: expected a whole image file" in problem
    annotations = coco / "annotations/instances_train2014.json"
    text = annotations.read_text()
    annotations.write_text(text.replace("[0, 6, 12, 6, 24]", "[0, 6, 12, 6, 25]"))
    with pytest.raises(
        ValueError, match=rf"instances_train2014\.json: image {NAMES[0]}: run lengths: .* got 49"
    ):
        COCOFolder(coco).mask(NAMES[0])
    annotations.write_text(text.replace("[1, 1, 4, 1, 4, 4, 1, 4]", "[1, 1, 4, 1, 4]"))
    with pytest.raises(ValueError, match=rf"image {NAMES[0]}: polygon: expected pairs of numbers, got 5"):
        COCOFolder(coco).mask(NAMES[0])
    for broken, said in (
        (text[:-9], "Expecting"),
        (
            text.replace('"category_id": 3', '"category_id": 4'),
            "an annotation whose category_id 4 nothing has",
        ),
        (text.replace('"image_id": 9', '"image_id": 8'), "an annotation whose image_id 8 nothing has"),
        (text.replace('"file_name"', '"name"'), "an entry without 'file_name'"),
        ("[]", "list indices"),
    ):
        annotations.write_text(broken)
        with pytest.raises(
            ValueError, match=rf"instances_train2014\.json: expected COCO's instances, got.* {said}"
        ):
            COCOFolder(coco).ids("train2014")
    with pytest.raises(FileNotFoundError, match="not in COCO's layout"):
        COCOFolder(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"data\.labels: COCO's folder has 'auto' or a label file, got 'main'"
    ):
        open_folder(coco, labels="main")


def inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The even-odd rule, a pixel and an edge at a time."""
    mask = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            x, y, odd = column + 0.5, row + 0.5, False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
                if (y0 < y) != (y1 < y) and x > x0 + (y - y0) / (y1 - y0) * (x1 - x0):
                    odd = not odd
            mask[row, column] = odd
    return mask


def test_polygons_are_filled_by_pixel_centres():
    rng = np.random.default_rng(1)
    for _ in range(20):  # self-crossing, and reaching over the border
        points = rng.random((rng.integers(3, 9), 2)) * 16 - 3
        np.testing.assert_array_equal(fill_polygon(points, 9, 11), inside(points, 9, 11))
    assert fill_polygon(np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]]), 3, 5).sum() == 8
    assert not fill_polygon(np.array([[0.0, 0.0], [4.0, 4.0]]), 3, 5).any()


def test_run_lengths():
    # pycocotools.mask.encode of a 6 x 8 mask that is 1 in columns 0 and 3, and of one column of 300.
    assert parse_run_lengths("06<0<") == [0, 6, 12, 6, 24]
    assert parse_run_lengths("0\\9") == [0, 300]
    with pytest.raises(ValueError, match="expected characters"):
        parse_run_lengths("0 6")
    with pytest.raises(ValueError, match="ends within a number"):
        parse_run_lengths("0\\")
    assert decode_run_lengths([1, 2, 3], 2, 3).tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(ValueError, match="add up to 2 x 3, got 5"):
        decode_run_lengths([1, 2, 2], 2, 3)
