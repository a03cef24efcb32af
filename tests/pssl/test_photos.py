"""Photographs as people have them: folders for classes, tables, VOC and COCO without masks or lists."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pssl.config.data import FolderConfig
from pssl.data import VOCFolder, open_folder, write_label_png
from pssl.data.hashing import held_out, held_out_ids
from pssl.data.open import open_data
from pssl.data.pictures import load_image, pictures_in


def save(path, colour=(200, 40, 40), size=(20, 16), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **more)
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes in folders, among what systems leave behind."""
    root = tmp_path / "my photos"
    for number in range(6):
        save(root / "cat" / f"IMG {number}.JPG")
        save(root / "Hündin" / "summer" / f"ü{number}.png", (10, 200, 30))
    for name in (".DS_Store", "Thumbs.db", "._IMG 0.JPG", "notes.txt"):
        (root / "cat" / name).write_bytes(b"\x00\x05\x16\x07")
    save(root / "__MACOSX" / "cat" / "x.jpg")
    return root


def test_a_folder_for_each_class(photos):
    folder = open_folder(photos)
    assert folder.classes == ("Hündin", "cat") and "a folder for each of 2 classes" in folder.read_as
    ids = sorted(folder.ids("train") + folder.ids("val"))
    assert ids == sorted([f"cat__IMG {n}" for n in range(6)] + [f"Hündin__summer__ü{n}" for n in range(6)])
    assert set(folder.ids("val")) == held_out_ids(ids, 0.2) and not set(folder.ids("val")) & set(
        folder.ids("train")
    )
    labels = dict(zip(ids, folder.image_labels(ids).tolist(), strict=True))
    assert all(labels[i] == ([0, 1] if i.startswith("cat") else [1, 0]) for i in ids)
    assert folder.image("cat__IMG 0").shape == (16, 20, 3) and not folder.has_mask("cat__IMG 0")
    with pytest.raises(ValueError, match="no split 'test'; pictures without lists have train and val"):
        folder.ids("test")


def test_the_split_is_by_name_alone(photos):
    """Adding pictures moves none to the other side, and the order of the folder does not matter."""
    ids = [f"picture {n}" for n in range(400)]
    held = held_out_ids(ids, 0.2)
    assert 60 <= len(held) <= 100 and held == held_out_ids(ids[::-1], 0.2)
    assert held_out_ids(ids[:200], 0.2) == held & set(ids[:200])
    assert held_out("picture 0") == pytest.approx(0.7129868788535811), "another number would be another split"
    assert len(held_out_ids(["a", "b"], 0.01)) == 1 == len(held_out_ids(["a", "b"], 0.99))
    assert held_out_ids(ids, 0.0) == frozenset() == held_out_ids(["a"], 0.5)


