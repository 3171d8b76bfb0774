"""RELION's STAR files: particles in many .mrcs files, read and written. Imports ctf, geometry, errors, io of ours.

gemmi reads the text. The columns that are asked for become arrays, and the table is let go; it is read again where all
of it is carried over into another file.
"""

import os
from itertools import chain
from typing import NamedTuple

import numpy as np

from mrefali.errors import InputError
from mrefali.io.mrc import SAME_PIXEL_SIZE, MrcImages, find_files, logger, read_layout
from mrefali.io.relion import from_angles, is_flat, make_ctf, to_angles, to_defoci
from mrefali.io.stack import ReadOnlyStack
from mrefali.io.whole import replacing_durably

#: Our own column: RELION has none for a mirror.
MIRROR = "mrefaliMirror"

#: Without these RELION 3.1 opens no STAR.
MICROSCOPE_COLUMNS = ("rlnVoltage", "rlnSphericalAberration")

#: What a CTF cannot do without, and the columns that stand for the poses of a particle.
CTF_COLUMNS = ("rlnDefocusU", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
POSE_COLUMNS = ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY")

#: The optics columns that depend on the pixels, and so are written anew.
PIXEL_COLUMNS = ("rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality")


class Table(NamedTuple):
    """The text of a STAR file, as columns: label without its underscore -> one text a row.

    ``others`` are blocks that are neither optics nor particles, by name; ``document`` is what gemmi made, which columns
    that it reads on demand need.
    """

    optics: dict
    particles: dict
    others: dict
    document: object = None


def read_table(path):
    """The ``Table`` of a STAR file of particles.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
    InputError
        If it cannot be read, or no table in it has the column rlnImageName.
    """
    document = _parse(path)
    blocks = {block.name.strip(): _columns(block) for block in document}
    with_images = [name for name, columns in blocks.items() if "rlnImageName" in columns]
    if not with_images:
        found = ", ".join(f"data_{name} ({len(columns)} columns)" for name, columns in blocks.items())
        raise InputError(f"{path} has no column rlnImageName: it holds {found or 'nothing'}; give a STAR of particles")
    name = "particles" if "particles" in with_images else with_images[0]
    particles = blocks.pop(name)
    if not len(particles["rlnImageName"]):
        raise InputError(f"{path} has no particles: its table data_{name} is empty")
    return Table(blocks.pop("optics", {}), particles, blocks, document)


def _parse(path):
    try:
        from gemmi import cif
    except ImportError as error:
        raise InputError(f"{path} is a STAR file, which gemmi reads ({error}): pip install "
                         f"'mrefali[formats]'") from None
    try:
        return cif.read_file(path)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no STAR file that can be read ({' '.join(str(error).split())}): correct that "
                         f"line; names with blanks stand in quotes, and with other letters than ASCII cannot be "
                         f"read") from None


def _columns(block):
    """Label -> column of a block, be it a loop or pairs."""
    tags = chain.from_iterable(item.loop.tags if item.loop is not None else [item.pair[0]]
                               for item in block if item.loop is not None or item.pair is not None)
    return {tag.removeprefix("_"): block.find_values(tag) for tag in tags}


