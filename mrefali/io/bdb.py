"""EMAN2's bdb databases: images, headers, and headers written back. Imports errors and formats of ours only.

``bdb:DIR#NAME`` is the Berkeley DB file ``DIR/EMAN2DB/NAME.bdb``: a tree of pages whose records are pickles,
the number of an image -> its header; the pixels stand in other files. Tree and pickles are read without a native
library and without running anything that a file names (``btree``, ``eman_pickle``). A Berkeley DB binding only
writes, and only a new file, which then replaces the old one whole.
"""

import glob
import math
import os
import pickle
import re
import shutil
import struct
from array import array
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import mrcfile
import numpy as np

from mrefali.errors import InputError
from mrefali.io import eman_pickle, hdf, lock
from mrefali.io.btree import WRITTEN_VERSION, damaged, open_tree, write_tree
from mrefali.io.eman_pickle import (
    EMAN1_CTF,
    EMAN2_CTF,
    TRANSFORM,
    ByteString,
    Instance,
    check_instance,
)
from mrefali.io.journal import copy_name, recover
from mrefali.io.stack import FileStack
from mrefali.io.whole import check_writable, keep_owner, replacing, replacing_durably

#: What may follow the name, for messages.
SELECTIONS = "?0,3,4 or ?select.LIST or ?exclude.LIST"

#: EMAN2 has no larger whole number; keys, sizes and slots beyond it are damage.
LARGEST = 2**31 - 1


def is_bdb(path):
    """Whether ``path`` is the name of a database, not of a file."""
    return str(path)[:4].lower() == "bdb:"


