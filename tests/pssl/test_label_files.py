"""Image-level labels from files: CSV, peers' cls_labels.npy read without unpickling, hostile files refused."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pssl.data import labels_from_file, write_label_csv
from pssl.data.inert_pickle import read_array_dict

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dining table", "dog")
IDS = ["2007_000032", "2008_000001"]
LABELS = np.array([[1, 0, 1], [0, 1, 0]], np.uint8)


def pickled(path: Path, value: object, protocol: int) -> Path:
    """What np.save writes for an object, in a protocol of choice (NumPy's own has changed)."""
    array = np.array(value, dtype=object)
    with path.open("wb") as stream:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(stream, header)
        pickle.dump(array, stream, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.dtype(">f4")])
def test_peers_dictionaries_are_read(tmp_path, protocol, dtype):
    value = {image_id: row.astype(dtype) for image_id, row in zip(IDS, LABELS, strict=True)}
    path = pickled(tmp_path / "cls_labels.npy", value, protocol)
    found = read_array_dict(path)
    assert list(found) == IDS
    for image_id in IDS:
        assert found[image_id].dtype == dtype
        np.testing.assert_array_equal(found[image_id], value[image_id])
    np.testing.assert_array_equal(labels_from_file(path, IDS[::-1], CLASSES), LABELS[::-1])


def test_as_numpy_saves_them_and_with_irns_numbers(tmp_path):
    np.save(tmp_path / "a.npy", {"2007_000032": np.array([1.0, 0, 1]), "x": np.eye(3)[1]})
    np.testing.assert_array_equal(labels_from_file(tmp_path / "a.npy", IDS[:1], CLASSES), LABELS[:1])
    numbers = {2007000032: LABELS[0], np.int32(2008000001): LABELS[1]}
    np.save(tmp_path / "irn.npy", numbers)
    np.testing.assert_array_equal(labels_from_file(tmp_path / "irn.npy", IDS, CLASSES), LABELS)
    np.save(tmp_path / "coco.npy", {9: LABELS[0], "000000000025": LABELS[1]})
    with pytest.raises(
        FileNotFoundError, match=r"coco\.npy: no image-level labels for COCO_train2014_000000000025"
    ):
        labels_from_file(tmp_path / "coco.npy", ["COCO_train2014_000000000025"], CLASSES)
    found = labels_from_file(tmp_path / "coco.npy", ["COCO_train2014_000000000009"], CLASSES)
    np.testing.assert_array_equal(found, LABELS[:1])
    np.save(tmp_path / "two.npy", {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3))})
    np.testing.assert_array_equal(read_array_dict(tmp_path / "two.npy")["a"], np.arange(6.0).reshape(2, 3))


