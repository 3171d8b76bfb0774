"""EMAN2's bdb databases: images, headers, and headers written back. Imports geometry, errors and hdf of ours only.

``bdb:DIR#NAME`` is the Berkeley DB file ``DIR/EMAN2DB/NAME.bdb``: a tree of pages whose records are pickles,
the number of an image -> its header; the pixels stand in other files. Tree and pickles are read here, without a
native library and without running anything that a file names. A Berkeley DB binding only writes, and only a new
file, which then replaces the old one whole.
"""

import glob
import math
import os
import re
import shutil
import struct
from array import array
from collections import Counter
from contextlib import closing, contextmanager
from typing import NamedTuple

import mrcfile
import numpy as np

from mrefali.errors import InputError
from mrefali.geometry import from_matrices
from mrefali.io import hdf

#: What may follow the name, for messages.
SELECTIONS = "?0,3,4 or ?select.LIST or ?exclude.LIST"

#: Versions of the btree format that are read here, and the one that Berkeley DB 5 writes.
READ_VERSIONS, WRITTEN_VERSION = (9, 10), 9

#: EMAN2 has no larger whole number; keys, sizes and slots beyond it are damage.
LARGEST = 2**31 - 1


def is_bdb(path):
    """Whether ``path`` is the name of a database, not of a file."""
    return str(path)[:4].lower() == "bdb:"


class BdbStack:
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
        ``apix_x`` of the first image; None if absent.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
    InputError
        If the database is damaged, or has no images or not those asked for.
    """

    def __init__(self, path):
        self.path = str(path)
        self._file, self._name, selection = _parse(self.path)
        self._load_index()
        self._selected = bool(selection)
        if selection:
            self._select(_selected_keys(self.path, selection, self.keys))
        self.n_images = len(self.keys)
        nx, ny, nz = self._sizes[0].tolist()
        self.box = nx if nx == ny and nz == 1 and (self._sizes == self._sizes[0]).all() else None
        apix = self.header(0).get("apix_x")
        self.pixel_size_A = float(apix) if isinstance(apix, (int, float)) else None
        self._pixels_checked = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Nothing is left open; ``with`` only marks where the stack is in use."""

    def __len__(self):
        return self.n_images

    # --- where everything is

    def _load_index(self):
        """Note of every image its key, record, size, and where its pixels stand."""
        rows, slots, sources, count = array("q"), {}, {}, 0
        with _open_tree(self._file, self._name) as tree:
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
            raise _damaged(self._file, f"image {self.keys[max(twice, default=0)]} is there twice or below 0")
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

    def read(self, start, stop):
        """Images ``start`` to ``stop`` (exclusive), ``(stop - start, box, box) float32``."""
        return self.read_at(np.arange(start, stop))

    def read_at(self, indices):
        """The images of these indices, ``(len(indices), box, box) float32``, in the order given."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_images:
            raise IndexError(f"images {indices.min()} to {indices.max()} of {self.path} asked for: "
                             f"it has 0 to {self.n_images - 1}")
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
        with _open_tree(self._file, self._name) as tree:
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

    def column(self, name):
        """One header of every image, a list as long as the stack; None where an image lacks it."""
        return [_public(header.get(name)) for header in self._headers()]

    def poses(self):
        """``(n_images,) POSE`` from ``xform.align2d``; InputError if an image has none."""
        matrices = self.column("xform.align2d")
        reset = f"mrefali header '{self.path}' --params=xform.align2d --zero"
        for key, matrix in zip(self.keys, matrices, strict=True):
            if matrix is None:
                raise InputError(f"image {key} of {self.path} has no xform.align2d: set it with {reset}")
            if np.shape(matrix) != (3, 4) or not np.isfinite(matrix).all():
                raise InputError(f"xform.align2d of image {key} of {self.path} is no transform of finite numbers: "
                                 f"reset it with {reset}")
        return from_matrices(matrices)

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

    def check_writable(self):
        """Raise InputError or PermissionError if headers cannot be written back."""
        obstacle = self.write_back_obstacle()
        if obstacle is not None:
            raise InputError(f"headers of {self.path} cannot be written: {obstacle}")
        target = os.path.realpath(self._file)
        for path in (target, os.path.dirname(target)):
            if not os.access(path, os.W_OK, effective_ids=True):
                raise PermissionError(f"{path} cannot be written to, but the headers of {self.path} have to be: allow "
                                      f"it with chmod u+w, or work on a copy")

    def write_columns(self, columns):
        """Write headers back: a new database replaces the old one whole, all other records byte for byte the same.

        Parameters
        ----------
        columns : dict
            As for :meth:`mrefali.io.HdfStack.write_columns`.

        Raises
        ------
        PermissionError
        InputError
            If a column is too long or short or cannot be stored, or the database cannot be written; found before
            anything is written.
        """
        stored = {name: [_stored(name, value) for value in hdf._column(name, values, self.n_images)]
                  for name, values in columns.items()}
        self.check_writable()
        target = os.path.realpath(self._file)
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name}.{os.getpid()}.part")
        try:
            with _open_tree(self._file, self._name) as tree:
                _write_tree(temporary, tree, self._updated(tree, stored))
            shutil.copymode(target, temporary)
            hdf._sync(temporary)
            os.replace(temporary, target)
        except BaseException:  # whatever ended it, half a database must not stay
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
        hdf._sync(folder)
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
                value = _pickle(header)
            yield record, value
        if rows:
            raise InputError(f"{self.path} has lost {_name_keys(list(rows))} while it was in use: headers were not "
                             f"written")


# --- names and keys


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
    with _open_tree(file, "select") as tree:
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
        raise _damaged(file, f"record {record[:40]!r} is the slot of no image")
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


class Instance(NamedTuple):
    """An object of one of EMAN2's classes, as the numbers it was made from."""

    kind: tuple
    values: tuple