class BdbStack(FileStack):
    """The images of one EMAN2 database, and their headers.

    Any database can be opened and listed; :meth:`require_alignable` refuses one that has holes, images of several
    sizes or pixels that are not there. Files are open only while a method runs, and for reading only except in
    :meth:`write_columns`.

    Parameters
    ----------
    path : str
        ``bdb:NAME`` or ``bdb:DIR#NAME``, then, to choose images, ``?0,3,4`` (these keys, in this order),
        ``?select.LIST`` or ``?exclude.LIST`` (the keys in record LIST of ``EMAN2DB/select.bdb``, here).

    Attributes
    ----------
    path : str
    n_images : int
    keys : (n_images,) int64
        EMAN2's number of each image; image i of every method is the one with ``keys[i]``.
    box : int or None, px
        None unless all images are square, two-dimensional and of one size.
    pixel_size_A : float or None
        ``apix_x`` of the first image; None if absent, or no length (NaN, infinite, 0 or below).

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
    InputError
        If the database is damaged, or has no images or not those asked for.
    """

    def __init__(self, path):
        self.path = str(path)
        self._file, self._name, selection = _parse(self.path)
        recover(os.path.realpath(self._file), self.path)
        self._load_index()
        self._selected = bool(selection)
        if selection:
            self._select(_selected_keys(self.path, selection, self.keys))
        self.n_images = len(self.keys)
        nx, ny, nz = self._sizes[0].tolist()
        self.box = nx if nx == ny and nz == 1 and (self._sizes == self._sizes[0]).all() else None
        self.pixel_size_A = hdf.pixel_size(self.header(0).get("apix_x"), f"key {self.keys[0]} of {self.path}")
        self._pixels_checked = False

    # --- where everything is

    def _load_index(self):
        """Note of every image its key, record, size, and where its pixels stand."""
        rows, slots, sources, count = array("q"), {}, {}, 0
        with open_tree(self._file, self._name) as tree:
            self._order, self._version, self._inner_names = tree.order, tree.version, tree.names
            for record, value, place in tree.records():
                size, key = _parse_key(self._file, record)
                if size:
                    slots.setdefault(size, {})[key] = _load_count(self._file, record, value)
                elif key == "maxrec":
                    count = max(count, _load_count(self._file, record, value) + 1)
                elif type(key) is int:
                    header = _load_header(self._file, record, value)
                    if "is_complex_x" in header:  # by this EMAN2 knows an image
                        rows.extend((key, place, *_describe(self._file, key, header, sources)))
        if not rows:
            raise InputError(self._explain_empty())
        table = np.array(rows, np.int64).reshape(-1, 8)
        table = table[np.argsort(table[:, 0], kind="stable")]
        self.keys, self._places, self._sizes = table[:, 0], table[:, 1], table[:, 2:5]
        self._is_complex, self._source, self._offset = table[:, 5] != 0, table[:, 6], table[:, 7]
        twice = np.flatnonzero(np.diff(self.keys) == 0)
        if twice.size or self.keys[0] < 0:
            raise damaged(self._file, f"image {self.keys[max(twice, default=0)]} is there twice or below 0")
        self._count = max(count, int(self.keys[-1]) + 1)
        self._place_slots(slots, sources)

    def _place_slots(self, slots, sources):
        """Turn the slots of images with pixels of their own into offsets, and ``sources`` into paths."""
        for i in np.flatnonzero(self._source < 0):
            size = tuple(self._sizes[i].tolist())
            slot = slots.get(size, {}).get(int(self.keys[i]))
            source = f"{self._name}_{'x'.join(map(str, size))}", False
            self._source[i] = sources.setdefault(source, len(sources))
            self._offset[i] = -1 if slot is None else min(slot * 4 * math.prod(size), 2**62)
        folder = os.path.dirname(self._file)
        self._sources = [(os.path.join(folder, name), is_mrcs) for name, is_mrcs in sources]

    def _explain_empty(self):
        pixels = glob.glob(glob.escape(self._file.removesuffix(".bdb")) + "_*x*x*")
        if pixels:
            return (f"{self.path} has no images, though there are pixels in {pixels[0]}: the program that wrote it "
                    f"was ended before it closed the database; write it again")
        return f"{self.path} has no images: give a database of at least one"

    def _select(self, rows):
        for name in ("keys", "_places", "_sizes", "_is_complex", "_source", "_offset"):
            setattr(self, name, getattr(self, name)[rows])

    # --- what alignment asks for

    def require_alignable(self):
        """Raise unless the images are numbered without holes, square, of one size, and their pixels are there.

        Raises
        ------
        FileNotFoundError, IsADirectoryError, PermissionError
            If a file of pixels cannot be read.
        InputError
        """
        if not self._selected and self._count != self.n_images:
            raise InputError(f"{self.path} has no image {_gaps(self.keys, self._count)} of 0 to {self._count - 1} "
                             f"(deleted?): choose among the others with {SELECTIONS} after the name")
        if self.box is None:
            raise InputError(self._explain_sizes())
        if self._is_complex.any():
            raise InputError(f"{self.path}: Fourier transforms (is_complex=1) under "
                             f"{_name_keys(self.keys[self._is_complex])}: give images in real space")
        self._check_pixels()

    def _explain_sizes(self):
        groups = Counter(map(tuple, self._sizes.tolist()))
        if len(groups) == 1:
            size = " x ".join(map(str, *groups))
            return f"{self.path} has images of {size} pixels: only square 2-D images can be used; pad or clip them"
        named = "; ".join(f"{' x '.join(map(str, size))} under "
                          f"{_name_keys(self.keys[(self._sizes == size).all(axis=1)])}"
                          for size, _ in groups.most_common(3))
        return (f"{self.path} has images of {len(groups)} sizes, {named}: choose those of one size with {SELECTIONS} "
                f"after the name")

    def _check_pixels(self):
        """Raise unless every image's pixels are there; asked once, for the files can be many."""
        if self._pixels_checked:
            return
        without = self._offset < 0
        if without.any():
            raise InputError(f"{self.path}: no pixels are noted for {_name_keys(self.keys[without])}: the database "
                             f"is damaged; leave them out, or restore it from a backup")
        for source in np.unique(self._source):
            rows = np.flatnonzero(self._source == source)
            path, is_mrcs = self._sources[source]
            last = rows[np.argmax(self._offset[rows])]
            with self._explain_pixel_file(path, rows):
                if is_mrcs:
                    have, need = self._count_mrcs(path), int(self._offset[last]) + 1
                else:
                    with open(path, "rb") as file:
                        have = os.fstat(file.fileno()).st_size
                    need = int(self._offset[last]) + 4 * self.box**2
            if have < need:
                raise InputError(f"{path} ends before the pixels of image {self.keys[last]} of {self.path}: it has "
                                 f"{have} {'images' if is_mrcs else 'bytes'}, {need} are needed; copy it again")
        self._pixels_checked = True

    @contextmanager
    def _explain_pixel_file(self, path, rows):
        """Have a pixel file's absence speak of the images it is needed for."""
        wanted = f"{path}, with the pixels of {_name_keys(self.keys[rows])} of {self.path},"
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"{wanted} does not exist: put it there again") from None
        except IsADirectoryError:
            raise IsADirectoryError(f"{wanted} is a directory: put the file there again") from None
        except PermissionError:
            raise PermissionError(f"{wanted} cannot be read: allow it with chmod") from None
        except (OSError, UnicodeError) as error:  # a name that no file can have, or a disk that fails
            raise InputError(f"{wanted} cannot be read: {error}") from None

    def _count_mrcs(self, path):
        with _open_mrcs(path) as images:
            if images.shape[1:] != (self.box, self.box):
                raise InputError(f"{path} has images of {images.shape[2]} x {images.shape[1]} pixels, but "
                                 f"{self.path} says {self.box} x {self.box}: put the file it was made from there")
            return len(images)

    # --- reading

    def _read(self, indices):
        """The images of these indices, which are there."""
        if self.box is None:
            raise InputError(self._explain_sizes())
        self._check_pixels()
        # raw pixels have the byte order of the machine that wrote them, as the tree's pages have
        pixels = np.empty((len(indices), self.box, self.box), f"{self._order}f4")
        for source in np.unique(self._source[indices]):
            rows = np.flatnonzero(self._source[indices] == source)
            path, is_mrcs = self._sources[source]
            read = self._read_mrcs if is_mrcs else self._read_raw
            with self._explain_pixel_file(path, indices[rows]):
                read(path, pixels, rows, self._offset[indices[rows]])
        return pixels.astype(np.float32, copy=False)

    def _read_raw(self, path, pixels, rows, offsets):
        with open(path, "rb", buffering=0) as file:
            for row, offset in zip(rows, offsets, strict=True):
                file.seek(offset)
                if file.readinto(pixels[row].view(np.uint8)) != pixels[row].nbytes:
                    raise InputError(f"{path} ends within an image of {self.path}: it was cut short after it was "
                                     f"opened; start again")

    def _read_mrcs(self, path, pixels, rows, numbers):
        with _open_mrcs(path) as images:
            pixels[rows] = images[numbers]

    def _headers(self, rows=slice(None)):
        """The header dicts of these rows, one after the other, as they stand in the database."""
        with open_tree(self._file, self._name) as tree:
            for key, place in zip(self.keys[rows].tolist(), self._places[rows].tolist(), strict=True):
                record, value = tree.record_at(place)
                if _parse_key(self._file, record) != (None, key):
                    raise InputError(f"{self.path} was changed by another program while it was in use: start again")
                yield _load_header(self._file, record, value)

    def header(self, index):
        """All headers of one image.

        Returns
        -------
        dict
            Numbers and strings as Python's, lists of numbers as arrays, transforms as ``(3, 4) float64``, CTFs as
            the strings that HDF files hold.
        """
        header, = self._headers(slice(index, index + 1))
        return {_public(name): _public(value) for name, value in header.items()}

    def header_names(self):
        """How many images have each header: name -> count, in order of first appearance."""
        counts = Counter()
        for header in self._headers():
            counts.update(map(_public, header))
        return dict(counts)

    def values(self, name):
        """One header of every image, one after another; None where an image lacks it."""
        for header in self._headers():
            yield _public(header.get(name))

    # --- writing headers back

    def write_back_obstacle(self):
        """Why no header of this database can be written here, in a few words; None if nothing is in the way."""
        if self._version != WRITTEN_VERSION:
            return (f"{self.path} has version {self._version} of the format, but Berkeley DB 5 writes version "
                    f"{WRITTEN_VERSION} only")
        if len(self._inner_names) > 1 or not self._inner_names[0].isprintable():
            return f"{self._file} holds the databases {', '.join(map(repr, self._inner_names))}, not one as EMAN2's"
        try:
            from berkeleydb import db
        except ImportError as error:
            return f"no Berkeley DB binding can be loaded ({error}): pip install 'mrefali[bdb]'"
        if db.version()[0] != 5:
            return (f"the Berkeley DB binding was built with version {'.'.join(map(str, db.version()))}: bdb files "
                    f"of EMAN2 need version 5")
        return None

    def check_writable(self, write_back="copy"):
        """Raise InputError or PermissionError if headers cannot be written back."""
        obstacle = self.write_back_obstacle()
        if obstacle is not None:
            raise InputError(f"headers of {self.path} cannot be written: {obstacle}")
        needed = os.path.getsize(self._file) if os.path.exists(self._file) else 0
        check_writable(os.path.realpath(self._file), self.path, needed, "a copy of it")

    def write_columns(self, columns, write_back="copy"):
        """Write headers back: a new database replaces the old one whole, all other records byte for byte the same.

        Parameters
        ----------
        columns : dict
            As for :meth:`mrefali.io.HdfStack.write_columns`.
        write_back : str
            Whatever it says, a database is replaced by a changed copy.

        Raises
        ------
        PermissionError
        InputError
            If a column is too long or short or cannot be stored, or the database cannot be written; found before
            anything is written.
        """
        stored = {name: [_stored(name, value) for value in hdf.encode_column(name, values, self.n_images)]
                  for name, values in columns.items()}
        self.check_writable()
        target = os.path.realpath(self._file)
        with lock.held(target, self.path):
            recover(target, self.path)
            with replacing_durably(target, copy_name(target)) as temporary:
                with open_tree(self._file, self._name) as tree:
                    write_tree(temporary, tree, self._updated(tree, stored))
                keep_owner(target, temporary)
                shutil.copymode(target, temporary)
        keys = self.keys
        self._load_index()
        self._select(np.searchsorted(self.keys, keys))

    def _updated(self, tree, columns):
        """Every ``key, value`` of the database, with these columns in the headers of our images."""
        rows = {int(key): row for row, key in enumerate(self.keys)}
        for record, value, _ in tree.records():
            size, key = _parse_key(self._file, record)
            row = rows.pop(key, None) if size is None and type(key) is int else None
            if row is not None:
                header = _load_header(self._file, record, value)
                kind = type(next(iter(header)))  # strings of the kind that the header's writer could read
                header.update((_as_kind(kind, name), _as_kind(kind, values[row])) for name, values in columns.items())
                value = eman_pickle.dump(header)
            yield record, value
        if rows:
            raise InputError(f"{self.path} has lost {_name_keys(list(rows))} while it was in use: headers were not "
                             f"written")


