"""EMAN2's HDF5 stacks: pixels, headers, and headers written back. Imports geometry, errors and io of ours only.

Image i is the group ``/MDF/images/<i>``: its dataset ``image`` holds the pixels, its attributes
``EMAN.<name>`` the headers. EMAN2 reads neither 64-bit integers, nor booleans, nor strings that no NUL
ends, so all that is written here goes through :func:`_numbers`, :func:`_matrices` or :func:`_text`.
"""

import math
import os
import shutil
import traceback
from array import array
from contextlib import contextmanager

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5p, h5s, h5t

from mrefali.errors import InputError
from mrefali.geometry import CONVERTED_AT_ONCE, POSE, to_matrices
from mrefali.io import lock
from mrefali.io.hdf_headers import Datasets, MappedFile, alike, find_in_groups, only_member
from mrefali.io.journal import changing, copy_name, flocked, forget, recover
from mrefali.io.stack import FileStack
from mrefali.io.whole import UnfailingFile, check_writable, keep_owner, replacing_durably

#: A 3x4 matrix as EMAN2 stores it.
MATRIX = np.dtype([(f"{row}{column}", "<f4") for row in range(3) for column in range(4)])

#: HDF5's types of what EMAN2 stores, made once: to make or to translate that of a matrix takes 0.1 ms.
STORED_TYPES = {dtype: h5t.py_create(dtype) for dtype in map(np.dtype, ("<i4", "<f4", "<f8", MATRIX))}

#: Datasets without the time of their making, so that equal runs write equal files.
UNTIMED = h5p.create(h5p.DATASET_CREATE)
UNTIMED.set_obj_track_times(False)

#: Headers that EMAN2 keeps in double precision.
DOUBLE_HEADERS = ("apix_x", "apix_y", "apix_z")

#: Bytes that surely fit into the object header of a file of the first HDF5 version, which ends at 65,535 with
#: the attribute's name, type and shape.
COMPACT_BYTES = 65_000

#: Room asked for before headers are written, in bytes: for each image twice what two new headers take, and a little.
ROOM_AN_IMAGE, ROOM = 6_000, 50_000

#: Bits of the packed pixels that EMAN2 may write.
RENDERED_BITS = range(1, 33)

#: What HDF5 may remember of the structure of an open file.
CACHE_BYTES = 1 << 20

#: Images whose headers are looked at together.
SCANNED_AT_ONCE = 1024

#: Headers that bear upon the pixels, and the values with which these are those of one image, as they stand.
ORDINARY = {"nz": (None, 0, 1), "is_complex": (None, 0), "stored_renderbits": (None, 0)}


