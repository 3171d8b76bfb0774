"""MRC stacks, of one file or of the many that a table names: read in place, and written. Imports errors, io of ours.

``mrcfile`` reads and judges the headers; the pixels are mapped into memory from where it says they are.
"""

import io
import logging
import os
import warnings
from typing import NamedTuple

import mrcfile
import numpy as np
from mrcfile.mrcinterpreter import MrcInterpreter

from mrefali.errors import InputError
from mrefali.io.mapped import map_file
from mrefali.io.stack import ReadOnlyStack
from mrefali.io.whole import replacing_durably

logger = logging.getLogger(__name__)

HEADER_BYTES = 1024

#: Axes of a crystal in a header's space group: 0 is a stack of images, 1 a volume, above 400 a stack of volumes.
IMAGES, VOLUME, VOLUMES = 0, 1, 400

#: Relative difference of two pixel sizes that are the same but for rounding.
SAME_PIXEL_SIZE = 1e-3


class Layout(NamedTuple):
    """Where the images of an MRC file lie, and what its header says of them.

    ``pixel_size_A`` is None where the header has no length; ``notes`` are what is wrong with it.
    """

    path: str
    n_images: int
    box: int
    dtype: np.dtype
    offset: int
    pixel_size_A: float | None
    space_group: int
    notes: tuple


def read_layout(path):
    """The ``Layout`` of an MRC file of square images, which are all there.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
    InputError
    """
    size = _file_size(path)
    with open(path, "rb") as file:
        start = bytearray(file.read(HEADER_BYTES))
    # mrcfile makes room for the extended header before it looks whether there is one
    extended, start[92:96] = bytes(start[92:96]), bytes(len(start[92:96]))
    try:
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            header = MrcInterpreter(io.BytesIO(start), permissive=True, header_only=True).header
            dtype = mrcfile.utils.data_dtype_from_header(header)
    except ValueError as error:
        raise InputError(f"{path} is no MRC file that can be read ({error}): copy it again, or convert it") from None
    n_extended = int.from_bytes(extended, "big" if header.nx.dtype.byteorder == ">" else "little", signed=True)
    if not 0 <= n_extended <= size - HEADER_BYTES:
        raise InputError(f"{path} is no MRC file, or cut short: its extended header would end beyond its {size} bytes; "
                         f"copy it again")
    nx, ny, nz = (int(header[name]) for name in ("nx", "ny", "nz"))
    if min(nx, ny, nz) <= 0 or dtype.kind not in "iuf":
        raise InputError(f"{path} has {nz} images of {nx} x {ny} pixels of type {dtype}: give real numbers, at least "
                         f"one image")
    if nx != ny:
        raise InputError(f"{path} has images of {nx} x {ny} pixels: only square images can be used; pad or clip them")
    offset = HEADER_BYTES + n_extended
    needed = offset + nz * ny * nx * dtype.itemsize
    if size < needed:
        raise InputError(f"{path} is cut short: it has {size} bytes, its {nz} images of {nx} x {nx} pixels need "
                         f"{needed}; copy it again")
    if size - needed >= ny * nx * dtype.itemsize:
        raise InputError(f"{path} has {size} bytes, of which the {nz} images that its header tells of take {needed}: "
                         f"it is damaged, or its writer has not come to its end; copy it again")
    return Layout(path, nz, nx, dtype, offset, _pixel_size(header), int(header.ispg),
                  tuple(str(complaint.message) for complaint in complaints))