class StarStack(ReadOnlyStack):
    """The particles of a RELION STAR file, of version 3.0 or of 3.1 and later.

    Parameters
    ----------
    path : str or path

    Attributes
    ----------
    pixel_size_A : float or None
        The STAR's; where it has none, that of the image files.
    images : MrcImages

    Other attributes, and errors, are those of :class:`mrefali.io.stack.FileStack`.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        self._stamp = _stamp(self.path)
        reader = _Reader(self.path)
        self.n_images = reader.n_images
        self.images = _find_images(self.path, reader.texts("rlnImageName"))
        self.box = self.images.box
        self.pixel_size_A = self._choose_pixel_size(reader.pixel_size_A())
        reader.check_image_size(self.box)
        self._poses, self.is_flat = reader.poses(self.pixel_size_A)
        self._assign = reader.classes()
        self._ctf, self._missing = reader.ctf(self.pixel_size_A)

    def _choose_pixel_size(self, stated):
        in_files = self.images.pixel_size_A()
        if stated is None:
            return in_files
        if in_files is not None and abs(stated - in_files) > SAME_PIXEL_SIZE * stated:
            logger.info("%s: its pixel size of %g A is taken, not the %g A in the headers of its image files",
                        self.path, stated, in_files)
        return stated

    def _explain_no_ctf(self):
        return f"no column {', '.join(self._missing)}" if self._missing else "its pixel size is not known"

    def _read(self, indices):
        return self.images.read(indices)

    def table(self):
        """All columns of the file, read again.

        Raises
        ------
        InputError
            If the file has changed.
        """
        if _stamp(self.path) != self._stamp:
            raise InputError(f"{self.path} was changed by another program while it was in use: start again")
        return read_table(self.path)


def _stamp(path):
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    return status.st_size, status.st_mtime_ns


def _find_images(path, names):
    """The ``MrcImages`` that the texts ``000012@FILE`` of a column name."""
    files, source, number = {}, np.empty(len(names), np.int32), np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        place, at, file = name.rpartition("@")
        if not file or at and not (place.isascii() and place.isdigit() and len(place) < 19):
            raise InputError(f"rlnImageName of particle {i} of {path} is {name!r}: give NUMBER@FILE, counted from 1")
        source[i] = files.setdefault(file, len(files))
        number[i] = int(place) - 1 if at else 0
    first = np.unique(source, return_index=True)[1].tolist()
    return MrcImages(path, [read_layout(found) for found in find_files(list(files), path, first)], source, number)


class _Reader:
    """The columns of a table as arrays; those of the optics group where the particles have none of their own."""

    def __init__(self, path):
        self._path = path
        self.table = read_table(path)
        self.n_images = len(self.table.particles["rlnImageName"])
        self._group = self._find_groups() if self.table.optics else None

    def _find_groups(self):
        """For each particle the row of its optics group."""
        for where, columns in (("data_optics", self.table.optics), ("the particles", self.table.particles)):
            if "rlnOpticsGroup" not in columns:
                raise InputError(f"{self._path} has no column rlnOpticsGroup in {where}: add it, or take out "
                                 f"data_optics")
        rows = {group: row for row, group in enumerate(self.table.optics["rlnOpticsGroup"])}
        groups = np.empty(self.n_images, np.int32)
        for i, group in enumerate(self.table.particles["rlnOpticsGroup"]):
            row = rows.get(group)
            if row is None:
                raise InputError(f"particle {i} of {self._path} is of optics group {group}, which data_optics does not "
                                 f"define (it has {', '.join(rows)}): add the group, or leave the particle out")
            groups[i] = row
        return groups

    def texts(self, label):
        """A column of the particles, quotes taken off."""
        return [text[1:-1] if text[:1] in "'\"" else text for text in self.table.particles[label]]

    def numbers(self, label):
        """A column as (n_images,) float64; of the particles, else of their groups; None if it is in neither."""
        if label in self.table.particles:
            return self._floats(label, self.table.particles[label], "particle")
        if self._group is not None and label in self.table.optics:
            return self._floats(label, self.table.optics[label], "row of data_optics")[self._group]
        return None

    def _floats(self, label, column, what):
        try:
            numbers = np.fromiter(map(float, column), np.float64, len(column))
        except ValueError:
            numbers = None
        if numbers is None or not np.isfinite(numbers).all():
            row = next(i for i, text in enumerate(column) if not _is_finite(text))
            raise InputError(f"{label} of {what} {row} of {self._path} is {column[row]!r}: give a finite number")
        return numbers

    def needed(self, label):
        """As :meth:`numbers`; InputError if there is no such column."""
        numbers = self.numbers(label)
        if numbers is None:
            raise InputError(f"{self._path} has no column {label}: give a STAR that has it")
        return numbers

    def micrograph_pixel_A(self, default=None):
        """The pixel size of each particle's micrograph in A, (n_images,) float64."""
        sizes = self._first_of("rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize")
        if sizes is None and default is None:
            raise InputError(f"{self._path} has no column rlnMicrographOriginalPixelSize (nor rlnMicrographPixelSize), "
                             f"without which shifts in A cannot be turned into pixels of the micrographs: add it to "
                             f"data_optics")
        sizes = np.full(self.n_images, default) if sizes is None else sizes
        for i in np.flatnonzero(sizes <= 0)[:1]:
            raise InputError(f"the pixel size of the micrograph of particle {i} of {self._path} is {sizes[i]:g} A: it "
                             f"must be above 0")
        return sizes

    def _first_of(self, *labels):
        return next((numbers for label in labels if (numbers := self.numbers(label)) is not None), None)

    def pixel_size_A(self):
        """The one pixel size that the table states, None if it states none."""
        sizes = self._first_of("rlnImagePixelSize", "rlnPixelSize")
        label = "its pixel size"
        detector, magnification = self.numbers("rlnDetectorPixelSize"), self.numbers("rlnMagnification")
        if sizes is None and detector is not None and magnification is not None:
            if not (magnification > 0).all():
                raise InputError(f"rlnMagnification of particle {np.argmin(magnification)} of {self._path} is "
                                 f"{magnification.min():g}: it must be above 0")
            sizes, label = 1e4 * detector / magnification, "its pixel size from rlnDetectorPixelSize"
        if sizes is None:
            return None
        if not (sizes > 0).all():
            raise InputError(f"particle {np.argmin(sizes)} of {self._path}: {label} is {sizes.min():g} A: it must be "
                             f"above 0")
        other = np.flatnonzero(np.abs(sizes - sizes[0]) > SAME_PIXEL_SIZE * sizes[0])
        if other.size:
            raise InputError(f"{self._path} mixes pixel sizes: particle {other[0]}{self._name_group(other[0])} has "
                             f"{sizes[other[0]]:g} A, particle 0{self._name_group(0)} {sizes[0]:g} A; choose those of "
                             f"one")
        return float(sizes[0])

    def _name_group(self, i):
        return "" if self._group is None else f" of optics group {self.table.optics['rlnOpticsGroup'][self._group[i]]}"

    def check_image_size(self, box):
        """Raise InputError if an optics group states another box than its images have."""
        sizes = self.numbers("rlnImageSize")
        for i in np.flatnonzero(sizes != box)[:1] if sizes is not None else ():
            raise InputError(f"particle {i} of {self._path}{self._name_group(i)} has rlnImageSize {sizes[i]:g}, but "
                             f"its image has {box} x {box} pixels: correct the one, or restore the other")

    def poses(self, pixel_size_A):
        """``(n_images,) POSE`` or None, and whether all tilts are 0 or 180."""
        tilt = self.numbers("rlnAngleTilt")
        flat = tilt is None or is_flat(tilt)
        if not any(label in self.table.particles for label in POSE_COLUMNS):
            return None, flat
        zero = np.zeros(self.n_images)
        psi, rot, mirror = (zero if (column := self.numbers(label)) is None else column
                            for label in ("rlnAnglePsi", "rlnAngleRot", MIRROR))
        if tilt is None:
            rot = tilt = np.where(mirror != 0, 180.0, 0.0)
        elif MIRROR in self.table.particles and (not flat or ((tilt > 90) != (mirror != 0)).any()):
            logger.warning("%s: %s and rlnAngleTilt disagree, and the angles are taken; another program changed them",
                           self._path, MIRROR)
        origins = [self._origin(axis, pixel_size_A) for axis in "XY"]
        return from_angles(psi, *origins, rot, tilt), flat

    def _origin(self, axis, pixel_size_A):
        """Shifts in px."""
        in_angstrom = self.numbers(f"rlnOrigin{axis}Angst")
        if in_angstrom is None:
            in_pixels = self.numbers(f"rlnOrigin{axis}")
            return np.zeros(self.n_images) if in_pixels is None else in_pixels
        if pixel_size_A is None:
            raise InputError(f"{self._path} has no column rlnImagePixelSize, without which rlnOrigin{axis}Angst cannot "
                             f"be turned into pixels: add it to data_optics")
        return in_angstrom / pixel_size_A

    def classes(self):
        """Classes from 0, (n_images,) int32; None where a particle has none."""
        numbers = self.numbers("rlnClassNumber")
        return None if numbers is None or (numbers < 1).any() else numbers.astype(np.int32) - 1

    def ctf(self, pixel_size_A):
        """``(n_images,) CTF_PARAMETERS`` or None, and the labels that are missing for it."""
        columns = {label: self.numbers(label) for label in CTF_COLUMNS}
        missing = [label for label, column in columns.items() if column is None]
        if missing or pixel_size_A is None:
            return None, missing
        u, voltage, cs, contrast = columns.values()
        v, angle, phase_shift, bfactor = map(self.numbers, (
            "rlnDefocusV", "rlnDefocusAngle", "rlnPhaseShift", "rlnCtfBfactor"))
        zero = np.zeros(self.n_images)
        return make_ctf(u, u if v is None else v, zero if angle is None else angle, voltage, cs, contrast, pixel_size_A,
                        zero if phase_shift is None else phase_shift, zero if bfactor is None else bfactor), []


