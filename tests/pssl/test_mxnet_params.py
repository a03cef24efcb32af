"""MXNet's NDArray list files: read byte for byte as documented, and as MXNet wrote one; broken ones refused."""

import base64
import struct
import zlib

import numpy as np
import pytest

from pssl.models.mxnet_params import V1, V2, V3, read_params

# mx.nd.save of MXNet 1.9.1: numpy.random.RandomState(0).randn in this order, and integers; zlib, base 85.
WRITTEN_BY_MXNET = (
    "c-j+UWIzEdQ2OMr$v<IyCa4%Q4jS2riZc)GGajC?o7`7re>#ibL51hN{Ug1q{r@eB?UVjW?aN5Hy!VIYB|D7<VY@}DyX@mGJJ}yF_-V`S"
    "^w=);`YO9Ww)^dwM1%HadM&VHT^6-pKSlXKPq4cEM(<er_J6kfS2_zitkBrC-y_%BR$;CEJ{hAU_Me6K*mtdxvumAq(C)2k^8USDfA@DQ"
    "Zrb-rQo&BEYOej%=QHg$`ybnvdwkZuKW1(F)edjnFOYs~Khx%)_7f|Z_PcpM*f%qJ!Tvd%?)D~A&h4LmBXXaQZR&n8iDPyON0|11m7BgF"
    "79Na9VTA1O?0e7l1p3{!)3fTZoq2bb9ZWqFQur~U=>zeFcb?mtxbxsvWb@I(l?}-rMl`cvZV`miiACvF$@zI@hKcdzshQ~+CBiU?(h94j"
    "JoEV6{Iblv^!VJ=#5@ipJsF8PX~_J{ypm!70Bn|q"
)
# mx.nd.save of MXNet 1.9.1 under mx.util.np_shape(True), which writes v3: a 7 without dimensions, zeros((0, 3)),
# ones((2, 2)).
WRITTEN_WITH_NUMPY_SHAPES = (
    "c-j+UWIzGTQ2Nxb$v<IYs7f9<z~q>)=tEYEtPZA@39Fe6_Q)7!77vt8EK0YkN-fHdPsz;XMHeg1tV(4?6086Kzd;&V"
)


def body(array: np.ndarray) -> bytes:
    flag = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
    return struct.pack("<iii", 1, 0, flag[array.dtype.name]) + array.tobytes()


def version(magic: int, array: np.ndarray) -> bytes:
    storage = struct.pack("<i", 0) if magic in (V2, V3) else b""
    shape = struct.pack(f"<i{array.ndim}q", array.ndim, *array.shape)
    return struct.pack("<I", magic) + storage + shape + body(array)


def before_versions(array: np.ndarray) -> bytes:
    return struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape) + body(array)


def listed(arrays: list[bytes], names: list[bytes]) -> bytes:
    text = b"".join(struct.pack("<Q", len(name)) + name for name in names)
    head = struct.pack("<QQQ", 0x112, 0, len(arrays))
    return head + b"".join(arrays) + struct.pack("<Q", len(names)) + text


@pytest.fixture
def read(tmp_path):
    def call(data: bytes):
        (tmp_path / "a.params").write_bytes(data)
        return read_params(tmp_path / "a.params")

    return call


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 7,
    np.array([[1.5, -2.25]], np.float16),
    np.array([2**40, -1]),
    np.zeros((0, 3), np.float64),
]


@pytest.mark.parametrize("write", [lambda a: version(V1, a), lambda a: version(V2, a), before_versions])
def test_bytes_as_documented(read, write):
    names = [f"arg:p{n}" for n in range(len(ARRAYS))]
    found = read(listed([write(array) for array in ARRAYS], [name.encode() for name in names]))
    assert list(found) == names
    for array, expected in zip(found.values(), ARRAYS, strict=True):
        assert array.dtype == expected.dtype and array.flags.writeable
        np.testing.assert_array_equal(array, expected)