class HdfStack(FileStack):
    """The square 2-D images of one EMAN2 HDF5 file, and their headers.

    The file is open only while a method runs, so no lock is held in between.

    Parameters
    ----------
    path : str or path

    Attributes
    ----------
    path : str
    n_images : int
    keys : range
    box : int, px
    pixel_size_A : float or None
        ``apix_x`` of image 0 as it stands there (EMAN2 writes 1.0 where it does not know); None if absent, or no
        length (NaN, infinite, 0 or below).

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
    InputError
        If the file is no EMAN2 stack, or not one of square 2-D images of one size, numbered without holes.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        recover(os.path.realpath(self.path), self.path)
        with _open_images(self.path) as images:
            self.n_images = _count(self.path, images)
            # where the pixels of an image start in the file, -1 if only HDF5 can read them
            self._offsets = np.empty(self.n_images, np.int64)
            for first, boxes, offsets in _Scan(self.path, images, self.n_images).layouts():
                self.box = int(boxes[0]) if first == 0 else self.box
                self._offsets[first:first + len(offsets)] = offsets
                for i in np.flatnonzero(boxes != self.box):
                    raise InputError(f"image {first + i} of {self.path} is {boxes[i]} x {boxes[i]} pixels, image 0 is "
                                     f"{self.box} x {self.box}: all images of a stack must have one size")
            self.pixel_size_A = pixel_size(_header(h5g.open(images, b"0"), "apix_x"), f"image 0 of {self.path}")
        self.keys = range(self.n_images)

    def _read(self, indices):
        """The images of these indices, which are there."""
        pixels = np.empty((len(indices), self.box, self.box), np.float32)
        plain = self._offsets[indices] >= 0
        if plain.any():
            self._read_plain(pixels, indices, np.flatnonzero(plain))
        if not plain.all():
            with _open_images(self.path) as images:
                for row in np.flatnonzero(~plain):
                    _read_converted(self.path, images, indices[row], pixels[row])
        return pixels

    def _read_plain(self, pixels, indices, rows):
        """Fill ``rows`` of ``pixels`` straight from the file: ten times faster than through HDF5."""
        with open(self.path, "rb", buffering=0) as file:
            for row in rows:
                file.seek(self._offsets[indices[row]])
                if file.readinto(memoryview(pixels[row]).cast("B")) != pixels[row].nbytes:
                    raise InputError(f"{self.path} ends within image {indices[row]}: it was cut short after "
                                     f"it was opened; start again")

    def header(self, index):
        """All headers of one image.

        Returns
        -------
        dict
            Names without ``EMAN.``; numbers and strings as Python's, lists as arrays, transforms as
            ``(3, 4) float64``.
        """
        with _open_images(self.path) as images:
            group = h5g.open(images, b"%d" % index)
            return {name: _header(group, name) for name in _names(group)}

    def header_names(self):
        """How many images have each header: name -> count, in order of first appearance."""
        counts = {}
        with _open_images(self.path) as images:
            for i in range(self.n_images):
                for name in _names(h5g.open(images, b"%d" % i)):
                    counts[name] = counts.get(name, 0) + 1
        return counts

    def values(self, name):
        """One header of every image, one after another; None where an image lacks it."""
        with _open_images(self.path) as images:
            yield from _Scan(self.path, images, self.n_images).values(_key(name))

    def write_columns(self, columns, write_back="journal"):
        """Write headers back, into all images or none; the pixels and all other headers keep their bits.

        If that fails the file is as it was; if the process is killed, the file opens here with all old or all new
        headers (:mod:`mrefali.io.journal`).

        Parameters
        ----------
        columns : dict
            Name -> one value an image: whole numbers (stored as int32), floats (float32), strings; for names
            that start with ``xform.`` (n_images,) POSE or (n_images, 3, 4) matrices.
        write_back : str
            ``journal`` changes the file in place. With ``copy`` a changed copy takes its place, so that at no time any
            program can see half a change; mode, and owner where permitted, stay, other hard links keep the old headers.

        Raises
        ------
        PermissionError
        InputError
            If a column is too long or short or cannot be stored, the disk has no room, or another program has the file;
            found before anything is written.
        OSError
            If writing fails.
        """
        encoded = {name: encode_column(name, values, self.n_images) for name, values in columns.items()}
        target = os.path.realpath(self.path)
        with (_failing_in_one_line(f"headers could not be written into {self.path}, which is whole all the same"),
              self._held(write_back)):
            if write_back == "copy":
                with replacing_durably(target, copy_name(target)) as temporary:
                    shutil.copy2(target, temporary)
                    keep_owner(target, temporary)
                    with UnfailingFile(temporary, "r+") as file:
                        self._write_encoded(file, encoded)
                        file.check()
            else:
                with changing(target) as overlay:
                    self._write_encoded(overlay, encoded)

    def _write_encoded(self, changed, encoded):
        """Write headers into ``changed``, a copy of the file or an overlay over it."""
        with _open_images(self.path, "r+", changed) as images:
            if _count(self.path, images) != self.n_images:
                raise InputError(f"{self.path} was changed by another program while it was in use: start again")
            for i in range(self.n_images):
                group = h5g.open(images, b"%d" % i)
                for name, values in encoded.items():
                    _write_header(group, name, values[i])

    def write_back_obstacle(self):
        """None: nothing but permission and room is ever in the way of writing headers of an HDF stack."""

    def check_writable(self, write_back="journal"):
        """Raise PermissionError or InputError if headers cannot be written, or another program has the file."""
        with self._held(write_back):
            pass

    @contextmanager
    def _held(self, write_back):
        """Keep other programs from writing as long as the context lasts; the file is whole then."""
        target = os.path.realpath(self.path)
        if write_back == "copy":
            needed, purpose = os.path.getsize(target) if os.path.exists(target) else 0, "a copy of it"
        else:
            needed, purpose = ROOM + ROOM_AN_IMAGE * self.n_images, "a journal beside it"
        check_writable(target, self.path, needed, purpose)
        with lock.held(target, self.path):
            recover(target, self.path)
            with flocked(target, self.path):
                yield


def write_stack(path, images, headers=None, pixel_size_A=None):
    """Write a new stack as EMAN2 does, whole or not at all; a file of that name is replaced.

    Parameters
    ----------
    path : str or path
    images : (n_images, ny, nx) array
        Stored as float32.
    headers : list of dict, optional
        One an image, as :meth:`HdfStack.header` gives them. What describes the pixels (size, type,
        statistics) is computed anew, and how the source packed them (``stored_...``) is left out. Numbers,
        strings and transforms are stored as by :meth:`HdfStack.write_columns`, lists as float32; None is left
        out.
    pixel_size_A : float, optional
        Goes before the ``apix_x``, ``apix_y`` and ``apix_z`` of ``headers``.

    Raises
    ------
    FileNotFoundError, PermissionError
    InputError
    """
    path = os.fspath(path)
    images = np.asarray(images)
    if images.ndim != 3 or images.size == 0 or images.dtype.kind not in "iuf":
        raise InputError(f"{path} cannot hold {images.dtype} images of shape {images.shape}: give (n, ny, "
                         "nx) real numbers, at least one image of at least one pixel")
    headers = [{}] * len(images) if headers is None else headers
    if len(headers) != len(images):
        raise InputError(f"{len(headers)} headers for the {len(images)} images of {path}: give one for each")
    write_images(path, zip(images, headers, strict=True), pixel_size_A)


def write_images(path, pairs, pixel_size_A=None):
    """Write a new stack as :func:`write_stack` does, each image as it comes: none stays in memory.

    Parameters
    ----------
    path : str or path
    pairs : iterable of ((ny, nx) array, dict)
        Images and their headers.
    pixel_size_A : float, optional

    Raises
    ------
    FileNotFoundError, PermissionError
    InputError
    OSError
        If writing fails; then no file of that name is made, or the old one stays.
    """
    path = os.fspath(path)
    with _failing_in_one_line(f"{path} could not be written"), replacing_durably(path) as temporary:
        _write_images(path, temporary, pairs, pixel_size_A)
    forget(path)


def _write_images(path, temporary, pairs, pixel_size_A):
    """Write all of a stack that is to become ``path`` to the file ``temporary``.

    An attribute above 64 KiB (``members`` of some 16,000 particles) needs an object header of HDF5 1.8. A
    file opened with that as the lowest version gives it to the groups created then, and stays of version 0
    itself. These groups come last; all others are of the kind that EMAN2 makes.
    """
    large = []
    with _open_new(path, temporary) as (file, raw):
        group = file.create_group("MDF/images")
        i = -1
        for i, (image, header) in enumerate(pairs):
            raw.check()
            attributes = _attributes(f"image {i} of {path}", image, header, pixel_size_A)
            if max(value.nbytes for value in attributes.values()) > COMPACT_BYTES:
                large.append((i, image, attributes))
            else:
                _write_image(group.id, i, image, attributes)
        group.attrs["imageid_max"] = np.array([i], "<i4")
    if large:
        with _writing(temporary, "r+", ("v108", "v108")) as (file, _):
            group = file["MDF/images"]
            for i, image, attributes in large:
                _write_image(group.id, i, image, attributes)


def _write_image(images, index, image, attributes):
    """Add one image to the group ``images``."""
    group = h5g.create(images, b"%d" % index)
    dataset = h5d.create(group, b"image", h5t.IEEE_F32LE, h5s.create_simple(image.shape), UNTIMED)
    dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(image, np.float32))
    for name in sorted(attributes):
        _write_header(group, name, attributes[name])


def _attributes(where, image, header, pixel_size_A):
    """All headers of an image about to be written: name -> array ready for :func:`_write_header`."""
    values = {name: value for name, value in header.items()
              if value is not None and not name.startswith("stored_")}
    for stale in ("mean_nonzero", "sigma", "sigma_nonzero"):  # not every image has them
        values.pop(stale, None)
    if pixel_size_A is not None:
        values |= dict.fromkeys(DOUBLE_HEADERS, pixel_size_A)
    values |= _description(np.asarray(image, np.float32))
    return {name: _attribute(f"{name} of {where}", name, value) for name, value in values.items()}


def _description(image):
    """What EMAN2's headers say of the pixels of an image, (ny, nx) float32: size, type and statistics.

    Both standard deviations divide by one less than the number of pixels. A statistic that is not defined (a
    mean of no pixels) is left out.
    """
    pixels = image.astype(np.float64)
    nonzero = pixels[pixels != 0]
    description = {
        "nx": image.shape[1], "ny": image.shape[0], "nz": 1,
        "datatype": 7, "is_complex": 0, "is_complex_ri": 0, "all_int": int((pixels == np.rint(pixels)).all()),
        "minimum": pixels.min(), "maximum": pixels.max(), "mean": pixels.mean(),
        "square_sum": (pixels**2).sum(),
    }
    if pixels.size > 1:
        description["sigma"] = pixels.std(ddof=1)
    if nonzero.size > 0:
        description["mean_nonzero"] = nonzero.mean()
    if nonzero.size > 1:
        description["sigma_nonzero"] = nonzero.std(ddof=1)
    return description


def _attribute(what, name, value):
    """One header value as the array that is stored; ``what`` names it in errors."""
    if isinstance(value, str):
        return _text(what, value)
    if name.startswith("xform."):
        return _matrices(what, value)
    array = np.asarray(value)
    if array.ndim > 1 or array.size == 0:
        raise InputError(f"{what} has the shape {array.shape}: give a number, a string or a filled list")
    numbers = _numbers(what, name, np.atleast_1d(array))
    as_float = numbers.astype(np.float32)
    # a list of whole numbers is float32 in EMAN2; above 2^24 that rounds, where int32, read as well, does not
    return as_float if array.ndim == 1 and (as_float == numbers).all() else numbers


def encode_column(name, values, n_images):
    """A header of all images as ``n_images`` arrays ready for :func:`_write_header`."""
    if len(values) != n_images:
        raise InputError(f"{len(values)} values of {name} for {n_images} images: give one for each")
    if name.startswith("xform."):
        matrices = _matrices(name, values)
        if len(matrices) != n_images:
            raise InputError(f"{len(matrices)} values of {name} for {n_images} images: give one for each")
        return matrices[:, None]
    if all(isinstance(value, str) for value in values):
        return [_text(name, value) for value in values]
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"{name} has the shape {array.shape}: give one number or string for each image")
    return _numbers(name, name, array)[:, None]


def _numbers(what, name, array):
    """``array`` as int32 (whole numbers, booleans) or float32, or float64 where EMAN2 has that."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} holds values of type {array.dtype}: give numbers, strings or a transform")
    if name in DOUBLE_HEADERS:
        return array.astype(np.float64)
    if array.dtype.kind == "f":
        limit, dtype = np.finfo(np.float32).max, np.float32
    else:
        limit, dtype = np.iinfo(np.int32).max, np.int32
    too_large = array[np.isfinite(array) & (np.abs(array.astype(np.float64)) > limit)]
    if too_large.size:
        raise InputError(f"{what} is {too_large[0]}: {np.dtype(dtype)}, in which EMAN2 keeps it, takes "
                         f"-{limit} to {limit}")
    return array.astype(dtype)