def _is_finite(text):
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


# --- new coordinates


def recentered(path):
    """The ``Table`` of a STAR with the whole pixels of its shifts folded into the coordinates.

    x + o is where a point x of an image lies about the centre of the reference, so the particle is centred on -o.

    Returns
    -------
    Table
    moved : (n_particles, 2) int64
        By what the coordinates x, y changed, in px of the micrographs.

    Raises
    ------
    InputError, FileNotFoundError
        If a column is missing or no number.
    """
    reader = _Reader(path)
    table, pixel_size_A = reader.table, reader.pixel_size_A()
    in_angstrom = "rlnOriginXAngst" in table.particles
    columns, moved = {}, np.empty((reader.n_images, 2), np.int64)
    for axis, name in enumerate("XY"):
        label = f"rlnOrigin{name}Angst" if in_angstrom else f"rlnOrigin{name}"
        coordinate, origin = (reader.needed(needed) for needed in (f"rlnCoordinate{name}", label))
        step = reader.micrograph_pixel_A(None if in_angstrom else pixel_size_A or 1.0)
        step = step if in_angstrom else step / (pixel_size_A or 1.0)
        shift = np.rint(origin / step)
        moved[:, axis] = -shift
        columns |= {f"rlnCoordinate{name}": _texts(coordinate - shift), label: _texts(origin - shift * step)}
    return table._replace(particles=table.particles | columns), moved


