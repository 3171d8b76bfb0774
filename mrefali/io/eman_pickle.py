"""Pickles of EMAN2's headers, read and written without running anything. Imports nothing of ours.

Admitted are plain values and objects of three of EMAN2's classes, which stay the numbers they were made from.
"""

import struct
from typing import NamedTuple

NUMBERS = {ord(code): struct.Struct(layout) for code, layout in (("K", "<B"), ("M", "<H"), ("J", "<i"), ("G", ">d"))}

#: A writer of pickles marks at most so many items of a list or dict at a time.
BATCH = 1000


class Instance(NamedTuple):
    """An object of one of EMAN2's classes, as the numbers it was made from."""

    kind: tuple
    values: tuple


class ByteString(str):
    """A string of Python 2, whose bytes stand for the characters of latin-1; written back as it was."""


TRANSFORM, EMAN2_CTF, EMAN1_CTF = CLASSES = (
    ("libpyTransform2", "Transform"), ("libpyAligner2", "EMAN2Ctf"), ("libpyAligner2", "EMAN1Ctf"))


def check_instance(instance):
    """Raise ValueError unless EMAN2's class takes these numbers."""
    numbers = instance.values
    right = all(type(number) in (int, float) for number in numbers)
    if right and instance.kind == EMAN2_CTF:
        # nine parameters, then a count and as many values, twice
        first = numbers[9] if len(numbers) > 10 else -1
        right = first in range(len(numbers) - 10) and numbers[10 + int(first)] == len(numbers) - 11 - first
    elif right:
        right = len(numbers) == {TRANSFORM: 12, EMAN1_CTF: 11}.get(instance.kind)
    if not right:
        raise ValueError(f"{instance.kind} does not take {len(numbers)} such values")


def load(data):
    """The value of a pickle of protocol 2 made of plain values and :data:`CLASSES`.

    Nothing is imported or called, and no more memory is taken than a small multiple of ``data``.

    Raises
    ------
    ValueError, IndexError, KeyError, TypeError, struct.error
        If it is anything else.
    """
    return _Unpickler(data).load()


