"""The tree of pages that a Berkeley DB file is: read here, written by a binding. Imports errors of ours only."""

import os
import struct
from contextlib import closing, contextmanager

from mrefali.errors import InputError

#: Versions of the btree format that are read here, and the one that Berkeley DB 5 writes.
READ_VERSIONS, WRITTEN_VERSION = (9, 10), 9

MAGIC = 0x053162
META, INTERNAL, LEAF, OVERFLOW = 9, 3, 5, 7  # types of page
INLINE, ELSEWHERE, DELETED = 1, 3, 0x80  # types of item: on the page, on pages of its own, and a mark on either
HAS_DATABASES = 0x20


@contextmanager
def open_tree(path, name):
    """The :class:`Tree` of the database ``name`` in the file ``path``, as long as the context lasts."""
    try:
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a directory: give a database") from None
    except OSError as error:
        raise PermissionError(f"{path} cannot be opened ({error.strerror}): allow it with chmod or choose another "
                              f"database") from None
    with file:
        yield Tree(path, file, name)


class Tree:
    """The records of the one database in a Berkeley DB file, read page by page.

    A file can be damaged or forged: every page is used once, at the place that the others name, so that no walk
    takes longer or more memory than the file's size allows.

    Parameters
    ----------
    path : str
        What messages call it.
    file : open binary file
    name : str
        The database; a file that was copied or renamed keeps the old name of its only one, which is then taken.

    Attributes
    ----------
    name : str
    order : str
        ``<`` or ``>``, the byte order of the machine that wrote it.
    version, page_size : int
    names : list of str
        Of all databases in the file.
    """

    def __init__(self, path, file, name):
        self._path, self._file = path, file
        start = os.pread(file.fileno(), 512, 0)
        self.order = next((order for order in "<>" if start[12:16] == struct.pack(f"{order}I", MAGIC)), None)
        if self.order is None or len(start) < 512:
            raise InputError(f"{path} is no btree of Berkeley DB: give a database that EMAN2 wrote")
        self.version, self.page_size = self._unpack("2I", start, 16)
        if self.version not in READ_VERSIONS:
            raise InputError(f"{path} has version {self.version} of the btree format: only "
                             f"{' and '.join(map(str, READ_VERSIONS))} can be read")
        if self.page_size not in [2**k for k in range(9, 17)]:
            raise damaged(path, f"a page size of {self.page_size}")
        last, = self._unpack("I", start, 32)
        self._n_pages = last + 1
        n_here = os.fstat(file.fileno()).st_size // self.page_size
        if n_here < self._n_pages:
            raise InputError(f"{path} is cut short: it has {n_here} of {self._n_pages} pages; copy it again")
        self._root = self._root_of(0)
        databases = {record.decode("utf-8", "surrogateescape"): value for record, value, _ in self.records()}
        self.names = list(databases)
        if name not in databases:
            if len(databases) != 1:
                raise InputError(f"{path} holds {len(databases)} databases and none is called {name}: give one that "
                                 f"EMAN2 wrote")
            name, = databases
        if len(databases[name]) != 4:
            raise damaged(path, "no page is named for its database")
        self.name = name
        self._root = self._root_of(int.from_bytes(databases[name], "big"))

    def _unpack(self, layout, data, at):
        return struct.unpack_from(self.order + layout, data, at)

    def _read_page(self, number):
        if not 0 <= number < self._n_pages:
            raise damaged(self._path, f"page {number} of {self._n_pages} is named")
        page = os.pread(self._file.fileno(), self.page_size, number * self.page_size)
        if len(page) != self.page_size or self._unpack("I", page, 8) != (number,):
            raise damaged(self._path, f"page {number} is not where it should be")
        return page

    def _root_of(self, number):
        """The root page of the tree that the meta page ``number`` describes."""
        page = self._read_page(number)
        encryption, kind, meta_flags = page[24:27]
        if self._unpack("3I", page, 12) != (MAGIC, self.version, self.page_size) or kind != META:
            raise damaged(self._path, f"page {number} describes no tree")
        if encryption or meta_flags & 1 or self._unpack("I", page, 48) != (HAS_DATABASES,):
            raise InputError(f"{self._path} is encrypted, has checksums, or is of another kind than EMAN2's: give a "
                             f"database that EMAN2 wrote")
        return self._unpack("I", page, 88)[0]

    def records(self):
        """Every ``key, value, place`` in the order of the keys, two bytes and a place for :meth:`record_at`."""
        used = set()
        before, following, last_key = 0, None, b""
        for number, page in self._leaves(used):
            if self._unpack("I", page, 12) != (before,) or following not in (None, number):
                raise damaged(self._path, f"page {number} is out of its chain")
            before, (following,) = number, self._unpack("I", page, 16)
            offsets = self._offsets(page, number)
            if len(offsets) % 2:
                raise damaged(self._path, f"page {number} has a key without a value")
            for i in range(0, len(offsets), 2):
                key_at, value_at = offsets[i:i + 2]
                if (page[key_at + 2] | page[value_at + 2]) & DELETED:
                    continue
                key = self._item(page, key_at, used)
                if key <= last_key:
                    raise damaged(self._path, f"the keys of page {number} are out of order")
                last_key = key
                yield key, self._item(page, value_at, used), number * 2**16 + i
        if following:
            raise damaged(self._path, f"page {following} is in no branch")

    def record_at(self, place):
        """The ``key, value`` at a place that :meth:`records` gave."""
        number, i = divmod(place, 2**16)
        page = self._read_page(number)
        offsets = self._offsets(page, number)
        if page[25] != LEAF or i + 1 >= len(offsets):
            raise damaged(self._path, f"page {number} has changed")
        used = set()
        return self._item(page, offsets[i], used), self._item(page, offsets[i + 1], used)

    def _leaves(self, used):
        """Every ``number, page`` of the leaves below the root, from left to right."""
        waiting = [(self._root, None)]
        while waiting:
            number, expected = waiting.pop()
            self._use(number, used)
            page = self._read_page(number)
            level, kind = page[24:26]
            if kind not in (INTERNAL, LEAF) or (level == 1) != (kind == LEAF) or expected not in (None, level):
                raise damaged(self._path, f"page {number} is no branch or leaf of level {expected}")
            if kind == LEAF:
                yield number, page
            else:
                children = [self._unpack("I", page, at + 4)[0] for at in self._offsets(page, number)]
                waiting += [(child, level - 1) for child in reversed(children)]

    def _use(self, number, used):
        if not 0 < number < self._n_pages or number in used:
            raise damaged(self._path, f"page {number} of {self._n_pages} is named, or named twice")
        used.add(number)

    def _offsets(self, page, number):
        """Where the items of a page start."""
        n_items, = self._unpack("H", page, 20)
        first = 26 + 2 * n_items
        offsets = self._unpack(f"{n_items}H", page, 26) if first <= self.page_size else [0]
        # the smallest item is a length, a type and one byte; one that names a page has 12 bytes
        smallest = 12 if page[25] == INTERNAL else 4
        if offsets and not first <= min(offsets) <= max(offsets) <= self.page_size - smallest:
            raise damaged(self._path, f"the items of page {number} lie outside it")
        return offsets

    def _item(self, page, at, used):
        """The bytes of the item of a leaf that starts at ``at``."""
        if page[at + 2] == INLINE:
            end = at + 3 + self._unpack("H", page, at)[0]
            if end > self.page_size:
                raise damaged(self._path, "an item runs beyond its page")
            return page[at + 3:end]
        if page[at + 2] != ELSEWHERE or at + 12 > self.page_size:
            raise damaged(self._path, f"an item is of type {page[at + 2]}")
        number, length = self._unpack("2I", page, at + 4)
        pieces = []
        while number:
            self._use(number, used)
            part = self._read_page(number)
            number, (n_bytes,) = self._unpack("I", part, 16)[0], self._unpack("H", part, 22)
            if part[25] != OVERFLOW or 26 + n_bytes > self.page_size:
                raise damaged(self._path, "a long item leaves its pages")
            pieces.append(part[26:26 + n_bytes])
        data = b"".join(pieces)
        if len(data) != length:
            raise damaged(self._path, f"a long item has {len(data)} of {length} bytes")
        return data


def write_tree(path, tree, records):
    """Write a new Berkeley DB file like that of ``tree`` with these ``key, value`` pairs."""
    from berkeleydb import db

    try:
        with closing(db.DB()) as database:
            database.set_pagesize(tree.page_size)
            database.set_lorder(1234 if tree.order == "<" else 4321)
            database.open(path, tree.name, db.DB_BTREE, db.DB_CREATE | db.DB_EXCL)
            for key, value in records:
                database.put(key, value)
    except db.DBError as error:
        raise OSError(f"{path} cannot be written, Berkeley DB says: {error}; the database is as it was") from None


def damaged(path, what):
    return InputError(f"{path} is damaged ({what}): copy it again, or restore it from a backup")
