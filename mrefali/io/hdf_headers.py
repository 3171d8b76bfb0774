"""Object headers of HDF5's first version, read without HDF5, many side by side. Imports nothing of ours.

HDF5 takes 0.1 to 0.3 ms to open one image and one attribute of it; stepping through the headers of a thousand images
at once, one message of each at a time, takes some 0.01 ms an image. Only what is understood to the last byte is told: a
header with anything else in it (another version, a shared message, a place beyond the end of the file) is left to HDF5.
What a type or a shape is, HDF5 says too, once for each way of encoding it that occurs: :func:`alike` finds these.

Numbers of sections are those of the "HDF5 File Format Specification", version 1.1.
"""

import mmap

import numpy as np

#: Header messages (IV.A.2) that say where a header goes on, or what it is of.
NIL, SPACE, TYPE, OLD_FILL, FILL, LAYOUT, FILTERS, ATTRIBUTE, OLD_TIME, MORE, TABLE, TIME = KNOWN = (
    0, 1, 3, 4, 5, 8, 11, 12, 14, 16, 17, 18)

#: The same by kind, quicker to ask.
IS_KNOWN = np.zeros(1 << 16, bool)
IS_KNOWN[list(KNOWN)] = True

#: More messages than any image has; a damaged number of them must not keep us long.
MOST_MESSAGES = 1000

#: Continuations that a header may have named before they are read.
MOST_PENDING = 4


