"""What is written of a stack into another file, whatever the formats of the two. Imports ctf, geometry, errors, io.

Each format holds what it has a place for: :data:`HELD`.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from mrefali.ctf import format_ctf
from mrefali.errors import InputError
from mrefali.geometry import to_matrices
from mrefali.io import star
from mrefali.io.bdb import is_bdb, write_bdb
from mrefali.io.hdf import write_images
from mrefali.io.mrc import path_from_here, write_mrcs
from mrefali.io.npy import write_npy
from mrefali.io.spider import write_spider
from mrefali.io.whole import replacing

#: Pixels held at a time.
BLOCK_BYTES = 32 << 20

#: The format of a file to write, by the end of its name.
FORMATS = {".hdf": "hdf", ".h5": "hdf", ".mrcs": "mrc", ".mrc": "mrc", ".star": "star", ".spi": "spider",
           ".spd": "spider", ".npy": "npy"}

#: What besides the pixels each format holds.
HELD = {"hdf": {"poses", "classes", "ctf", "pixel size", "columns", "headers"},
        "bdb": {"poses", "classes", "ctf", "pixel size", "columns", "headers"},
        "star": {"poses", "classes", "ctf", "pixel size", "columns"},
        "mrc": {"pixel size"}, "spider": {"pixel size"}, "npy": set()}

#: Columns of a STAR that the headers xform.align2d, assign, ctf and apix_x stand for.
IN_HEADERS = {"rlnImageName", "rlnAngleRot", "rlnAngleTilt", star.MIRROR, "rlnClassNumber", *star.POSE_COLUMNS,
              *star.PIXEL_COLUMNS}
CTF_IN_HEADERS = {"rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor"}

#: Before the name of a header that was a column of an optics table.
OPTICS = "optics."

#: Columns that are wrong once the pixels have another size.
OF_OLD_PIXELS = ("rlnMagnification", "rlnDetectorPixelSize", "rlnPixelSize", *star.PIXEL_COLUMNS)


def format_of(path):
    """The format that the name of a file to write asks for.

    Raises
    ------
    InputError
    """
    if is_bdb(path):
        return "bdb"
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".cs":
        raise InputError(f"{path}: cryoSPARC's .cs can be read but not written: give a name that ends in .star, which "
                         f"cryoSPARC imports")
    if suffix not in FORMATS:
        raise InputError(f"{path} names no format that can be written: give bdb:DIR#NAME or a name that ends in "
                         f"{', '.join(FORMATS)}")
    return FORMATS[suffix]


@dataclass(frozen=True)
class Content:
    """Some images of a stack and what is known of them.

    Attributes
    ----------
    stack
        See :mod:`mrefali.io`.
    indices : (n,) int array
        Of the images, in the order in which they are written.
    poses : (n,) geometry.POSE or None
    assign : (n,) int array or None
    ctf : (n,) ctf.CTF_PARAMETERS or None
    applied : (n,) bool or None
        Whether the pixels are multiplied by their CTF.
    box : int, px
    pixel_size_A : float or None
    change : callable or None
        What makes the images to be written, (k, box, box) float32, of those that are read.
    """

    stack: object
    indices: np.ndarray
    poses: np.ndarray | None
    assign: np.ndarray | None
    ctf: np.ndarray | None
    applied: np.ndarray | None
    box: int
    pixel_size_A: float | None
    change: object = None

    @property
    def n_images(self):
        return len(self.indices)

    @property
    def is_rescaled(self):
        """Whether the pixels have another size than those of the stack."""
        return self.box != self.stack.box

    def pixel_size_or_1(self):
        """The pixel size in A, 1 where it is not known, for formats that cannot do without."""
        return 1.0 if self.pixel_size_A is None else self.pixel_size_A

    def blocks(self):
        """The images, block by block, read in the order of the file within each."""
        step = max(1, BLOCK_BYTES // (4 * self.stack.box**2))
        for start in range(0, self.n_images, step):
            images = self.stack.read_at(self.indices[start:start + step])
            yield images if self.change is None else self.change(images)

    def image_names(self):
        """``NUMBER@FILE`` of each image where it lies in MRC files; None if it changes, or is in no such file."""
        images = getattr(self.stack, "images", None)
        if images is None or self.change is not None:
            return None
        paths = {}
        for i, source in zip(self.indices, images.source[self.indices].tolist(), strict=True):
            if source not in paths:
                paths[source] = path_from_here(images.file(i))
        return [f"{number + 1:06d}@{paths[source]}" for number, source in zip(
            images.number[self.indices].tolist(), images.source[self.indices].tolist(), strict=True)]

    def carried(self):
        """The ``star.Table`` of the columns that the stack has beyond what this object says; possibly empty."""
        if hasattr(self.stack, "table"):
            table = self.stack.table()
        elif self.stack.read_only:
            table = star.Table({}, {}, {})
        else:
            table = self._columns_from_headers()
        whole = np.array_equal(self.indices, np.arange(self.stack.n_images))
        particles = dict(table.particles) if whole else {
            label: [column[i] for i in self.indices.tolist()] for label, column in table.particles.items()}
        optics = dict(table.optics)
        if self.is_rescaled:
            for stale in OF_OLD_PIXELS:
                particles.pop(stale, None)
                optics.pop(stale, None)
        return star.Table(optics, particles, table.others, table.document)

    def _columns_from_headers(self):
        """The columns of a STAR that headers of the stack hold: see :meth:`headers`."""
        names = [name for name in self.stack.header_names() if name.removeprefix(OPTICS).startswith("rln")]
        columns = {name: [str(value) for value in self.stack.column(name)] for name in names}
        optics = {name.removeprefix(OPTICS): column for name, column in columns.items() if name.startswith(OPTICS)}
        particles = {name: column for name, column in columns.items() if not name.startswith(OPTICS)}
        if "rlnOpticsGroup" in particles:
            first = dict(reversed([(group, i) for i, group in enumerate(particles["rlnOpticsGroup"])]))
            rows = [first[group] for group in sorted(first, key=lambda group: first[group])]
            optics = {label: [column[i] for i in rows] for label, column in optics.items()}
            optics = {"rlnOpticsGroup": [particles["rlnOpticsGroup"][i] for i in rows]} | optics
        return star.Table(optics if "rlnOpticsGroup" in particles else {}, particles, {})

    def headers(self):
        """The headers of each image as an HDF file holds them, one dict after the other.

        The columns of a STAR become headers of the same name, texts as they are; those of its optics table begin with
        ``optics.``.
        """
        columns = self._columns_for_headers() if self.stack.read_only else {}
        matrices = None if self.poses is None else to_matrices(self.poses)
        for row, i in enumerate(self.indices.tolist()):
            header = {} if self.stack.read_only else self.stack.header(i)
            header |= {name: column[row] for name, column in columns.items()}
            if matrices is not None:
                header["xform.align2d"] = matrices[row]
            if self.assign is not None:
                header["assign"] = int(self.assign[row])
            if self.ctf is not None and (self.stack.read_only or self.is_rescaled):  # else it is there, as it was
                text = text_of_ctf(self.ctf[row])
                header.pop("ctf", None)
                header |= {} if text is None else {"ctf": text, "ctf_applied": int(self.applied[row])}
            yield header

    def _columns_for_headers(self):
        table = self.carried()
        known = IN_HEADERS | (set() if self.ctf is None else CTF_IN_HEADERS)
        columns = {label: column for label, column in table.particles.items() if label not in known}
        if table.optics:
            rows = {group: row for row, group in enumerate(table.optics["rlnOpticsGroup"])}
            group = [rows[text] for text in table.particles["rlnOpticsGroup"]]
            columns |= {OPTICS + label: [column[row] for row in group] for label, column in table.optics.items()
                        if label not in IN_HEADERS and label != "rlnOpticsGroup"}
        return columns


def text_of_ctf(parameters):
    """The header of ``() CTF_PARAMETERS``; None if EMAN2 has no string for it (:func:`mrefali.ctf.format_ctf`)."""
    try:
        return format_ctf(parameters)
    except InputError:
        return None


def pixel_file(path):
    """The .mrcs file beside the STAR ``path`` for pixels that are in no MRC file."""
    return os.path.splitext(path)[0] + ".mrcs"


def write(path, content):
    """Write a new file or database of the format that its name asks for, whole or not at all.

    Beside a STAR whose particles are in no MRC file, or are changed, stands :func:`pixel_file`.
    """
    kind, box, size = format_of(path), content.box, content.pixel_size_A
    if kind == "star":
        write_star(path, content)
    elif kind == "mrc":
        write_mrcs(path, content.blocks(), content.n_images, box, size)
    elif kind == "spider":
        write_spider(path, content.blocks(), content.n_images, box, size)
    elif kind == "npy":
        write_npy(path, content.blocks(), content.n_images, box)
    else:
        images = (image for block in content.blocks() for image in block)
        pairs = zip(images, content.headers(), strict=True)
        write_bdb(path, pairs, box, size) if kind == "bdb" else write_images(path, pairs, size)


def write_star(path, content):
    """Write a STAR of the content, and the pixels beside it where they have to be copied."""
    names = content.image_names()
    with ExitStack() as files:
        if names is None:
            pixels = pixel_file(path)
            temporary = files.enter_context(replacing(pixels))
            write_mrcs(temporary, content.blocks(), content.n_images, content.box, content.pixel_size_A)
            names = [f"{i + 1:06d}@{path_from_here(pixels)}" for i in range(content.n_images)]
        star.write_table(path, star.describe(content, names))
