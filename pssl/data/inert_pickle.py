"""Reads the dictionary in a peer's ``cls_labels.npy`` without unpickling it.

Such a file is a NumPy array of one object, so its content is a pickle, a program that may import and call anything.
Here the program is only followed: names of functions stay names, calls stay notes of what would be called, and the
result is accepted if those notes describe a dictionary of plain number arrays, which NumPy is then asked for. Every
other instruction, name or shape is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_array_dict"]

MAX_BYTES = 256 << 20  # COCO's label file, 120k images of 80 classes, has 60 MB
_RECONSTRUCT = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
_SCALAR = {(f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")}
_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
}


@dataclass
class _Name:
    """A function or class that a pickle names; never looked up."""

    module: str
    name: str

    @property
    def pair(self) -> tuple[str, str]:
        return (self.module, self.name)


@dataclass
class _Call:
    """A call that a pickle asks for; never made. `state` is what it would set on the result."""

    function: _Name
    arguments: tuple
    state: Any = None


@dataclass
class _Dict:
    """A dictionary as pairs, so that nothing is hashed."""

    pairs: list[tuple[Any, Any]]


class _Refused(ValueError):
    pass


def read_array_dict(path: Path) -> dict[str | int, np.ndarray]:
    """The dictionary of a ``np.save(path, {name: array, ...})`` file: keys str or int, values arrays of numbers.

    Raises FileNotFoundError; ValueError, naming the file and what is refused, for anything that is not exactly that,
    such as a pickle that would import or call something else. Nothing in the file is ever run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes of labels, got {path.stat().st_size}")
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if header is None:
                raise _Refused(f"format version {version}")
            shape, _, dtype = header(stream)
            if shape != () or dtype != np.dtype(object):
                raise _Refused(f"an array {list(shape)} of {dtype}")
            content = _follow(stream.read())
        return _dictionary(_array(content))
    except _Refused as error:
        raise ValueError(
            f"{path}: expected a dictionary of names and number arrays, refused {error}"
        ) from None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected a .npy file of one dictionary, got: {error}") from None


def _follow(program: bytes) -> Any:
    """What the pickle would leave on the stack, with calls noted instead of made."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise _Refused("a pickle without a mark where one belongs")

    try:
        for code, argument, position in pickletools.genops(program):
            name = code.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                (result,) = stack
                return result
            if name == "MARK":
                stack.append(_MARK)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _VALUES:
                stack.append(argument)
            elif name in ("EMPTY_DICT", "DICT"):
                items = since_mark() if name == "DICT" else []
                stack.append(_Dict(list(zip(items[::2], items[1::2], strict=True))))
            elif name in ("EMPTY_LIST", "LIST"):
                stack.append(since_mark() if name == "LIST" else [])
            elif name == "EMPTY_TUPLE":
                stack.append(())
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                items = tuple(stack[-count:])
                if len(items) != count:
                    raise _Refused("a tuple of more than there is")
                stack[-count:] = [items]
            elif name in ("SETITEM", "SETITEMS"):
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _expect(stack[-1], _Dict).pairs.extend(zip(items[::2], items[1::2], strict=True))
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                _expect(stack[-1], list).extend(items)
            elif name == "GLOBAL":
                stack.append(_Name(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_Name(_expect(module, str), _expect(attribute, str)))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_Call(_expect(function, _Name), _expect(arguments, tuple)))
            elif name == "BUILD":
                state = stack.pop()
                _expect(stack[-1], _Call).state = state
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            else:
                raise _Refused(f"the pickle instruction {name} at byte {position}")
    except (IndexError, KeyError, AttributeError) as error:
        raise _Refused(f"a pickle that does not fit together ({type(error).__name__})") from None
    raise _Refused("a pickle without an end")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Refused(_describe(value))
    return value


def _describe(value: Any) -> str:
    if isinstance(value, _Call):
        return f"a call of {value.function.module}.{value.function.name}"
    if isinstance(value, _Name):
        return f"the name {value.module}.{value.name}"
    return f"a {type(value).__name__.lstrip('_').lower()}"


def _dictionary(content: Any) -> dict[str | int, np.ndarray]:
    found: dict[str | int, np.ndarray] = {}
    for key, value in _expect(content, _Dict).pairs:
        if isinstance(key, _Call) and key.function.pair in _SCALAR and len(key.arguments) == 2:
            key = int(np.frombuffer(_bytes(key.arguments[1]), _dtype(key.arguments[0]), 1)[0])
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise _Refused(f"a key that is {_describe(key)}")
        array = _array(value)
        if not isinstance(array, np.ndarray):
            raise _Refused(f"a value that is {_describe(array)}")
        found[key] = array
    return found


def _array(value: Any) -> Any:
    """The array that a noted call describes; for an array of one object, the object."""
    call = _expect(value, _Call)
    if call.function.pair not in _RECONSTRUCT or call.arguments[:1] != (_Name("numpy", "ndarray"),):
        raise _Refused(_describe(call))
    state = _expect(call.state, tuple)
    if len(state) != 5 or not isinstance(state[1], tuple) or not all(type(side) is int for side in state[1]):
        raise _Refused("an array without shape and content")
    _, shape, dtype, fortran, content = state
    if isinstance(content, list):
        if shape != () or len(content) != 1:
            raise _Refused("an array of objects")
        return content[0]
    flat = np.frombuffer(_bytes(content), _dtype(dtype))
    if min(shape, default=0) < 0 or flat.size != np.prod(shape, dtype=object):
        raise _Refused(f"an array {list(shape)} of {flat.size} numbers")
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def _dtype(value: Any) -> np.dtype:
    call = _expect(value, _Call)
    kind = call.arguments[0] if call.arguments else None
    order = call.state[1] if isinstance(call.state, tuple) and len(call.state) > 1 else "<"
    if call.function.pair != ("numpy", "dtype") or kind not in _NUMBERS or order not in ("<", ">", "|", "="):
        raise _Refused(f"elements of {kind!r} by {_describe(call)}")
    return np.dtype(("" if order == "=" else order) + kind)


def _bytes(value: Any) -> bytes:
    """Bytes, also as old protocols write them: a text to be encoded."""
    if isinstance(value, _Call) and value.function.pair == ("_codecs", "encode"):
        text, encoding = value.arguments
        if encoding == "latin1" and isinstance(text, str):
            return text.encode("latin1")
    if isinstance(value, str):  # Python 2's byte strings, which pickletools reads as latin-1
        return value.encode("latin1")
    return _expect(value, bytes)