class Runs:
    """Its pickle would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["value", "key", "inside", "whole"])
def test_hostile_files_are_refused_and_not_run(tmp_path, protocol, place):
    harm = Runs(tmp_path / "harm")
    value = {
        "value": {"a": harm},
        "key": {harm: np.ones(3)},
        "inside": {"a": np.array([harm, 1], dtype=object)},
        "whole": harm,
    }[place]
    path = pickled(tmp_path / "bad.npy", value, protocol)
    with pytest.raises(
        ValueError, match=r"bad\.npy: expected a dictionary of names and number arrays, refused"
    ):
        read_array_dict(path)
    assert not (tmp_path / "harm").exists()
    if place == "value":  # the same file does run when it is unpickled
        np.load(path, allow_pickle=True)
        assert (tmp_path / "harm").exists()


def npy(content: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    return stream.getvalue() + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a .npy file"),
        (b"\x93NUMPY\x09\x00", "refused format version"),
        (npy(b""), "expected a .npy file of one dictionary, got"),
        (npy(b"cos\nsystem\n(S'true'\ntR."), "refused a call of os.system"),
        (npy(b"cos\nsystem\n."), "refused the name os.system"),
        (npy(b"(dp0\n."), "refused a dict"),
        (npy(b"}."), "refused a dict"),
        (npy(b"}u."), "without a mark"),
        (npy(b"R."), "does not fit together"),
        (npy(b"h\x05."), "does not fit together"),
        (npy(b"\x80\x04\x95"), "expected a .npy file of one dictionary, got"),
        (npy(b"(ios\nsystem\n."), "refused the pickle instruction INST"),
        (npy(b"\x82\x01."), "refused the pickle instruction EXT1"),
        (npy(b"]2" * 50 + b"."), "refused the pickle instruction DUP"),
    ],
)
def test_broken_pickles_are_refused(tmp_path, content, message):
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.npy: .*{message}"):
        read_array_dict(tmp_path / "bad.npy")


def test_arrays_that_lie_about_themselves_are_refused(tmp_path):
    path = pickled(tmp_path / "a.npy", {"a": np.ones(3, np.float32)}, 4)
    whole = path.read_bytes()
    (tmp_path / "long.npy").write_bytes(whole.replace(b"K\x03\x85", b"K\x09\x85"))
    with pytest.raises(ValueError, match=r"refused an array \[9\] of 3 numbers"):
        read_array_dict(tmp_path / "long.npy")
    (tmp_path / "objects.npy").write_bytes(whole.replace(b"f4", b"O8"))
    with pytest.raises(ValueError, match="refused elements of 'O8'"):
        read_array_dict(tmp_path / "objects.npy")
    np.save(tmp_path / "plain.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"refused an array \[3\] of float64"):
        read_array_dict(tmp_path / "plain.npy")
    np.save(tmp_path / "wide.npy", {"a": np.ones(4)})
    with pytest.raises(ValueError, match=r"expected 3 values of 0 or 1 for image 'a', got \[4\]"):
        labels_from_file(tmp_path / "wide.npy", ["a"], CLASSES)
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.npy"):
            read_array_dict(tmp_path / "cut.npy")


@pytest.mark.parametrize(
    "text",
    [
        "image,cat,dining table,dog\n2007_000032,1,0,1\n2008_000001,0,1,0\n",
        "image,dog,cat,dining table\n2008_000001,0,0,1\n\n2007_000032,1,1,0\n",
        "\ufeffimage,classes\r\n2007_000032,cat; dog\r\n2008_000001,dining table\r\n",
    ],
)
def test_csv(tmp_path, text):
    (tmp_path / "labels.csv").write_bytes(text.encode())
    found = labels_from_file(tmp_path / "labels.csv", IDS, CLASSES)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected 'image,classes' or 'image' and the classes cat"),
        ("image,cat,dog\n", "line 1: expected"),
        ("image,cat,dining table,dog,cow\n", "unknown: cow"),
        ("image,cat,dining table,dog\na,1,2,0\n", "line 2: expected 0 or 1, got '2'"),
        ("image,cat,dining table,dog\na,1,0\n", "line 2: expected 4 fields, got 3"),
        ("image,classes\na,cow\n", "line 2: expected names of cat, dining table, dog, got 'cow'"),
        ("image,classes\na,cat\na,dog\n", "line 3: image 'a' stands there twice"),
        ("image,classes\na,\n", "no image-level labels for b"),
    ],
)
def test_wrong_csv_is_named(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"labels\.csv.*{message}"):
        labels_from_file(tmp_path / "labels.csv", ["a", "b"], CLASSES)


def test_csv_round_trip(tmp_path):
    write_label_csv(tmp_path / "out.csv", IDS, LABELS, CLASSES)
    np.testing.assert_array_equal(labels_from_file(tmp_path / "out.csv", IDS, CLASSES), LABELS)
    with pytest.raises(ValueError, match=r"expected image labels in a \.csv or \.npy file"):
        labels_from_file(tmp_path / "out.txt", IDS, CLASSES)


def test_the_command_converts(tiny_root, tmp_path):
    from pssl.data import VOCFolder

    folder = VOCFolder(tiny_root)
    ids = folder.ids("val")
    labels = folder.image_labels(ids)
    np.save(tmp_path / "cls_labels.npy", dict(zip(ids, labels.astype(np.float32), strict=True)))
    command = [sys.executable, "-m", "pssl.data", str(tiny_root), "--splits", "val"]
    command += ["--labels", str(tmp_path / "cls_labels.npy"), "--write-labels", str(tmp_path / "labels.csv")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    np.testing.assert_array_equal(labels_from_file(tmp_path / "labels.csv", ids, folder.classes), labels)