# --- writing


def write_table(path, table):
    """Write a STAR file as RELION 3.1 and later do, whole or not at all."""
    with replacing_durably(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        for name, columns in (("optics", table.optics), ("particles", table.particles), *table.others.items()):
            if columns:
                file.write(f"\n# version 30001\n\ndata_{name}\n\nloop_\n")
                file.writelines(f"_{label} #{number}\n" for number, label in enumerate(columns, 1))
                file.writelines(" ".join(row) + "\n" for row in zip(*columns.values(), strict=True))
                file.write("\n")


def describe(content, names):
    """The ``Table`` of particles in RELION's words.

    Parameters
    ----------
    content : mrefali.io.content.Content
    names : list of str
        ``NUMBER@FILE`` of each image.

    Returns
    -------
    Table
        With every column that the particles had in the STAR they come from.
    """
    table = content.carried()
    names = [_quoted(name) for name in names]
    particles = {"rlnImageName": names} | table.particles | {"rlnImageName": names}  # first, or where it was
    optics = dict(table.optics)
    if content.ctf is not None and not set(CTF_COLUMNS) <= particles.keys() | optics.keys():
        particles |= _ctf_columns(content.ctf)
        if optics:  # those of its groups are of the CTF as it was
            particles |= _constant_columns(content.ctf)
    if not optics:
        optics, particles["rlnOpticsGroup"] = _make_optics(content)
    for stale in ("rlnOriginX", "rlnOriginY"):
        particles.pop(stale, None)
    pixel_size_A = content.pixel_size_or_1()
    n_groups, texts = len(optics["rlnOpticsGroup"]), (f"{pixel_size_A:.6f}", str(content.box), "2")
    for label, text in zip(PIXEL_COLUMNS, texts, strict=True):
        optics.setdefault(label, [text] * n_groups)
    return Table(optics, particles | _pose_columns(content, pixel_size_A), table.others, table.document)


def cautions(content):
    """A line for each thing that a STAR of the content does not hold, or that some of its readers miss."""
    mirrored = int((content.poses["mirror"] != 0).sum())
    if mirrored:
        yield (f"{mirrored} particles are mirrored, which is rot = tilt = 180 and {MIRROR} = 1 there; who reads psi "
               f"alone sees them unmirrored")
    if content.pixel_size_A is None:
        yield "the pixel size is unknown: 1 A is written"
    carried = content.carried()
    if content.ctf is None and not set(MICROSCOPE_COLUMNS) <= carried.optics.keys() | carried.particles.keys():
        yield f"without a CTF it has no {' and no '.join(MICROSCOPE_COLUMNS)}, which RELION 3.1 asks of any STAR"
    if content.applied is not None and content.applied.any():
        yield "that pixels are multiplied by their CTF already (ctf_applied) has no column: left out"
    if not (getattr(content.stack, "is_flat", True) or _keeps_view(content)):
        yield "rot and tilt of a view in space give way to the poses in the plane, which psi alone was taken for"
    if getattr(content.stack, "is_inverted", False) and content.change is None:
        yield "it names the images as they are in their files, not inverted though their blob/sign is -1"


def _pose_columns(content, pixel_size_A):
    if content.poses is None:
        return {}
    angles = to_angles(content.poses)
    columns = {"rlnAngleRot": angles["rot"], "rlnAngleTilt": angles["tilt"], "rlnAnglePsi": angles["psi"],
               "rlnOriginXAngst": pixel_size_A * angles["origin_x"],
               "rlnOriginYAngst": pixel_size_A * angles["origin_y"]}
    if _keeps_view(content):
        columns = {label: values for label, values in columns.items() if label.startswith("rlnOrigin")}
    texts = {label: _texts(values) for label, values in columns.items()}
    if not _keeps_view(content):
        texts[MIRROR] = [str(mirror) for mirror in content.poses["mirror"].tolist()]
    if content.assign is not None:
        texts["rlnClassNumber"] = [str(k + 1) for k in content.assign.tolist()]
    return texts


def _keeps_view(content):
    """Whether rot and tilt are of a view in space, and no alignment has found other angles since."""
    if getattr(content.stack, "is_flat", True):
        return False
    return np.array_equal(content.stack.poses()["alpha"][content.indices], content.poses["alpha"])


def _make_optics(content):
    """An optics table for particles that have none, and the group of each, from 1."""
    if content.ctf is None:
        labels, kinds, group = (), np.zeros((1, 0)), np.zeros(content.n_images, int)
    else:
        constants = _constants(content.ctf)
        labels, values = constants.keys(), np.stack(list(constants.values()), axis=1)
        kinds, group = np.unique(np.round(values, 6), axis=0, return_inverse=True)
    optics = {"rlnOpticsGroup": [str(k + 1) for k in range(len(kinds))],
              "rlnOpticsGroupName": [f"opticsGroup{k + 1}" for k in range(len(kinds))]}
    optics |= {label: _texts(column) for label, column in zip(labels, kinds.T, strict=True)}
    return optics, [str(k + 1) for k in group.ravel().tolist()]


def _constants(ctf):
    """What all particles of an optics group have in common."""
    return {"rlnVoltage": ctf["voltage_kV"], "rlnSphericalAberration": ctf["cs_mm"],
            "rlnAmplitudeContrast": ctf["ampcont_percent"] / 100}


def _constant_columns(ctf):
    return {label: _texts(values) for label, values in _constants(ctf).items()}


def _ctf_columns(ctf):
    u, v, angle = to_defoci(ctf)
    columns = {"rlnDefocusU": u, "rlnDefocusV": v, "rlnDefocusAngle": angle, "rlnPhaseShift": ctf["phase_shift_deg"],
               "rlnCtfBfactor": ctf["bfactor_A2"]}
    return {label: _texts(values) for label, values in columns.items()}


def _texts(values):
    return [f"{value:.8f}" for value in values.tolist()]


def _quoted(text):
    return f"'{text}'" if any(character.isspace() for character in text) else text