class ByteString(str):
    """A string of Python 2, whose bytes stand for the characters of latin-1; written back as it was."""


TRANSFORM, EMAN2_CTF, EMAN1_CTF = CLASSES = (
    ("libpyTransform2", "Transform"), ("libpyAligner2", "EMAN2Ctf"), ("libpyAligner2", "EMAN1Ctf"))


def _load(file, record, value):
    """The plain value of the pickle ``value``; InputError, speaking of ``record``, if it is more or damaged."""
    try:
        return _unpickle(value)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"{file}: record {record[:40]!r} cannot be read ({error}): the database is damaged, or not "
                         f"one of EMAN2 images; copy it again, or leave it") from None


def _load_count(file, record, value):
    number = _load(file, record, value)
    if type(number) is not int or not 0 <= number < LARGEST:
        raise _damaged(file, f"record {record[:40]!r} is no number from 0 on")
    return number


def _load_header(file, record, value):
    header = _load(file, record, value)
    if type(header) is not dict:
        raise _damaged(file, f"record {record[:40]!r} is no header")
    for name, held in header.items():
        nested = type(held) in (dict, tuple) or (type(held) is list and {list, dict, tuple} & set(map(type, held)))
        if nested or not isinstance(name, str):
            raise _damaged(file, f"record {record[:40]!r} has a header that is no plain value")
    return header


def _describe(file, key, header, sources):
    """``nx, ny, nz, is_complex, source, offset`` of an image; a source of -1 is the database's own pixel file."""
    size = [header.get(name) for name in ("nx", "ny", "nz")]
    if not all(type(n) is int and 0 < n <= LARGEST for n in size) or not -1 < key < LARGEST:
        raise _damaged(file, f"image {key} has the size {size}")
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
        _check_instance(ctf)
    except ValueError:
        raise InputError(f"ctf={text!r} is no CTF: give a string as EMAN2 has it, E or O and numbers") from None
    return ctf


def _check_instance(instance):
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


def _as_kind(kind, value):
    """``value``, if it is a string, as a string of ``kind``."""
    if type(value) is not str or kind is str:
        return value
    return ByteString(value.encode("utf-8", "surrogateescape"), "latin-1")


# --- pickles

NUMBERS = {ord(code): struct.Struct(layout) for code, layout in (("K", "<B"), ("M", "<H"), ("J", "<i"), ("G", ">d"))}

#: A writer of pickles marks at most so many items of a list or dict at a time.
BATCH = 1000


def _unpickle(data):
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
        _check_instance(instance)
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


def _pickle(header):
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


# --- Berkeley DB's tree of pages

MAGIC = 0x053162
META, INTERNAL, LEAF, OVERFLOW = 9, 3, 5, 7  # types of page
INLINE, ELSEWHERE, DELETED = 1, 3, 0x80  # types of item: on the page, on pages of its own, and a mark on either
HAS_DATABASES = 0x20


@contextmanager
def _open_tree(path, name):
    """The :class:`_Tree` of the database ``name`` in the file ``path``, as long as the context lasts."""
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
        yield _Tree(path, file, name)


