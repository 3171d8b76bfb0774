"""cryoSPARC's .cs files: particles in .mrc files, read only. Imports errors and io of ours.

A .cs file is numpy's format with one record a particle, whose fields are called ``blob/path``, ``ctf/df1_A`` and so on.
What a job did not change stands in its passthrough file, joined by ``uid``.
"""

import glob
import os

import numpy as np

from mrefali.errors import InputError
from mrefali.io.mrc import MrcImages, find_files, logger, read_layout
from mrefali.io.npy import map_array
from mrefali.io.relion import from_angles, make_ctf
from mrefali.io.stack import ReadOnlyStack
from mrefali.io.star import SAME_PIXEL_SIZE, Table

NEEDED = ("blob/path", "blob/idx", "blob/psize_A")

#: The fields of a CTF, and what stands in for one that is not there.
CTF_FIELDS = {"ctf/df1_A": None, "ctf/df2_A": None, "ctf/df_angle_rad": None, "ctf/accel_kv": None, "ctf/cs_mm": None,
              "ctf/amp_contrast": None, "ctf/phase_shift_rad": 0.0, "ctf/bfactor": 0.0}

POSE_FIELDS = ("alignments2D/pose", "alignments2D/shift", "alignments2D/psize_A")

LOCATION_FIELDS = ("location/micrograph_path", "location/micrograph_shape", "location/center_x_frac",
                   "location/center_y_frac")


class CsStack(ReadOnlyStack):
    """The particles of a cryoSPARC .cs file.

    Images whose ``blob/sign`` is -1 are read inverted, as cryoSPARC itself takes them.

    Parameters
    ----------
    path : str or path

    Attributes
    ----------
    images : MrcImages
        As they stand in the files.
    is_inverted : bool
        Whether any image is.

    Other attributes, and errors, are those of :class:`mrefali.io.stack.FileStack`.
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        fields = _join_passthrough(self.path, _load(self.path))
        for name in NEEDED:
            if name not in fields:
                raise InputError(f"{self.path} has no field {name}, and no passthrough file beside it has it for all "
                                 f"its particles: give the particles of a job together with its passthrough file")
        self.n_images = len(fields["blob/path"])
        self.pixel_size_A = _pixel_size(self.path, fields["blob/psize_A"])
        self.images = _find_images(self.path, fields)
        self.box = self.images.box
        self._check_shape(fields.get("blob/shape"))
        self._sign = np.sign(fields.get("blob/sign", np.ones(self.n_images))).astype(np.float32)
        self.is_inverted = bool((self._sign < 0).any())
        self._poses = self._read_poses(fields)
        classes = fields.get("alignments2D/class")
        self._assign = None if classes is None else classes.astype(np.int32)
        self._ctf = self._read_ctf(fields)
        self._location = {name: fields[name] for name in ("uid", *LOCATION_FIELDS) if name in fields}
        known = {*NEEDED, *CTF_FIELDS, *POSE_FIELDS, *self._location, "blob/shape", "blob/sign", "alignments2D/class"}
        self.not_carried = sorted(fields.keys() - known)

    def _check_shape(self, shapes):
        for i in np.flatnonzero((shapes != self.box).any(axis=1))[:1] if shapes is not None else ():
            raise InputError(f"particle {i} of {self.path} has blob/shape {tuple(shapes[i].tolist())}, but its image "
                             f"has {self.box} x {self.box} pixels: restore the file it was made from")

    def _read_poses(self, fields):
        if not all(name in fields for name in POSE_FIELDS):
            return None
        sizes = fields["alignments2D/psize_A"].astype(np.float64)
        shift = fields["alignments2D/shift"].astype(np.float64) * (sizes / self.pixel_size_A)[:, None]
        return from_angles(np.rad2deg(fields["alignments2D/pose"].astype(np.float64)), shift[:, 0], shift[:, 1])

    def _read_ctf(self, fields):
        if any(name not in fields and default is None for name, default in CTF_FIELDS.items()):
            return None
        u, v, angle, voltage, cs, contrast, phase_shift, bfactor = (
            fields[name].astype(np.float64) if name in fields else np.full(self.n_images, default)
            for name, default in CTF_FIELDS.items())
        return make_ctf(u, v, np.rad2deg(angle), voltage, cs, contrast, self.pixel_size_A, np.rad2deg(phase_shift),
                        bfactor)

    def _explain_no_ctf(self):
        return f"it lacks some of the fields {', '.join(CTF_FIELDS)}"

    def _read(self, indices):
        return self.images.read(indices) * self._sign[indices][:, None, None]

    def table(self):
        """What RELION has columns for and no other part of a stack says: micrographs and coordinates; and the uid."""
        columns = {}
        if "uid" in self._location:
            columns["mrefaliUid"] = [str(uid) for uid in self._location["uid"].tolist()]
        if all(name in self._location for name in LOCATION_FIELDS):
            names, shapes, x, y = (self._location[name] for name in LOCATION_FIELDS)
            columns["rlnMicrographName"] = [_text(name) for name in names.tolist()]
            columns["rlnCoordinateX"] = [f"{value:.6f}" for value in (x * shapes[:, 1]).tolist()]
            columns["rlnCoordinateY"] = [f"{value:.6f}" for value in (y * shapes[:, 0]).tolist()]
        return Table({}, columns, {})


def _load(path):
    records = map_array(path)
    if records.dtype.names is None or records.ndim != 1 or not records.size:
        raise InputError(f"{path} holds {records.dtype} of the shape {records.shape}: a .cs file holds records, at "
                         f"least one")
    return {name: np.array(records[name]) for name in records.dtype.names}


def _join_passthrough(path, fields):
    """``fields``, and those that only a passthrough file in the same folder has."""
    if "uid" not in fields:
        return fields
    for other in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*passthrough*.cs"))):
        records = map_array(other)
        names = records.dtype.names or ()
        missing = [name for name in names if name not in fields]
        if os.path.samefile(other, path) or "uid" not in names or not missing:
            continue
        order = np.argsort(records["uid"])
        rows = order[np.minimum(np.searchsorted(records["uid"], fields["uid"], sorter=order), len(order) - 1)]
        if (records["uid"][rows] == fields["uid"]).all():
            fields = fields | {name: records[name][rows] for name in missing}
            groups = sorted({name.split("/")[0] for name in missing})
            logger.info("%s: %s joined by uid from %s", path, ", ".join(groups), other)
    return fields


def _pixel_size(path, sizes):
    bad = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))
    if bad.size:
        raise InputError(f"blob/psize_A of particle {bad[0]} of {path} is {sizes[bad[0]]:g}: it must be above 0")
    other = np.flatnonzero(np.abs(sizes - sizes[0]) > SAME_PIXEL_SIZE * sizes[0])
    if other.size:
        raise InputError(f"{path} mixes pixel sizes: particle {other[0]} has {sizes[other[0]]:g} A, particle 0 "
                         f"{sizes[0]:g} A; choose those of one")
    return float(sizes[0])


def _find_images(path, fields):
    names, first, source = np.unique(fields["blob/path"], return_index=True, return_inverse=True)
    files = find_files([_text(name).removeprefix(">") for name in names.tolist()], path, first.tolist())
    return MrcImages(path, [read_layout(file) for file in files], source.astype(np.int32).ravel(),
                     fields["blob/idx"].astype(np.int64))


def _text(name):
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