def _matrices(what, values):
    """``(n,) MATRIX`` from poses or 3x4 matrices, one or many."""
    if getattr(values, "dtype", None) == POSE:
        poses = np.atleast_1d(values)
        values = np.empty((len(poses), 3, 4), np.float32)
        for first in range(0, len(poses), CONVERTED_AT_ONCE):
            values[first:first + CONVERTED_AT_ONCE] = to_matrices(poses[first:first + CONVERTED_AT_ONCE])
    try:
        matrices = np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError):
        matrices = None
    if matrices is None or matrices.shape[-2:] != (3, 4):
        raise InputError(f"{what} is no transform: give poses or 3x4 matrices")
    return matrices.reshape(-1, 12).view(MATRIX)[:, 0]


def _text(what, value):
    """A string as a scalar array of bytes that a NUL ends."""
    if "\0" in value:
        raise InputError(f"{what} is {value!r}: a string with a NUL inside cannot be stored")
    data = value.encode("utf-8", "surrogateescape")
    return np.array(data, f"S{len(data) + 1}")


def _write_header(group, name, value):
    """Store one header: in place where type and shape agree with what is there, else anew."""
    key = _key(name)
    if value.dtype.kind == "S":
        htype = h5t.C_S1.copy()
        htype.set_size(value.itemsize)
        htype.set_strpad(h5t.STR_NULLTERM)
    else:
        htype = STORED_TYPES[value.dtype]
    if h5a.exists(group, key):
        attribute = h5a.open(group, key)
        if attribute.shape == value.shape and attribute.get_type().equal(htype):
            attribute.write(value, mtype=htype)
            return
        h5a.delete(group, key)
    space = h5s.create_simple(value.shape) if value.shape else h5s.create(h5s.SCALAR)
    h5a.create(group, key, htype, space).write(value, mtype=htype)