def _file_size(path):
    """The size in bytes of a file that can be read, with errors of one line."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a directory: give a file")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise PermissionError(f"{path} cannot be read: allow it with chmod")
    return os.path.getsize(path)


def _pixel_size(header):
    """The side of a pixel in A, None where the header has none."""
    mx, length = int(header.mx), float(header.cella.x)
    size = length / mx if mx > 0 else 0.0
    return size if np.isfinite(size) and size > 0 else None


class MrcImages:
    """Images in one or several MRC files, read grouped by file and in the order of the file.

    Parameters
    ----------
    path : str
        What messages call the whole.
    layouts : list of Layout
        All of one box.
    source, number : (n_images,) int array
        Of each image the index of its layout, and its place in that file, from 0.
    """

    def __init__(self, path, layouts, source, number):
        self._path, self._layouts, self.source, self.number = path, layouts, source, number
        self.box = layouts[0].box
        self._warn_of_odd_headers()
        for layout in layouts[1:]:
            if layout.box != self.box:
                raise InputError(f"{path} names images of unequal size: {layout.path} has {layout.box} x {layout.box} "
                                 f"pixels, {layouts[0].path} {self.box} x {self.box}; choose those of one size")
        counts = np.array([layout.n_images for layout in layouts])[source]
        for i in np.flatnonzero((number < 0) | (number >= counts))[:1]:
            raise InputError(f"particle {i} of {path} is image {number[i] + 1} of {layouts[source[i]].path}, which has "
                             f"1 to {counts[i]}")

    def _warn_of_odd_headers(self):
        odd = [layout for layout in self._layouts if layout.notes]
        if odd:
            more = f" and {len(odd) - 1} more files" if len(odd) > 1 else ""
            logger.warning("%s%s: the header is not quite MRC, and read all the same: %s", odd[0].path, more,
                           "; ".join(odd[0].notes))

    def file(self, index):
        """The path of the file that image ``index`` is in."""
        return self._layouts[self.source[index]].path

    def pixel_size_A(self):
        """The one that the headers say; None if they have none, or differ."""
        sizes = {layout.pixel_size_A for layout in self._layouts}
        first = self._layouts[0].pixel_size_A
        same = None not in sizes and max(sizes) - min(sizes) <= SAME_PIXEL_SIZE * first
        return first if same else None

    def read(self, indices):
        """Images, ``(len(indices), box, box) float32``, in the order given."""
        pixels = np.empty((len(indices), self.box, self.box), np.float32)
        sources, numbers = self.source[indices], self.number[indices]
        rows = np.lexsort((numbers, sources))
        for part in np.split(rows, np.flatnonzero(np.diff(sources[rows])) + 1):
            if part.size:
                layout = self._layouts[sources[part[0]]]
                images = map_file(layout.path, layout.dtype, layout.offset, (layout.n_images, self.box, self.box))
                for row in part:
                    pixels[row] = images[numbers[row]]
        return pixels


class MrcStack(ReadOnlyStack):
    """The square images of one MRC file.

    A file called ``.mrcs`` is a stack whatever its space group says.

    Parameters
    ----------
    path : str or path

    Attributes and errors are those of :class:`mrefali.io.stack.FileStack`.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        layout = read_layout(self.path)
        volume = layout.space_group == VOLUME and layout.n_images == layout.box or layout.space_group > VOLUMES
        if volume and not self.path.endswith(".mrcs"):
            raise InputError(f"{self.path} is a volume of {layout.box}^3 pixels (space group {layout.space_group}): if "
                             f"it is a stack of images, call it .mrcs")
        self.n_images, self.box, self.pixel_size_A = layout.n_images, layout.box, layout.pixel_size_A
        self.images = MrcImages(self.path, [layout], np.zeros(self.n_images, np.int32), np.arange(self.n_images))

    def _read(self, indices):
        return self.images.read(indices)


def find_files(names, table, first_particles):
    """The paths of the image files that a table names, absolute or relative to a project.

    A project is the folder of the table, one of those above it, or the folder we are in, in this order.

    Parameters
    ----------
    names : list of str
    table : str
        The path of the table.
    first_particles : list of int
        For each name a particle that needs it, for messages.

    Returns
    -------
    list of str

    Raises
    ------
    FileNotFoundError
    """
    folder = os.path.dirname(os.path.abspath(table))
    above = [folder]
    while os.path.dirname(above[-1]) != above[-1]:
        above.append(os.path.dirname(above[-1]))
    projects, paths = [*above, os.getcwd()], []
    for name, particle in zip(names, first_particles, strict=True):
        tried = [os.path.join(project, name) for project in projects]
        found = next(filter(os.path.exists, tried), None)
        if found is None:
            where = name if os.path.isabs(name) else (f"{tried[0]}, the same in the folders above, and {tried[-1]} "
                                                      f"were tried")
            raise FileNotFoundError(f"particle {particle} of {table} is in {name}, which does not exist: {where}; put "
                                    f"the file there, or call from the project's folder")
        paths.append(found)
    return paths


def path_from_here(path):
    """A path as RELION, called from this folder, finds it: relative if it lies within, else absolute."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative


def write_mrcs(path, blocks, n_images, box, pixel_size_A):
    """Write a stack as MRC2014 has it, whole or not at all, block by block; a file of that name is replaced.

    Parameters
    ----------
    path : str
    blocks : iterable of (n, box, box) float32
        Images, ``n_images`` in all.
    n_images, box : int
    pixel_size_A : float or None
        None leaves the size of the cell 0, which stands for unknown.
    """
    with replacing_durably(path) as temporary:
        with mrcfile.new_mmap(temporary, (n_images, box, box), mrc_mode=2) as file:
            file.set_image_stack()
            if pixel_size_A is not None:
                file.voxel_size = pixel_size_A
            start, statistics = 0, _Statistics()
            for block in blocks:
                file.data[start:start + len(block)] = block
                statistics.add(block)
                start += len(block)
            statistics.write(file.header)


class _Statistics:
    """Extremes, mean and deviation of the pixels, added up block by block."""

    def __init__(self):
        self._low, self._high, self._sum, self._sum_of_squares, self._n = np.inf, -np.inf, 0.0, 0.0, 0

    def add(self, block):
        self._low, self._high = min(self._low, block.min()), max(self._high, block.max())
        self._sum += block.sum(dtype=np.float64)
        self._sum_of_squares += np.einsum("nyx,nyx->", block, block, dtype=np.float64)
        self._n += block.size

    def write(self, header):
        mean = self._sum / self._n
        header.dmin, header.dmax, header.dmean = self._low, self._high, mean
        header.rms = np.sqrt(max(0.0, self._sum_of_squares / self._n - mean**2))