# --- new databases


class _NewTree(NamedTuple):
    """What :func:`mrefali.io.btree.write_tree` is to make."""

    name: str
    order: str = "<"
    page_size: int = 4096


def new_database(path):
    """``file, name`` of a database that can be made here under the name ``path``.

    Raises
    ------
    InputError, FileExistsError, FileNotFoundError
    """
    file, name, selection = _parse(str(path))
    if selection:
        raise InputError(f"{path} chooses images of a database that is yet to be made: leave out ?{selection}")
    if os.path.lexists(file):
        raise FileExistsError(f"{path} exists ({file}): give another name, or remove it first")
    folder = os.path.dirname(os.path.dirname(file))
    if not os.path.isdir(folder or "."):
        raise FileNotFoundError(f"{path} cannot be made: there is no folder {folder}, make it first")
    try:
        import berkeleydb  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path} cannot be made, no Berkeley DB binding can be loaded ({error}): pip install "
                         f"'mrefali[bdb]', or write an HDF file") from None
    return file, name


def write_bdb(path, pairs, box, pixel_size_A=None):
    """Make a new database as EMAN2 does, its pixels in a file beside it; image i under key i, in slot i.

    Parameters
    ----------
    path : str
        ``bdb:DIR#NAME``; must not exist.
    pairs : iterable of ((box, box) array, dict)
        Images and their headers, as for :func:`mrefali.io.write_images`.
    box : int, px
    pixel_size_A : float, optional
    """
    file, name = new_database(path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    headers, size = [], f"{box}x{box}x1"
    with replacing_durably(file) as temporary, replacing(f"{file.removesuffix('.bdb')}_{size}") as pixels:
        with open(pixels, "xb") as raw:
            for i, (image, header) in enumerate(pairs):
                raw.write(np.ascontiguousarray(image, "<f4").tobytes())
                stored = hdf._attributes(f"image {i} of {path}", image, header, pixel_size_A)
                headers.append(eman_pickle.dump({key: _stored(key, value) for key, value in stored.items()}
                                                | {"is_complex_x": 0}))
        write_tree(temporary, _NewTree(name), _records(headers, size))


def _records(headers, size):
    """``key, value`` of all records of a new database of images of one ``size``."""
    keys = [pickle.dumps(i, 2) for i in range(len(headers))]
    yield from zip(keys, headers, strict=True)
    yield from ((size.encode() + key, key) for key in keys)
    yield from ((pickle.dumps(name, 2), keys[-1]) for name in (size, "maxrec"))


# --- names and keys


def database_file(path):
    """The file of the database that the name ``path`` stands for."""
    return _parse(str(path))[0]


def _parse(path):
    """``file, name, selection`` that a name in the form ``bdb:DIR#NAME?SELECTION`` stands for."""
    place, mark, selection = path[4:].partition("?")
    folder, separator, name = place.rpartition("#" if "#" in place else "/")
    if not name or (mark and not selection):
        raise InputError(f"{path} names no database: give bdb:NAME or bdb:DIR#NAME, and, to choose images, "
                         f"{SELECTIONS} after it")
    folder = os.path.expanduser(folder) or ("/" if separator == "/" else ".")
    return os.path.join(folder, "EMAN2DB", f"{name}.bdb"), name, selection


def _selected_keys(path, selection, present):
    """The rows of the sorted keys ``present`` that ``?selection`` chooses, in its order."""
    verb, _, name = selection.partition(".")
    if verb in ("select", "exclude") and name:
        keys = _load_list(path, name)
        if verb == "exclude":
            rows = np.flatnonzero(~np.isin(present, keys))
            if not rows.size:
                raise InputError(f"{path} leaves out every image: choose at least one")
            return rows
    elif re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", selection):
        keys = [int(key) for key in selection.split(",")]
    else:
        raise InputError(f"{path}: ?{selection} is no choice of images: give {SELECTIONS}")
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        raise InputError(f"{path} asks for {_name_keys(twice)} more than once: name each key once")
    absent = np.setdiff1d(keys, present)
    if absent.size or not keys:
        raise InputError(f"{path} asks for {_name_keys(absent)}, but the database has images under "
                         f"{_name_keys(present)}")
    return np.searchsorted(present, keys)


def _load_list(path, name):
    """The keys in record ``name`` of the lists of keys that EMAN2 keeps in the current directory."""
    file = os.path.join(".", "EMAN2DB", "select.bdb")
    with open_tree(file, "select") as tree:
        for record, value, _ in tree.records():
            if _parse_key(file, record) == (None, name):
                keys = _load(file, record, value)
                if type(keys) is not list or not all(type(key) is int and 0 <= key <= LARGEST for key in keys):
                    raise InputError(f"{path}: record {name} of {file} is no list of keys: make it anew")
                return keys
    raise InputError(f"{path}: {file} has no record {name}: give {SELECTIONS}")


def _parse_key(file, record):
    """``size, key`` of a record: the size ``(nx, ny, nz)`` of a slot record, None of all others, and the plain key."""
    slot = re.match(rb"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})(?=\x80\x02)", record)
    if slot is None:
        return None, _load(file, record, record)
    key = _load(file, record, record[slot.end():])
    if type(key) is not int:
        raise damaged(file, f"record {record[:40]!r} is the slot of no image")
    return tuple(map(int, slot.groups())), key


def _name_keys(keys, most=10):
    """``key 3`` or ``keys 3, 4, 7 and 12 more``."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"key{'s' if len(keys) != 1 else ''} {', '.join(str(key) for key in keys[:most])}{more}"


def _gaps(keys, count, most=10):
    """The numbers below ``count`` that sorted ``keys`` leave out, as ``1, 5-9``."""
    edges = np.concatenate([[-1], keys, [count]])
    gaps = [(int(edges[i]) + 1, int(edges[i + 1]) - 1) for i in np.flatnonzero(np.diff(edges) > 1)]
    more = f" and {len(gaps) - most} more gaps" if len(gaps) > most else ""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in gaps[:most]) + more


# --- headers


def _load(file, record, value):
    """The plain value of the pickle ``value``; InputError, speaking of ``record``, if it is more or damaged."""
    try:
        return eman_pickle.load(value)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"{file}: record {record[:40]!r} cannot be read ({error}): the database is damaged, or not "
                         f"one of EMAN2 images; copy it again, or leave it") from None


def _load_count(file, record, value):
    number = _load(file, record, value)
    if type(number) is not int or not 0 <= number < LARGEST:
        raise damaged(file, f"record {record[:40]!r} is no number from 0 on")
    return number


def _load_header(file, record, value):
    header = _load(file, record, value)
    if type(header) is not dict:
        raise damaged(file, f"record {record[:40]!r} is no header")
    for name, held in header.items():
        nested = type(held) in (dict, tuple) or (type(held) is list and {list, dict, tuple} & set(map(type, held)))
        if nested or not isinstance(name, str):
            raise damaged(file, f"record {record[:40]!r} has a header that is no plain value")
    return header


def _describe(file, key, header, sources):
    """``nx, ny, nz, is_complex, source, offset`` of an image; a source of -1 is the database's own pixel file."""
    size = [header.get(name) for name in ("nx", "ny", "nz")]
    if not all(type(n) is int and 0 < n <= LARGEST for n in size) or not -1 < key < LARGEST:
        raise damaged(file, f"image {key} has the size {size}")
    is_complex = int(bool(header.get("is_complex")))
    if "data_path" not in header:
        return *size, is_complex, -1, 0
    place, number = _public(header["data_path"]), header.get("ptcl_source_coord_id")
    name, star, offset = place.rpartition("*") if isinstance(place, str) and "\0" not in place else ("", "", "")
    if star and re.fullmatch("[0-9]{1,18}", offset):
        source, offset = (name, False), int(offset)
    elif offset.endswith(".mrcs") and type(number) is int and 0 <= number <= LARGEST:
        source, offset = (place, True), number
    else:
        raise InputError(f"{file}: image {key} has data_path={place!r} and ptcl_source_coord_id={number!r}: only "
                         f"FILE*OFFSET, or an .mrcs and the number of an image in it, can be read; correct them")
    return *size, is_complex, sources.setdefault(source, len(sources)), offset


def _public(value):
    """A header value as callers see it (:meth:`BdbStack.header`)."""
    if type(value) is ByteString:  # in Python 2 what EMAN2 put there were the bytes of UTF-8
        return value.encode("latin-1").decode("utf-8", "surrogateescape")
    if type(value) is list:
        return np.array(value) if value and all(type(item) in (int, float) for item in value) else value
    if type(value) is not Instance:
        return value
    if value.kind == TRANSFORM:
        return np.array(value.values).reshape(3, 4)
    with np.errstate(over="ignore"):  # what is beyond float32 is damage, and then infinite
        numbers = [np.format_float_positional(np.float32(number), trim="-") for number in value.values]
    if value.kind == EMAN1_CTF:
        return "O" + " ".join(numbers)
    n = int(value.values[9])
    return "E" + " ".join([*numbers[:9], ",".join(numbers[9:10 + n]), ",".join(numbers[10 + n:])])


def _stored(name, value):
    """A value that hdf made ready for EMAN2, an array, as it stands in a header dict."""
    if value.size > 1:
        return value.tolist()
    value = value.item()
    if name.startswith("xform."):
        return Instance(TRANSFORM, tuple(value))
    if type(value) is bytes:
        text = value.removesuffix(b"\0").decode("utf-8", "surrogateescape")
        if name == "ctf":
            return _parse_ctf(text)
        return text
    return value


def _parse_ctf(text):
    """The ``Instance`` that EMAN2's string for a CTF, as HDF files hold it, stands for."""
    kind = {"E": EMAN2_CTF, "O": EMAN1_CTF}.get(text[:1])
    try:
        ctf = Instance(kind, tuple(float(word) for word in text[1:].replace(",", " ").split()))
        check_instance(ctf)
    except ValueError:
        raise InputError(f"ctf={text!r} is no CTF: give a string as EMAN2 has it, E or O and numbers") from None
    return ctf


def _as_kind(kind, value):
    """``value``, if it is a string, as a string of ``kind``."""
    if type(value) is not str or kind is str:
        return value
    return ByteString(value.encode("utf-8", "surrogateescape"), "latin-1")


# --- the rest


@contextmanager
def _open_mrcs(path):
    """The images of an MRC stack, (n, ny, nx), not yet read, as long as the context lasts."""
    try:
        file = mrcfile.mmap(path)
    except ValueError as error:
        raise InputError(f"{path} is no sound MRC file ({error}): copy it again") from None
    with file:
        if file.data.dtype.kind not in "iuf":
            raise InputError(f"{path} has pixels of type {file.data.dtype}: give whole numbers or floats")
        yield file.data.reshape(-1, *file.data.shape[-2:])