def _header(group, name):
    """One header of an image as a Python value (:meth:`HdfStack.header`), None if it is absent or empty."""
    return _value(group, _key(name))


def _value(group, key):
    """One attribute as a Python value, None if it is absent or empty."""
    if not h5a.exists(group, key):
        return None
    attribute = h5a.open(group, key)
    shape = attribute.shape
    if shape is None or 0 in shape:
        return None
    dtype, htype = _types(attribute.get_type())
    raw = np.empty(shape, dtype)
    attribute.read(raw, mtype=htype)
    if raw.size > 1:
        return raw
    value = raw.item()
    if dtype.names == MATRIX.names:
        return np.array(value, np.float64).reshape(3, 4)
    return _decoded(value) if isinstance(value, bytes) else value


def _decoded(data):
    """The string that bytes stand for; those that are no UTF-8 pass through and are written back as they were."""
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(group, name, where):
    """A header that must be a number, None if it is absent."""
    return single_number(_header(group, name), f"{name} of {where}")


def single_number(value, what):
    """``value``, a number or None; InputError, in which ``what`` names it, if it is anything else."""
    if value is None or isinstance(value, (int, float)):
        return value
    got = f"{value!r:.60}" if np.ndim(value) == 0 else f"{np.size(value)} values"
    raise InputError(f"{what} is {got}: it must be one number; write the file again with EMAN2")