TABLES = {
    "names.csv": "file,labels\na.jpg,cat;dog\nsub/b.png,dog\nc,\n",
    "bars.csv": "\ufefffile,labels\r\na.jpg, cat | dog \r\nsub/b.png,dog\r\nc.webp,\r\n",
    "columns.csv": "file,cat,dog\na.jpg,1,1\nsub/b.png,0,1\nc,0,0\n",
    "labels.json": json.dumps({"a.jpg": ["cat", "dog"], "sub/b.png": ["dog"], "c": []}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_table_of_labels(tmp_path, name, inside):
    root = tmp_path / "pictures"
    for file in ("a.jpg", "sub/b.png", "c.webp", "other.jpg"):
        save(root / file)
    table = (root / f"labels{name[-4:]}") if inside and name.endswith(".csv") else tmp_path / name
    table.write_bytes((TABLES[name] + ("gone.jpg,cat\n" if name == "names.csv" else "")).encode("utf-8"))
    folder = open_folder(root, **({} if table.parent == root else {"labels": str(table)}))
    ids = ["a", "c", "sub__b"]
    assert folder.classes == ("cat", "dog") and sorted(folder.ids("train") + folder.ids("val")) == ids
    assert folder.image_labels(ids).tolist() == [[1, 1], [0, 0], [0, 1]]
    assert any("1 pictures have no line, such as other.jpg" in note for note in folder.notes)
    if name == "names.csv":
        assert any("1 lines name no picture below" in note and "'gone.jpg'" in note for note in folder.notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg,cat\n", "line 1: expected a header"),
        ("file,labels\na.jpg\n", "line 2: expected 2 fields, got 1"),
        (
            "file,labels\na.jpg,cat\na.jpg,dog\n",
            "line 3: expected a file that stands on no other line, got 'a.jpg'",
        ),
        ("file,cat\na.jpg,yes\n", "line 2: expected 0 or 1 for each class, got 'yes'"),
        ("file,labels\n../a.jpg,cat\n", "expected files below"),
        ("file,labels\nnone.jpg,cat\n", "expected lines that name pictures below"),
        ("file,labels\na.jpg,Cat\nb.jpg,cat\n", "differ by case"),
        ("file,labels\na.jpg,background\n", "expected classes without the background"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, expected):
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / name)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=expected) as error:
        open_folder(tmp_path)
    assert "labels.csv" in str(error.value)


@pytest.mark.parametrize("text", ["[1]", '{"a.jpg": "cat"}', "{", "[" * 5000])
def test_a_wrong_json_table_is_named(tmp_path, text):
    save(tmp_path / "a.jpg")
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.json: expected"):
        open_folder(tmp_path)


def test_masks_may_be_there_for_some(photos, tmp_path):
    masks = tmp_path / "masks"
    (masks / "cat").mkdir(parents=True)
    write_label_png(masks / "cat" / "IMG 1.png", np.full((16, 20), 2, np.uint8))
    write_label_png(masks / "ü2.png", np.ones((16, 20), np.uint8))
    folder = open_folder(photos, masks=str(masks))
    having = [i for i in folder.ids("train") + folder.ids("val") if folder.has_mask(i)]
    assert sorted(having) == ["Hündin__summer__ü2", "cat__IMG 1"]
    assert folder.mask("cat__IMG 1").max() == 2 and folder.mask("Hündin__summer__ü2").max() == 1
    with pytest.raises(
        FileNotFoundError, match=r"data\.masks: expected a folder of masks, .*nowhere, found neither"
    ):
        open_folder(photos, masks="nowhere")


def test_same_names_stay_apart(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        save(tmp_path / "cat" / name)
    folder = open_folder(tmp_path)
    assert sorted(folder.ids("train") + folder.ids("val")) == ["cat__a.jpg", "cat__a.png", "cat__b"]


def test_a_folder_of_nothing_is_told_what_there_could_be(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"expected a folder for each class, or pictures with labels\.csv"):
        open_folder(tmp_path)
    save(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"expected labels\.csv or labels\.json"):
        open_folder(tmp_path, layout="table")


def test_voc_without_lists_and_masks(tiny_root, tmp_path):
    """Annotations or Main alone, other endings: what is there is read."""
    whole = VOCFolder(tiny_root)
    root = tmp_path / "voc"
    shutil.copytree(tiny_root / "JPEGImages", root / "JPEGImages")
    shutil.copytree(tiny_root / "Annotations", root / "Annotations")
    ids = sorted(path.stem for path in (root / "JPEGImages").iterdir())
    for path in list((root / "JPEGImages").iterdir())[::2]:
        path.rename(path.with_suffix(".JPEG"))
    folder = open_folder(root, held_out=0.3)
    assert folder.splits == ("train", "val") and "30% held out" in folder.read_as
    assert sorted(folder.ids("train") + folder.ids("val")) == ids
    present = [whole.classes[k] for k in range(whole.num_classes)]
    assert set(folder.classes) <= set(present) and not folder.has_mask(ids[0])
    assert all(np.array_equal(folder.image(i), whole.image(i)) for i in ids[:4])
    lists = root / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(ids[:5]))
    (lists / "val.txt").write_text("\n".join(ids[5:]))
    again = open_folder(root)
    assert again.splits == ("train", "val") and again.ids("train") == ids[:5]


def test_coco_with_boxes_or_categories_alone(tmp_path):
    save(tmp_path / "train2014" / "a.jpg")
    save(tmp_path / "train2014" / "b.jpg")
    entries = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4]},
        {"id": 2, "image_id": 2, "category_id": 9},
    ]
    images = [
        {"id": n, "file_name": f"{name}.jpg", "height": 16, "width": 20} for n, name in ((1, "a"), (2, "b"))
    ]
    content = {
        "images": images,
        "annotations": entries,
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps(content))
    folder = open_folder(tmp_path)
    assert folder.image_labels(["a", "b"]).tolist() == [[1, 0], [0, 1]] and not folder.has_mask("a")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_and_masks_are_turned_alike(tmp_path, orientation):
    """As stored, EXIF says how to show; a mask on the stored pixels is turned, one as shown stays."""
    shown = np.zeros((16, 20, 3), np.uint8)
    shown[:4, :6] = 255
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes that the orientation undoes
    stored = Image.fromarray(shown)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "cat" / "a.png"
    path.parent.mkdir()
    stored.save(path, exif=exif)
    assert np.array_equal(load_image(path), shown)
    mask = (shown[..., 0] > 0).astype(np.uint8)
    masks = tmp_path / "masks"  # beside the classes, and none of them
    masks.mkdir()
    write_label_png(masks / "a.png", mask)
    folder = open_data(FolderConfig(root=tmp_path, masks="masks"))
    assert folder.classes == ("cat",)
    assert np.array_equal(folder.mask("cat__a"), mask)
    if orientation >= 5:
        write_label_png(
            masks / "a.png", np.asarray(Image.fromarray(mask).transpose(Image.Transpose(undo[orientation])))
        )
        assert np.array_equal(folder.mask("cat__a"), mask)


def test_modes_of_pictures(tmp_path):
    ramp = np.arange(0, 65536, 2048, dtype=np.uint16).reshape(4, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(load_image(tmp_path / "deep.png")[..., 1], np.rint(ramp / 257).astype(np.uint8))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        name = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4)).save(name)
        assert load_image(name).shape == (4, 5, 3)
    Image.new("F", (5, 4)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif: expected a picture with colours or greys, got mode F"):
        load_image(tmp_path / "float.tif")
    wide = np.full((2, 2), 1 << 20, np.int32)
    Image.fromarray(wide).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"wide\.tif: expected greys of at most 16 bits"):
        load_image(tmp_path / "wide.tif")


def test_a_picture_is_told_by_its_content(tmp_path):
    save(tmp_path / "no ending", format="PNG")
    save(tmp_path / "wrong.txt", format="JPEG")
    (tmp_path / "real.txt").write_text("words")
    (tmp_path / "broken.jpg").write_text("words")
    assert [path.name for path in pictures_in(tmp_path)] == ["broken.jpg", "no ending", "wrong.txt"]


def test_a_picture_that_claims_too_much_is_named(tmp_path):
    """60,000 × 60,000 pixels in a file of bytes."""
    path = save(tmp_path / "bomb.png")
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"bomb\.png: expected a whole image file"):
        load_image(path)