class MappedFile:
    """The bytes of a file, taken from many places at once; no more of it stays in memory than :meth:`forget` lets.

    Attributes
    ----------
    readable : bool
        Whether addresses are what they are in nearly every file: 8 bytes long, and counted from its beginning (III).
    """

    def __init__(self, path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.size = len(self._map)
        start = self._map[:32]
        self.readable = (len(start) == 32 and start[:9] == b"\x89HDF\r\n\x1a\n\0" and start[13:15] == b"\x08\x08"
                         and start[24:32] == bytes(8))

    def has(self, places, lengths):
        """Where so many bytes from a place on, (n,) int64 each, lie within the file."""
        return (places >= 0) & (lengths >= 0) & (lengths <= self.size) & (places <= self.size - lengths)

    def take(self, places, length):
        """(n, length) uint8 from places that :meth:`has` them."""
        windows = np.ndarray((max(0, self.size - length + 1), length), np.uint8, self._map, strides=(1, 1))
        return windows[places]

    def numbers(self, places, count):
        """(n, count) int64, of 8 bytes each; those that are too large for a place come out below 0."""
        return self.take(places, 8 * count).view("<i8")

    def forget(self):
        """Let go of what was looked at, which would count as memory of this process."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Headers:
    """The object headers at ``addresses``, (n,) int64, stepped through in :meth:`messages` (IV.A.1.a).

    Attributes
    ----------
    whole : (n,) bool
        Once the messages have been seen: which headers are understood. A caller may strike out others.
    """

    def __init__(self, file, addresses):
        self._file = file
        self.whole = file.has(addresses, np.full(len(addresses), 16))
        prefix = np.zeros((len(addresses), 16), np.uint8)
        prefix[self.whole] = file.take(addresses[self.whole], 16)
        self._left = prefix[:, 2:4].copy().view("<u2")[:, 0].astype(np.int64)
        self._place = addresses + 16
        self._end = self._place + prefix[:, 8:12].copy().view("<u4")[:, 0]
        self.whole &= (prefix[:, 0] == 1) & (self._left <= MOST_MESSAGES)
        self.whole &= file.has(self._place, self._end - self._place)
        self._pending = np.zeros((len(addresses), MOST_PENDING, 2), np.int64)
        self._n_pending = np.zeros(len(addresses), np.int64)

    def messages(self):
        """Step through the headers.

        Yields
        ------
        rows, kinds, starts, sizes : (m,) int64
            Of each header, by its row, that has a next message: its kind, and where its data are.
        """
        rows = np.flatnonzero(self.whole)
        while True:
            rows = self._enter_next_blocks(rows[self.whole[rows]])
            if not rows.size:
                return
            head = self._file.take(self._place[rows], 8)
            kinds, sizes = head[:, :4].copy().view("<u2").T.astype(np.int64)
            starts = self._place[rows] + 8
            self._left[rows] -= 1
            shared = head[:, 4] & 2 != 0
            self.whole[rows] = (IS_KNOWN[kinds] & ~shared & (sizes <= self._end[rows] - starts)
                                & (sizes % 8 == 0) & (self._left[rows] >= 0))
            self._place[rows] = starts + sizes
            self._note_continuations(rows[kinds == MORE], starts[kinds == MORE], sizes[kinds == MORE])
            good = self.whole[rows]
            yield rows[good], kinds[good], starts[good], sizes[good]

    def _enter_next_blocks(self, rows):
        """Move the rows at the end of their block to the next; the rows that have another message."""
        ended = self._place[rows] == self._end[rows]
        over = rows[ended & (self._n_pending[rows] == 0)]
        self.whole[over] &= self._left[over] == 0
        moving = rows[ended & (self._n_pending[rows] > 0)]
        self._n_pending[moving] -= 1
        start, size = self._pending[moving, self._n_pending[moving]].T
        self._place[moving], self._end[moving] = start, start + size
        cut = rows[~ended & (self._end[rows] - self._place[rows] < 8)]
        self.whole[cut] = False
        return rows[~(ended & (self._place[rows] == self._end[rows])) & self.whole[rows]]

    def _note_continuations(self, rows, starts, sizes):
        """Remember where headers go on (IV.A.2.q)."""
        good = self.whole[rows] & (sizes == 16) & (self._n_pending[rows] < MOST_PENDING)
        self.whole[rows[~good]] = False
        rows, blocks = rows[good], self._file.numbers(starts[good], 2)
        self.whole[rows] &= self._file.has(blocks[:, 0], blocks[:, 1]) & (blocks[:, 1] >= 8)
        self._pending[rows, self._n_pending[rows]] = blocks
        self._n_pending[rows] += 1


class Attributes:
    """Where one attribute of many objects is.

    Attributes
    ----------
    starts : (n,) int64
        Of what describes it (name, type and shape), 0 where the object has none of the name.
    sizes : (n,) int64
        Of that, in bytes.
    values, ends : (n,) int64
        Where its value begins, and where at the latest it ends.
    """

    def __init__(self, n):
        self.starts, self.sizes, self.values, self.ends = np.zeros((4, n), np.int64)


def find_in_groups(file, addresses, keys):
    """Attributes of groups, and where their symbol tables are.

    Parameters
    ----------
    file : MappedFile
    addresses : (n,) int64
        Of their object headers.
    keys : sequence of bytes
        Names of attributes.

    Returns
    -------
    whole : (n,) bool
        Which groups are understood; the rest of the answer is about those.
    attributes : list of Attributes
        One a key.
    tables : (n,) int64
        Where the message about the symbol table is, 0 without one.
    """
    headers = Headers(file, addresses)
    tables, found = np.zeros(len(addresses), np.int64), [Attributes(len(addresses)) for _ in keys]
    for rows, kinds, starts, sizes in headers.messages():
        is_table = kinds == TABLE
        at = rows[is_table]
        headers.whole[at[(sizes[is_table] != 16) | (tables[at] > 0)]] = False
        tables[at] = starts[is_table]
        is_attribute = kinds == ATTRIBUTE
        _find_attributes(file, headers, *(a[is_attribute] for a in (rows, starts, sizes)), keys, found)
    return headers.whole, found, tables


def _find_attributes(file, headers, rows, starts, sizes, keys, found):
    """Of one attribute a row, note those that have one of the names (IV.A.2.m, version 1)."""
    long_enough = sizes >= 8
    headers.whole[rows[~long_enough]] = False
    rows, starts, sizes = rows[long_enough], starts[long_enough], sizes[long_enough]
    head = file.take(starts, 8)
    lengths = head.view("<u2")[:, 1:].astype(np.int64)
    described = 8 + (-(-lengths // 8) * 8).sum(axis=1)
    good = (head[:, 0] == 1) & (head[:, 1] == 0) & (described <= sizes)
    headers.whole[rows[~good]] = False
    for key, attributes in zip(keys, found, strict=True):
        named = np.flatnonzero(good & (lengths[:, 0] == len(key) + 1))
        named = named[(file.take(starts[named] + 8, len(key)) == np.frombuffer(key, np.uint8)).all(axis=1)]
        at = rows[named]
        headers.whole[at[attributes.starts[at] > 0]] = False  # there twice
        attributes.starts[at], attributes.sizes[at] = starts[named], described[named]
        attributes.values[at], attributes.ends[at] = starts[named] + described[named], starts[named] + sizes[named]


def only_member(file, tables, name):
    """Addresses of the one thing in each group, (n,) int64; -1 unless the group has just that, called ``name``.

    ``tables`` are those of :func:`find_in_groups`. A group so small is one leaf of a tree (III.A.1) over one node of
    symbols (III.B), whose names are in a heap (III.D).
    """
    members = np.full(len(tables), -1, np.int64)
    rows = np.flatnonzero(tables > 0)
    trees, heaps = file.numbers(tables[rows], 2).T
    keep = file.has(trees, np.full(len(rows), 40)) & file.has(heaps, np.full(len(rows), 32))
    rows, trees, heaps = rows[keep], trees[keep], heaps[keep]
    leaf = np.frombuffer(b"TREE\0\0\1\0" + b"\xff" * 16, np.uint8)
    nodes = file.numbers(trees + 32, 1)[:, 0]
    keep = (file.take(trees, 24) == leaf).all(axis=1) & file.has(nodes, np.full(len(rows), 48))
    rows, nodes, heaps = rows[keep], nodes[keep], heaps[keep]
    names, objects = file.numbers(nodes + 8, 2).T
    size, _, data = file.numbers(heaps + 8, 3).T
    length = len(name) + 1
    keep = (file.take(nodes, 8) == np.frombuffer(b"SNOD\1\0\1\0", np.uint8)).all(axis=1)
    keep &= (file.take(nodes + 24, 4).view("<u4")[:, 0] < 2)  # no symbolic link
    keep &= (file.take(heaps, 8) == np.frombuffer(b"HEAP\0\0\0\0", np.uint8)).all(axis=1)
    keep &= file.has(data, size) & (names >= 0) & (size >= length) & (names <= size - length)
    rows, objects, names = rows[keep], objects[keep], data[keep] + names[keep]
    keep = (file.take(names, length) == np.frombuffer(name + b"\0", np.uint8)).all(axis=1)
    members[rows[keep]] = objects[keep]
    return members


class Datasets:
    """What the headers of datasets at ``addresses``, (n,) int64, say of their values.

    Attributes
    ----------
    whole : (n,) bool
        Which are understood; the rest is about those.
    spaces, types : (2, n) int64
        Where the description of shape and of type is, and how long.
    offsets : (n,) int64
        Where the values are if they lie in one piece (IV.A.2.i, version 3), else -1.
    sizes : (n,) int64
        Of that piece, in bytes.
    """

    def __init__(self, file, addresses):
        headers = Headers(file, addresses)
        n = len(addresses)
        self.spaces, self.types, layouts = np.zeros((3, 2, n), np.int64)
        for rows, kinds, starts, sizes in headers.messages():
            for kind, messages in ((SPACE, self.spaces), (TYPE, self.types), (LAYOUT, layouts)):
                at = rows[kinds == kind]
                headers.whole[at[messages[0, at] > 0]] = False  # there twice
                messages[:, at] = starts[kinds == kind], sizes[kinds == kind]
        self.whole = headers.whole & (self.spaces[0] > 0) & (self.types[0] > 0) & (layouts[1] >= 24)
        self.offsets, self.sizes = np.full((2, n), -1, np.int64)
        self._read_layouts(file, layouts[0])

    def _read_layouts(self, file, starts):
        rows = np.flatnonzero(self.whole)
        version, kind = file.take(starts[rows], 2).T
        self.whole[rows] = (version == 3) & (kind <= 2)  # compact, in one piece, or in chunks
        one_piece = rows[(version == 3) & (kind == 1)]
        raw = file.take(starts[one_piece] + 2, 16).view("<i8")
        there = raw[:, 0] != -1  # else never written
        self.whole[one_piece[there & ~file.has(raw[:, 0], raw[:, 1])]] = False
        self.offsets[one_piece], self.sizes[one_piece] = raw.T


def alike(file, starts, sizes):
    """Sort descriptions by what they say, byte for byte.

    Parameters
    ----------
    file : MappedFile
    starts, sizes : (n,) int64

    Yields
    ------
    rows : (m,) int64
    description : bytes
        Of all these rows.
    """
    left = np.arange(len(starts))
    while left.size:
        description = file.take(starts[left[:1]], int(sizes[left[0]]))
        same = sizes[left] == sizes[left[0]]
        same[same] = (file.take(starts[left[same]], description.size) == description).all(axis=1)
        yield left[same], description.tobytes()
        left = left[~same]