def pixel_size(apix, where):
    """``apix``, the header apix_x of ``where``, as a length in A, None where it says nothing."""
    apix = single_number(apix, f"apix_x of {where}")
    return float(apix) if apix is not None and math.isfinite(apix) and apix > 0 else None


def _types(htype):
    """numpy's and HDF5's type to read an attribute of the type ``htype`` with."""
    for dtype, known in STORED_TYPES.items():
        if htype.equal(known):
            return dtype, known
    return htype.dtype, h5t.py_create(htype.dtype)


def _key(name):
    return b"EMAN." + name.encode("utf-8", "surrogateescape")


def _names(group):
    """The names of an image's headers."""
    keys = []
    h5a.iterate(group, keys.append)
    return [key.removeprefix(b"EMAN.").decode("utf-8", "surrogateescape") for key in keys if key.startswith(b"EMAN.")]


def _count(path, images):
    """The number of images; InputError unless they are numbered from 0 to ``imageid_max`` without a hole."""
    last = single_number(_value(images, b"imageid_max"), f"imageid_max of {path}")
    if last is None:
        raise InputError(f"{path} has no imageid_max on /MDF/images: it is no EMAN2 stack, or a damaged one; "
                         f"write it again with EMAN2")
    if not isinstance(last, int):
        raise InputError(f"imageid_max of {path} is {last}: it must be a whole number; write the file again with EMAN2")
    n_images = last + 1
    if n_images <= 0 or not images.get_num_objs():
        raise InputError(f"{path} has no images (imageid_max={n_images - 1}): give a stack of at least one")
    present = bytearray(min(n_images, images.get_num_objs() + 1))  # of more, the first hole is below that

    beyond = 0

    def note(name, _):
        nonlocal beyond
        i = _index(name)
        if i is not None and i < len(present):
            present[i] = True
        beyond += i is not None and i >= n_images

    images.links.iterate(note, info=True)
    if not all(present):
        raise InputError(f"{path} has no image {present.index(False)}, though imageid_max={n_images - 1}: images must "
                         f"be numbered without holes; copy the stack with EMAN2 to renumber it")
    if beyond > 0:
        raise InputError(f"{path} has {beyond} images beyond imageid_max={n_images - 1}: it is damaged; copy it again, "
                         f"or write it again with EMAN2")
    return n_images