def test_versions_mix_and_empty_arrays_are_left_out(read):
    nothing_v2 = struct.pack("<Iii", V2, 0, 0)
    nothing_v3 = struct.pack("<Iii", V3, 0, -1)
    scalar_v3 = version(V3, np.array(3.0))
    arrays = [version(V1, ARRAYS[0]), nothing_v2, nothing_v3, scalar_v3]
    found = read(listed(arrays, [b"a", b"b", b"c", b"d"]))
    assert list(found) == ["a", "d"] and found["d"].shape == () and found["d"] == 3.0


def test_file_of_mxnet(read):
    found = read(zlib.decompress(base64.b85decode(WRITTEN_BY_MXNET)))
    random = np.random.RandomState(0)
    expected = {
        "arg:conv1a_weight": random.randn(2, 3, 3, 3).astype(np.float32),
        "aux:bn7_moving_mean": random.randn(4).astype(np.float32),
        "arg:half": random.randn(2, 2).astype(np.float16),
        "arg:ints": np.arange(3),
    }
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_file_of_mxnet_with_numpy_shapes(read):
    found = read(zlib.decompress(base64.b85decode(WRITTEN_WITH_NUMPY_SHAPES)))
    assert {name: (array.shape, array.tolist()) for name, array in found.items()} == {
        "arg:zero_dim": ((), 7.0),
        "arg:zero_size": ((0, 3), []),
        "arg:x": ((2, 2), [[1.0, 1.0], [1.0, 1.0]]),
    }


ONE = version(V2, np.ones((2, 2), np.float32))
HEAD = struct.pack("<QQ", 0x112, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at byte 0, expected 16 bytes of the header, got 0"),
        (b"PK" + bytes(30), "expected MXNet's NDArray list"),
        (HEAD + struct.pack("<Q", 1 << 60), "expected at most 0 arrays, got 1152921504606846976"),
        (listed([ONE], [b"a"])[:-30], r"expected 16 bytes of an array \[2, 2\] of float32, got"),
        (listed([ONE], [b"a"]) + b"x", "expected the end of the file, got 1 more bytes"),
        (listed([ONE, ONE], [b"a"]), "expected 2 different names, got 1 of 1"),
        (listed([ONE, ONE], [b"a", b"a"]), "expected 2 different names, got 1 of 2"),
        (listed([ONE], [b"\xff"]), "a name in UTF-8"),
        (
            listed([ONE], [b"a"])[:-9] + struct.pack("<Q", 99) + b"a",
            "expected at most 1 bytes of a name, got 99",
        ),
        (listed([struct.pack("<Ii", V2, 1) + ONE[8:]], [b"a"]), "expected a dense array .* storage type 1"),
        (
            listed([ONE[:8] + struct.pack("<iqq", 2, -1, 2) + ONE[28:]], [b"a"]),
            r"sides of at least 0, got \[-1, 2\]",
        ),
        (
            listed([ONE[:8] + struct.pack("<iqq", 2, 1 << 40, 1 << 40) + ONE[28:]], [b"a"]),
            "expected 48357.* bytes",
        ),
        (listed([ONE[:8] + struct.pack("<i", 99) + ONE[12:]], [b"a"]), "at most 32 dimensions, got 99"),
        (listed([ONE[:8] + struct.pack("<i", -7) + ONE[12:]], [b"a"]), "at most 32 dimensions, got -7"),
        (listed([ONE[:36] + struct.pack("<i", 12) + ONE[40:]], [b"a"]), "expected an element type of"),
    ],
)
def test_broken_files_are_named(read, data, message):
    with pytest.raises(ValueError, match=rf"a\.params: .*{message}"):
        read(data)


def test_every_truncation_is_an_error(read):
    whole = listed([ONE, before_versions(ARRAYS[1])], [b"arg:a", b"aux:b"])
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"a\.params"):
            read(whole[:length])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none there"):
        read_params(tmp_path / "none there")