class _Tree:
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
            raise _damaged(path, f"a page size of {self.page_size}")
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
            raise _damaged(path, "no page is named for its database")
        self.name = name
        self._root = self._root_of(int.from_bytes(databases[name], "big"))

    def _unpack(self, layout, data, at):
        return struct.unpack_from(self.order + layout, data, at)

    def _read_page(self, number):
        if not 0 <= number < self._n_pages:
            raise _damaged(self._path, f"page {number} of {self._n_pages} is named")
        page = os.pread(self._file.fileno(), self.page_size, number * self.page_size)
        if len(page) != self.page_size or self._unpack("I", page, 8) != (number,):
            raise _damaged(self._path, f"page {number} is not where it should be")
        return page

    def _root_of(self, number):
        """The root page of the tree that the meta page ``number`` describes."""
        page = self._read_page(number)
        encryption, kind, meta_flags = page[24:27]
        if self._unpack("3I", page, 12) != (MAGIC, self.version, self.page_size) or kind != META:
            raise _damaged(self._path, f"page {number} describes no tree")
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
                raise _damaged(self._path, f"page {number} is out of its chain")
            before, (following,) = number, self._unpack("I", page, 16)
            offsets = self._offsets(page, number)
            if len(offsets) % 2:
                raise _damaged(self._path, f"page {number} has a key without a value")
            for i in range(0, len(offsets), 2):
                key_at, value_at = offsets[i:i + 2]
                if (page[key_at + 2] | page[value_at + 2]) & DELETED:
                    continue
                key = self._item(page, key_at, used)
                if key <= last_key:
                    raise _damaged(self._path, f"the keys of page {number} are out of order")
                last_key = key
                yield key, self._item(page, value_at, used), number * 2**16 + i
        if following:
            raise _damaged(self._path, f"page {following} is in no branch")

    def record_at(self, place):
        """The ``key, value`` at a place that :meth:`records` gave."""
        number, i = divmod(place, 2**16)
        page = self._read_page(number)
        offsets = self._offsets(page, number)
        if page[25] != LEAF or i + 1 >= len(offsets):
            raise _damaged(self._path, f"page {number} has changed")
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
                raise _damaged(self._path, f"page {number} is no branch or leaf of level {expected}")
            if kind == LEAF:
                yield number, page
            else:
                children = [self._unpack("I", page, at + 4)[0] for at in self._offsets(page, number)]
                waiting += [(child, level - 1) for child in reversed(children)]

    def _use(self, number, used):
        if not 0 < number < self._n_pages or number in used:
            raise _damaged(self._path, f"page {number} of {self._n_pages} is named, or named twice")
        used.add(number)

    def _offsets(self, page, number):
        """Where the items of a page start."""
        n_items, = self._unpack("H", page, 20)
        first = 26 + 2 * n_items
        offsets = self._unpack(f"{n_items}H", page, 26) if first <= self.page_size else [0]
        # the smallest item is a length, a type and one byte; one that names a page has 12 bytes
        smallest = 12 if page[25] == INTERNAL else 4
        if offsets and not first <= min(offsets) <= max(offsets) <= self.page_size - smallest:
            raise _damaged(self._path, f"the items of page {number} lie outside it")
        return offsets

    def _item(self, page, at, used):
        """The bytes of the item of a leaf that starts at ``at``."""
        if page[at + 2] == INLINE:
            end = at + 3 + self._unpack("H", page, at)[0]
            if end > self.page_size:
                raise _damaged(self._path, "an item runs beyond its page")
            return page[at + 3:end]
        if page[at + 2] != ELSEWHERE or at + 12 > self.page_size:
            raise _damaged(self._path, f"an item is of type {page[at + 2]}")
        number, length = self._unpack("2I", page, at + 4)
        pieces = []
        while number:
            self._use(number, used)
            part = self._read_page(number)
            number, (n_bytes,) = self._unpack("I", part, 16)[0], self._unpack("H", part, 22)
            if part[25] != OVERFLOW or 26 + n_bytes > self.page_size:
                raise _damaged(self._path, "a long item leaves its pages")
            pieces.append(part[26:26 + n_bytes])
        data = b"".join(pieces)
        if len(data) != length:
            raise _damaged(self._path, f"a long item has {len(data)} of {length} bytes")
        return data


def _write_tree(path, tree, records):
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


def _damaged(path, what):
    return InputError(f"{path} is damaged ({what}): copy it again, or restore it from a backup")