def _index(name):
    """The number that an image's group of this name, bytes, has; None if it is none."""
    i = int(name) if name.isdigit() and len(name) <= 10 else None
    return i if name == b"%d" % (i or 0) else None


def _addresses(images, n_images):
    """Where the headers of images are in the file, (n_images,) int64; -1 where only HDF5 finds them."""
    addresses = array("q", [-1]) * n_images

    def note(name, link):
        i = _index(name)
        if i is not None and i < n_images and link.type == h5l.TYPE_HARD:
            addresses[i] = min(link.u, 2**63 - 1)

    images.links.iterate(note, info=True)
    return np.frombuffer(addresses, np.int64)


class _Scan:
    """The images of an open stack, a thousand at a time: read without HDF5 where that is safe, else with it.

    Parameters
    ----------
    path : str
    images : h5py.h5g.GroupID
    n_images : int
    """

    def __init__(self, path, images, n_images):
        self._path, self._images, self._file = path, images, MappedFile(path)
        self._addresses = _addresses(images, n_images) if self._file.readable else np.full(n_images, -1)
        self._attribute_types, self._pixel_types = {}, {}  # what HDF5 has said of descriptions

    def _batches(self):
        for first in range(0, len(self._addresses), SCANNED_AT_ONCE):
            yield first, self._addresses[first:first + SCANNED_AT_ONCE]
            self._file.forget()

    def values(self, key):
        """The attribute ``key`` of each image, as :func:`_value` gives it, one after another."""
        for first, addresses in self._batches():
            whole, (attributes,), _ = find_in_groups(self._file, addresses, [key])
            values, known = self._known_values(first, key, attributes, whole)
            for i in np.flatnonzero(~known):
                values[i] = _value(h5g.open(self._images, b"%d" % (first + i)), key)
            yield from values

    def _known_values(self, first, key, attributes, whole):
        """A list of values, and (n,) bool, which of them are known without asking HDF5."""
        values, known = [None] * len(whole), whole & (attributes.starts == 0)
        rows = np.flatnonzero(whole & (attributes.starts > 0))
        for same, description in alike(self._file, attributes.starts[rows], attributes.sizes[rows]):
            same = rows[same]
            if description not in self._attribute_types:
                group = h5g.open(self._images, b"%d" % (first + same[0]))
                self._attribute_types[description] = _plain_type(h5a.open(group, key))
            if self._attribute_types[description] is None:
                continue
            dtype, shape = self._attribute_types[description]
            n_bytes = dtype.itemsize * math.prod(shape)
            same = same[attributes.values[same] + n_bytes <= attributes.ends[same]]
            raw = self._file.take(attributes.values[same], n_bytes)
            for i, value in zip(same, _plain_values(raw, dtype, shape), strict=True):
                values[i] = value
            known[same] = True
        return values, known

    def layouts(self):
        """What :func:`_layout` says of each image, some at a time.

        Yields
        ------
        first : int
            Index of the first of these images.
        boxes, offsets : (n,) int64
        """
        for first, addresses in self._batches():
            plain, datasets = self._ordinary(first, addresses)
            boxes, offsets = np.full((2, len(addresses)), -1, np.int64)
            for rows, box, as_wanted in self._kinds_of_pixels(first, np.flatnonzero(plain), datasets):
                boxes[rows] = box
                if as_wanted:
                    offsets[rows] = datasets.offsets[rows]
                    odd = (offsets[rows] >= 0) & (datasets.sizes[rows] != 4 * box**2)
                    plain[rows[odd]] = False
            for i in np.flatnonzero(~plain):
                boxes[i], offsets[i] = _layout(self._path, self._images, first + i)
            yield first, boxes, offsets

    def _ordinary(self, first, addresses):
        """Which images are understood and need no unpacking, (n,) bool, and their ``Datasets``."""
        keys = [_key(name) for name in ORDINARY]
        plain, found, tables = find_in_groups(self._file, addresses, keys)
        for key, attributes, ordinary in zip(keys, found, ORDINARY.values(), strict=True):
            values, known = self._known_values(first, key, attributes, plain)
            plain &= known & [value is None or (np.isscalar(value) and value in ordinary) for value in values]
        datasets = Datasets(self._file, only_member(self._file, np.where(plain, tables, 0), b"image"))
        return plain & datasets.whole, datasets

    def _kinds_of_pixels(self, first, rows, datasets):
        """Rows whose pixels are alike, their box, and whether the pixels are native float32."""
        for of_shape, space in alike(self._file, *datasets.spaces[:, rows]):
            of_shape = rows[of_shape]
            for same, htype in alike(self._file, *datasets.types[:, of_shape]):
                same = of_shape[same]
                if (space, htype) not in self._pixel_types:
                    i = first + same[0]
                    dataset = h5d.open(h5g.open(self._images, b"%d" % i), b"image")
                    self._pixel_types[space, htype] = (_layout(self._path, self._images, i)[0],
                                                       dataset.get_type().equal(h5t.NATIVE_FLOAT))
                yield same, *self._pixel_types[space, htype]