class _Unpickler:
    """The stack machine of pickles, without the codes that EMAN2's headers have no use for."""

    def __init__(self, data):
        self._data, self._at = data, 2
        self._stack, self._marks, self._memo = [], [], {}

    def load(self):
        data, stack, memo, actions = self._data, self._stack, self._memo, self.ACTIONS
        if data[:2] != b"\x80\x02":
            raise ValueError("no pickle of protocol 2")
        while (code := data[self._at]) != ord("."):
            self._at += 1
            if code == 0x71:  # nearly half of all codes
                memo[data[self._at]] = stack[-1]
                self._at += 1
            elif code in NUMBERS:
                stack += NUMBERS[code].unpack_from(data, self._at)
                self._at += NUMBERS[code].size
            elif code in actions:
                actions[code](self)
            else:
                raise ValueError(f"code {code:#04x} is none of a plain value")
        if self._at + 1 != len(data) or len(stack) != 1 or self._marks:
            raise ValueError("the pickle does not end where it should")
        return stack[0]

    def _take(self, n_bytes):
        """The next ``n_bytes`` bytes."""
        taken = self._data[self._at:self._at + n_bytes]
        if len(taken) != n_bytes:
            raise ValueError("it is cut short")
        self._at += n_bytes
        return taken

    def _take_index(self, n_bytes):
        return int.from_bytes(self._take(n_bytes), "little")

    def _read_text(self):
        self._stack.append(self._take(self._take_index(4)).decode("utf-8", "surrogatepass"))

    def _read_bytes(self, n_bytes):
        self._stack.append(ByteString(self._take(self._take_index(n_bytes)), "latin-1"))

    def _read_long(self):
        n_bytes = self._take_index(1)
        if n_bytes > 8:
            raise ValueError(f"it has a whole number of {n_bytes} bytes")
        self._stack.append(int.from_bytes(self._take(n_bytes), "little", signed=True))

    def _read_class(self):
        end = self._data.index(b"\n", self._data.index(b"\n", self._at) + 1)
        kind = tuple(self._take(end - self._at).decode("ascii").split("\n"))
        self._at += 1
        if kind not in CLASSES:
            raise ValueError(f"it asks for {'.'.join(kind)}: only {', '.join(name for _, name in CLASSES)} of EMAN2 "
                             f"are admitted")
        self._stack.append(kind)

    def _make_instance(self):
        arguments = self._stack.pop()
        kind = self._stack.pop()
        if kind not in CLASSES or type(arguments) is not tuple or type(arguments[0]) is not list:
            raise ValueError("it calls what is none of EMAN2's classes")
        instance = Instance(kind, tuple(arguments[0]))
        check_instance(instance)
        self._stack.append(instance)

    def _pop_marked(self):
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _pop(self, n_items):
        items = self._stack[-n_items:]
        del self._stack[-n_items:]
        return items

    def _extend(self, items):
        if type(self._stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self._stack[-1].extend(items)

    def _update(self, items):
        if type(self._stack[-1]) is not dict:
            raise ValueError("it sets items of what is no dict")
        self._stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _put(self, n_bytes):
        self._memo[self._take_index(n_bytes)] = self._stack[-1]

    def _get(self, n_bytes):
        self._stack.append(self._memo[self._take_index(n_bytes)])

    ACTIONS = {
        ord("X"): _read_text,
        ord("U"): lambda self: self._read_bytes(1),
        ord("T"): lambda self: self._read_bytes(4),
        ord("N"): lambda self: self._stack.append(None),
        0x88: lambda self: self._stack.append(True),
        0x89: lambda self: self._stack.append(False),
        ord("r"): lambda self: self._put(4),
        ord("h"): lambda self: self._get(1),
        ord("j"): lambda self: self._get(4),
        ord("("): lambda self: self._marks.append(len(self._stack)),
        ord("]"): lambda self: self._stack.append([]),
        ord("a"): lambda self: self._extend(self._pop(1)),
        ord("e"): lambda self: self._extend(self._pop_marked()),
        ord("}"): lambda self: self._stack.append({}),
        ord("s"): lambda self: self._update(self._pop(2)),
        ord("u"): lambda self: self._update(self._pop_marked()),
        ord("c"): _read_class,
        0x85: lambda self: self._stack.append((self._stack.pop(),)),
        ord("R"): _make_instance,
        0x8A: _read_long,
    }


def dump(header):
    """The pickle of a header dict, to the byte what Python 3 makes of it in protocol 2."""
    return _Pickler().dump(header)


class _Pickler:
    """Writes the codes that :class:`_Unpickler` reads."""

    def __init__(self):
        self._out, self._memo, self._n_remembered = [b"\x80\x02"], {}, 0

    def dump(self, header):
        self._out.append(b"}")
        self._remember(id(header))
        flat = [item for pair in header.items() for item in pair]
        self._batches(flat, 2, b"s", b"u")
        return b"".join(self._out) + b"."

    def _batches(self, items, step, one, many):
        """Items in marked batches; ``step`` of them belong together."""
        if len(items) == step:
            self._values(items)
            self._out.append(one)
            return
        for i in range(0, len(items), step * BATCH):
            self._out.append(b"(")
            self._values(items[i:i + step * BATCH])
            self._out.append(many)

    def _values(self, items):
        for item in items:
            if type(item) is float:
                self._out.append(b"G" + struct.pack(">d", item))
            elif item is None or type(item) is bool:
                self._out.append({None: b"N", True: b"\x88", False: b"\x89"}[item])
            elif type(item) is int:
                self._out.append(_pickle_int(item))
            elif not self._recall(id(item)):
                self._new_object(item)

    def _new_object(self, item):
        if type(item) is Instance:
            if not self._recall(item.kind):
                self._out.append("c{}\n{}\n".format(*item.kind).encode())
                self._remember(item.kind)
            self._list(item.values, id(item.values))
            self._out.append(b"\x85")
            self._remember(None)
            self._out.append(b"R")
            self._remember(id(item))
        elif type(item) is list:
            self._list(item, id(item))
        else:
            self._out.append(_pickle_string(item))
            self._remember(id(item))

    def _list(self, items, identity):
        self._out.append(b"]")
        self._remember(identity)
        self._batches(items, 1, b"a", b"e")

    def _remember(self, identity):
        """Number the object just written; one that comes again is then written as its number."""
        number = self._n_remembered
        self._n_remembered += 1
        self._memo[identity] = number
        self._out.append(_pickle_index(b"q", b"r", number))

    def _recall(self, identity):
        if identity not in self._memo:
            return False
        self._out.append(_pickle_index(b"h", b"j", self._memo[identity]))
        return True


def _pickle_index(short, long, number):
    return short + bytes([number]) if number < 256 else long + struct.pack("<I", number)


def _pickle_int(value):
    if 0 <= value < 2**8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 2**16:
        return b"M" + struct.pack("<H", value)
    if -2**31 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    n_bytes = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([n_bytes]) + value.to_bytes(n_bytes, "little", signed=True)


def _pickle_string(text):
    if type(text) is ByteString:
        data = text.encode("latin-1")
        return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data
