"""SPIDER's stacks and single images, read and written. Imports errors and io of ours.

All is float32, headers too. A stack has one header for the whole, then each image with a header of its own; a header
is as many rows of pixels as hold 1024 bytes. Pillow reads the format too, but neither pixel sizes nor which images of a
stack are in use.
"""

import os

import numpy as np

from mrefali.errors import InputError
from mrefali.io.mapped import map_file, read_rows
from mrefali.io.stack import ReadOnlyStack
from mrefali.io.whole import replacing_durably

#: Places in a header, from 0 (the manual counts from 1).
(NZ, NY, N_RECORDS, IFORM, HAS_STATISTICS, HIGHEST, LOWEST, MEAN, DEVIATION, NX, HEADER_RECORDS, HEADER_BYTES,
 RECORD_BYTES, IS_STACK, LAST_IMAGE, IMAGE_NUMBER, PIXEL_SIZE) = (
    0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 21, 22, 23, 25, 26, 37)

#: Numbers in a header that have a meaning, and the least bytes of a header.
N_WORDS, LEAST_BYTES = 256, 1024

#: IFORM of a two-dimensional image.
IMAGE = 1

#: The largest side of an image that is believed; any four bytes are some number.
LARGEST_BOX = 1 << 16


def header_order(data):
    """``<`` or ``>``, the byte order in which ``data`` is a SPIDER header of images; None if it is none."""
    for order in "<>":
        if len(data) < 4 * N_WORDS:
            return None
        words = np.frombuffer(data, f"{order}f4", N_WORDS)
        nx = words[NX]
        if 1 <= nx <= LARGEST_BOX and nx == int(nx) and words[IFORM] in (IMAGE, 3, -11, -12, -21, -22) and (
                words[HEADER_BYTES] == header_bytes(int(nx))):
            return order
    return None


def header_bytes(box):
    """The length of a header of images of so many pixels a row."""
    record = 4 * box
    return -(-LEAST_BYTES // record) * record


class SpiderStack(ReadOnlyStack):
    """The images of a SPIDER stack, or of a file of one image.

    Angles and shifts in its headers are those of projections in space, and not used.

    Parameters
    ----------
    path : str or path

    Attributes and errors are those of :class:`mrefali.io.stack.FileStack`.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            data, size = file.read(4 * N_WORDS), os.fstat(file.fileno()).st_size
        self._order = header_order(data)
        if self._order is None:
            raise InputError(f"{self.path} is no SPIDER file of images: give one that SPIDER wrote")
        words = np.frombuffer(data, f"{self._order}f4")
        self.box = int(words[NX])
        if words[IFORM] != IMAGE or words[NZ] not in (1, -1) or words[NY] != self.box:
            raise InputError(f"{self.path} has {words[NX]:g} x {words[NY]:g} x {words[NZ]:g} pixels and the form "
                             f"{words[IFORM]:g}: give square 2-D images in real space (form 1)")
        if words[IS_STACK] < 0:
            raise InputError(f"{self.path} is an indexed stack, which cannot be read: copy it into a plain one")
        self._is_stack = words[IS_STACK] > 0
        n_images = float(words[LAST_IMAGE]) if self._is_stack else 1.0
        if not 1 <= n_images < 2**31:
            raise InputError(f"{self.path} says that its last image is number {n_images:g}: give at least one image")
        self.n_images = int(n_images)
        self._header = header_bytes(self.box)
        needed = self._header * self._is_stack + self.n_images * (self._header + 4 * self.box**2)
        if size < needed:
            raise InputError(f"{self.path} is cut short: it has {size} bytes, its {self.n_images} images of {self.box} "
                             f"x {self.box} pixels need {needed}; copy it again")
        self._check_used()
        self._check_end(size - needed)
        own = self._map()[0]["header"][PIXEL_SIZE]
        sizes = [float(value) for value in (words[PIXEL_SIZE], own) if np.isfinite(value) and value > 0]
        self.pixel_size_A = sizes[0] if sizes else None

    def _check_used(self):
        if self._is_stack:
            unused = np.flatnonzero(self._map()["header"][:, IMAGE_NUMBER] <= 0)
            if unused.size:
                raise InputError(f"{self.path} has no image {unused[0] + 1} of 1 to {self.n_images} (deleted?): copy "
                                 f"the stack with SPIDER to close the gap")

    def _check_end(self, beyond):
        """Refuse images behind the last one that the header tells of, in so many bytes; unused places are none."""
        if beyond >= self._header + 4 * self.box**2:
            with open(self.path, "rb") as file:
                file.seek(-beyond, os.SEEK_END)
                number = np.frombuffer(file.read(4 * N_WORDS), f"{self._order}f4")[IMAGE_NUMBER]
            if not self._is_stack or number > 0:
                raise InputError(f"{self.path} goes on for {beyond} bytes beyond the last of the {self.n_images} "
                                 f"images that its header tells of: it is damaged; copy it again")

    def _map(self):
        number = np.dtype(f"{self._order}f4")
        image = np.dtype([("header", number, self._header // 4), ("pixels", number, (self.box, self.box))])
        return map_file(self.path, image, self._header if self._is_stack else 0, self.n_images)

    def _read(self, indices):
        return read_rows(self._map()["pixels"], indices)


def write_spider(path, blocks, n_images, box, pixel_size_A):
    """Write a stack, little-endian, block by block, whole or not at all.

    Parameters
    ----------
    path : str
    blocks : iterable of (n, box, box) float32
        ``n_images`` in all.
    n_images, box : int
    pixel_size_A : float or None
    """
    with replacing_durably(path) as temporary, open(temporary, "wb") as file:
        whole = _header(box, pixel_size_A)
        whole[[IS_STACK, LAST_IMAGE]] = 2, n_images
        file.write(whole.tobytes())
        number = 0
        for image in (image for block in blocks for image in block):
            number += 1
            own = _header(box, pixel_size_A)
            own[[IMAGE_NUMBER, HAS_STATISTICS]] = number, 1
            own[[HIGHEST, LOWEST, MEAN, DEVIATION]] = image.max(), image.min(), image.mean(), image.std(ddof=1)
            file.write(own.tobytes())
            file.write(np.ascontiguousarray(image, "<f4").tobytes())


def _header(box, pixel_size_A):
    n_bytes = header_bytes(box)
    header = np.zeros(n_bytes // 4, "<f4")
    records = n_bytes // (4 * box)
    header[[NZ, NY, NX, IFORM]] = 1, box, box, IMAGE
    header[[N_RECORDS, HEADER_RECORDS, HEADER_BYTES, RECORD_BYTES]] = records + box, records, n_bytes, 4 * box
    header[PIXEL_SIZE] = 0 if pixel_size_A is None else pixel_size_A
    return header