def _plain_type(attribute):
    """numpy's type and the shape of an attribute whose bytes in the file are what numpy has; None of any other."""
    shape, htype = attribute.shape, attribute.get_type()
    if shape is None or 0 in shape:
        return None
    if isinstance(htype, h5t.TypeStringID) and not htype.is_variable_str() and htype.get_strpad() != h5t.STR_SPACEPAD:
        return np.dtype(f"S{htype.get_size()}"), shape
    return next(((dtype, shape) for dtype, known in STORED_TYPES.items() if htype.equal(known)), None)


def _plain_values(raw, dtype, shape):
    """What :func:`_value` makes of attributes of one ``_plain_type``; ``raw`` are their bytes, (n, n_bytes) uint8."""
    values = raw.view(dtype).reshape(len(raw), *shape)
    if math.prod(shape) > 1:
        return list(values)
    if dtype == MATRIX:
        return list(raw.view("<f4").astype(np.float64).reshape(-1, 3, 4))
    return [_decoded(value) for value in values.ravel().tolist()] if dtype.kind == "S" else values.ravel().tolist()


def _layout(path, images, index):
    """``box, offset`` of one image: its size in px, and where its pixels start in the file.

    The offset is -1 unless the pixels stand there as they are wanted, contiguous native float32.
    """
    where = f"image {index} of {path}"
    group = _open_member(h5g, images, b"%d" % index, where)
    if b"image" not in group:
        raise InputError(f"{where} has headers but no pixels: leave it out, or write it again with EMAN2")
    dataset = _open_member(h5d, group, b"image", where)
    *depth, ny, nx = (1, 1, *dataset.shape)
    n_slices = max(math.prod(depth), _number(group, "nz", where) or 1)
    if n_slices > 1:
        raise InputError(f"{where} is a volume of {n_slices} slices: give a stack of 2-D images")
    if _number(group, "is_complex", where):
        raise InputError(f"{where} is a Fourier transform (is_complex=1): give images in real space")
    if nx != ny:
        raise InputError(f"{where} is {nx} x {ny} pixels: only square images can be used; pad or clip them")
    htype = dataset.get_type()
    if htype.get_class() not in (h5t.FLOAT, h5t.INTEGER):
        raise InputError(f"{where} has pixels of type {htype.dtype}: give whole numbers or floats")
    plain = htype.equal(h5t.NATIVE_FLOAT) and not _number(group, "stored_renderbits", where)
    offset = dataset.get_offset() if plain else None  # None too where they lie in chunks, or nowhere yet
    return nx, -1 if offset is None else offset


def _read_converted(path, images, index, pixels):
    """Fill ``pixels``, (box, box) float32, from an image that HDF5 must convert, unpack or scale."""
    where = f"image {index} of {path}"
    group = h5g.open(images, b"%d" % index)
    dataset = h5d.open(group, b"image")
    bits = _number(group, "stored_renderbits", where)
    if not bits:
        dataset.read(h5s.ALL, h5s.ALL, pixels.reshape(dataset.shape))
        return
    low, high = (_number(group, name, where) for name in ("stored_rendermin", "stored_rendermax"))
    if low is None or high is None or bits not in RENDERED_BITS:
        raise InputError(f"{where} is compressed (stored_renderbits={bits}) but lacks stored_rendermin or "
                         f"stored_rendermax, or the bits are not 1 to 32: write it again with EMAN2")
    raw = np.empty(dataset.shape)
    dataset.read(h5s.ALL, h5s.ALL, raw)
    pixels[...] = (raw / (2**bits - 1) * (high - low) + low).reshape(pixels.shape)


def _open_member(kind, group, name, where):
    """The group (``kind`` h5g) or dataset (h5d) ``name``; InputError if it is of the other kind."""
    try:
        return kind.open(group, name)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where} is not a group with a dataset called image, as EMAN2's are: write it again with "
                         f"EMAN2") from None


@contextmanager
def _open_images(path, mode="r", instead=None):
    """The low-level group ``/MDF/images``, as long as the context lasts; of the file ``instead``, if there is one."""
    with _open_file(path, mode, instead) as file:
        try:
            images = file.get("MDF/images")
            if not isinstance(images, h5py.Group):
                raise InputError(f"{path} has no group /MDF/images: it is HDF5, but no EMAN2 stack")
            _keep_cache_small(file.id)
            yield images.id
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if mode != "r" or getattr(error, "errno", None) or not _comes_from_hdf5(error):
                raise
            raise InputError(f"{path} is damaged, HDF5 says: {_one_line(error)}; copy it again, or restore it from a "
                             f"backup") from None


def _keep_cache_small(file):
    """Have HDF5 remember 1 MB of an open file; left alone it came to hold 10 KB of each image ever opened."""
    config = file.get_mdc_config()
    config.set_initial_size = True
    config.initial_size = config.min_size = config.max_size = CACHE_BYTES
    config.incr_mode = config.flash_incr_mode = config.decr_mode = 0  # never of another size
    file.set_mdc_config(config)


def _comes_from_hdf5(error):
    """Whether h5py raised it, and not a line of ours, where it would be a bug."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return "h5py" in last.f_code.co_filename


def _open_file(path, mode, instead=None):
    """``h5py.File`` of a file that is there, with errors of one line in place of h5py's."""
    try:
        return h5py.File(instead or path, mode, libver="earliest")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a directory: give an HDF5 file") from None
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be opened ({os.strerror(error.errno)}): allow it with chmod "
                              f"or choose another file") from None
    except BlockingIOError:
        raise InputError(f"{path} is open in another program, which locked it: close it there and run again") from None
    except OSError as error:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an HDF5 file, nor of another format that is known (bdb, MRC, "
                             f"STAR, .cs, SPIDER, .npy): give one that EMAN2, RELION, cryoSPARC or SPIDER "
                             f"wrote") from None
        raise InputError(f"{path} cannot be opened, HDF5 says: {_one_line(error)}; copy it again if it is cut short or "
                         f"damaged") from None


@contextmanager
def _open_new(path, temporary):
    """``h5py.File`` and file of the new file ``temporary``; errors speak of ``path``, which it is to become."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory: give the name of a file to write")
    try:
        open(temporary, "wb").close()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}, make it "
                                f"first") from None
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be written: no new file is allowed in {folder} "
                              f"({os.strerror(error.errno)})") from None
    with _writing(temporary, "w", "earliest") as opened:
        yield opened


@contextmanager
def _writing(path, mode, libver):
    """``h5py.File`` and file of a file that is there; the disk's failure is raised when HDF5 has closed it."""
    with UnfailingFile(path, "r+") as raw:
        try:
            with h5py.File(raw, mode, libver=libver) as file:
                yield file, raw
        except Exception as error:
            if raw.failure not in (None, error):  # what came of it
                raise raw.failure from error
            raise
        raw.check()


@contextmanager
def _failing_in_one_line(what):
    """Have a failure of the disk, which HDF5 tells in many lines, begin with ``what`` and end with its reason."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py, where it cannot write the rest on closing
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else _one_line(error)
        if hasattr(error, "pending"):  # the journal that now counts
            raise OSError(f"headers could be written in part only: {reason}; {error.pending} holds the rest, which is "
                          f"written when any mrefali command next opens the stack") from error
        raise OSError(f"{what}: {reason}") from error


def _one_line(error):
    return " ".join(str(error).split())
