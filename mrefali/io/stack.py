"""What the stacks of all file formats do alike. Imports ctf, geometry, pictures and errors of ours only."""

import html
import shlex
from itertools import islice

import numpy as np

from mrefali import pictures
from mrefali.ctf import CTF_PARAMETERS, LIMITS, check_ctf, format_ctf, parse_ctf
from mrefali.errors import InputError
from mrefali.geometry import CONVERTED_AT_ONCE, POSE, from_matrices, identity_poses, to_matrices

#: Images that a stack shows of itself in Jupyter, their largest side in px, and their quality as a JPEG.
SHOWN, SHOWN_SIDE, SHOWN_QUALITY = 10, 96, 80


class FileStack:
    """The images of a file; a format sets the attributes, and adds ``values`` and ``_read``.

    Attributes
    ----------
    path : str
    n_images : int
    box : int, px
    pixel_size_A : float or None
    keys : sequence of int
        What the file calls each image.
    read_only : bool
        Whether files of the format are never written to.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
        On opening, which gives the path of the file.
    InputError
        If the file is none of the format, or damaged.
    """

    read_only = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Nothing is left open; ``with`` only marks where the stack is in use."""

    def __len__(self):
        return self.n_images

    def __repr__(self):
        size = "" if self.pixel_size_A is None else f", {self.pixel_size_A:g} A a pixel"
        return f"<mrefali.Stack {self.path}: {self.n_images} images of {self.box} x {self.box} px{size}>"

    def _repr_html_(self):
        """What Jupyter shows: what it is, and its first images; None where Pillow is missing."""
        if not pictures.can_encode():
            return None
        shown = [pictures.fit(pictures.grey(image), SHOWN_SIDE) for image in self.read(0, min(SHOWN, self.n_images))]
        picture = pictures.data_uri(pictures.jpeg(pictures.strip(shown), SHOWN_QUALITY))
        return f'<div><p>{html.escape(repr(self)[1:-1])}</p><img alt="the first images" src="{picture}"></div>'

    def read(self, start, stop):
        """Images ``start`` to ``stop`` (exclusive), ``(stop - start, box, box) float32``."""
        return self.read_at(np.arange(start, stop))

    def read_at(self, indices):
        """The images of these indices, ``(len(indices), box, box) float32``, in the order given."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n_images:
            raise IndexError(f"images {indices.min()} to {indices.max()} of {self.path} asked for: "
                             f"it has 0 to {self.n_images - 1}")
        return self._read(indices)

    def column(self, name):
        """One header of every image, a list as long as the stack; None where an image lacks it."""
        return list(self.values(name))

    def poses(self):
        """``(n_images,) POSE`` from ``xform.align2d``; InputError if an image has none."""
        poses, matrices = np.empty(self.n_images, POSE), self.values("xform.align2d")
        for first in range(0, self.n_images, CONVERTED_AT_ONCE):
            some = list(islice(matrices, CONVERTED_AT_ONCE))
            self._check_matrices(first, some)
            poses[first:first + len(some)] = from_matrices(some)
        return poses

    def _check_matrices(self, first, matrices):
        """Raise InputError unless these, of image ``first`` and those after it, are transforms."""
        reset = f"mrefali header {shlex.quote(self.path)} --params=xform.align2d --zero"
        for i, matrix in enumerate(matrices, first):
            if matrix is None:
                raise InputError(f"image {self.keys[i]} of {self.path} has no xform.align2d: set it with {reset}")
            if not _is_transform(matrix):
                raise InputError(f"xform.align2d of image {self.keys[i]} of {self.path} is no transform of finite "
                                 f"numbers: reset it with {reset}")

    def has_poses(self):
        """Whether any image has a pose."""
        return any(matrix is not None for matrix in self.values("xform.align2d"))

    def all_have_poses(self):
        """Whether every image has a pose, and one of finite numbers."""
        return all(map(_is_transform, self.values("xform.align2d")))

    def ctf(self):
        """The CTFs of all images, from the headers ``ctf`` and ``ctf_applied``.

        Returns
        -------
        parameters : (n_images,) CTF_PARAMETERS
        applied : (n_images,) bool
            Whether the pixels are multiplied already.

        Raises
        ------
        InputError
            Names the first image that has none, or one that makes no sense.
        """
        known = {}  # a stack has far fewer micrographs than particles
        parameters = np.empty(self.n_images, CTF_PARAMETERS)
        for i, text in enumerate(self.values("ctf")):
            if text is None:
                raise InputError(f"{self.path}: image {i} has no header ctf: set it, or leave --CTF out")
            text = str(text)  # parse_ctf refuses what is no text at all
            if text not in known:
                try:
                    known[text] = parse_ctf(text)
                except InputError as error:
                    raise InputError(f"{self.path}: image {i}: {error}") from error
            parameters[i] = known[text]
        return parameters, self._read_applied()

    def known_ctf(self):
        """As :meth:`ctf`; a pair of None where no image has one."""
        return self.ctf() if any(text is not None for text in self.values("ctf")) else (None, None)

    def _read_applied(self):
        applied = np.zeros(self.n_images, bool)
        for i, value in enumerate(self.values("ctf_applied")):
            if value not in (None, 0, 1):
                raise InputError(f"{self.path}: image {i} has ctf_applied={value}: 0 (not multiplied by the CTF) or "
                                 "1 (multiplied) is allowed")
            applied[i] = value == 1
        return applied


def _is_transform(matrix):
    return np.shape(matrix) == (3, 4) and np.isfinite(matrix).all()


class ReadOnlyStack(FileStack):
    """The images of a file that is never written to; a format sets the attributes and adds ``_read``.

    What the file says of the particles is held in columns.

    Attributes
    ----------
    _poses : (n_images,) POSE or None
    _assign : (n_images,) int32 or None
    _ctf : (n_images,) CTF_PARAMETERS or None
    """

    read_only = True
    _poses = _assign = _ctf = None

    @property
    def keys(self):
        return range(self.n_images)

    def has_poses(self):
        """Whether the file has poses."""
        return self._poses is not None

    def poses(self):
        """``(n_images,) POSE``; the identity where the file has none. InputError if a number is not finite."""
        if self._poses is None:
            return identity_poses(self.n_images)
        spoiled = np.flatnonzero(~self._have_finite_poses())
        if spoiled.size:
            raise InputError(f"{self.path}: image {spoiled[0]} has a pose with NaN or infinity: make the file anew, or "
                             "give it to mrefali classify, which asks for no poses")
        return self._poses

    def all_have_poses(self):
        """Whether every image has a pose, and one of finite numbers."""
        return self._poses is not None and bool(self._have_finite_poses().all())

    def _have_finite_poses(self):
        return np.isfinite([self._poses[name] for name in ("alpha", "sx", "sy")]).all(axis=0)

    def ctf(self):
        """As :meth:`FileStack.ctf`; nothing is multiplied by its CTF in the files of these formats."""
        if self._ctf is None:
            raise InputError(f"{self.path} has no CTF ({self._explain_no_ctf()}): leave --CTF out")
        for name, (low, high) in LIMITS.items():
            for i in np.flatnonzero(~((self._ctf[name] >= low) & (self._ctf[name] <= high)))[:1]:
                try:
                    check_ctf(self._ctf[i])
                except InputError as error:
                    raise InputError(f"{self.path}: image {i}: {error}") from error
        return self._ctf, np.zeros(self.n_images, bool)

    def known_ctf(self):
        """As :meth:`ctf`, though possibly nonsense; a pair of None where the file has none."""
        return (None, None) if self._ctf is None else (self._ctf, np.zeros(self.n_images, bool))

    def _explain_no_ctf(self):
        return "its format has no place for one"

    def header_names(self):
        """How many images have each header: name -> count."""
        held = {"xform.align2d": self._poses, "assign": self._assign, "ctf": self._ctf}
        held |= dict.fromkeys(("apix_x", "apix_y", "apix_z"), self.pixel_size_A)
        return {name: self.n_images for name, values in held.items() if values is not None}

    def header(self, index):
        """The headers of one image that the file knows: ``xform.align2d``, ``assign``, ``ctf``, ``apix_x`` ..."""
        return {name: self._values(name, slice(index, index + 1))[0] for name in self.header_names()}

    def values(self, name):
        """One header of every image, one after the other; all None if the file does not know it."""
        return iter(self._values(name, slice(None)) if name in self.header_names() else [None] * self.n_images)

    def _values(self, name, rows):
        if name == "xform.align2d":
            return to_matrices(self._poses[rows])
        if name == "assign":
            return self._assign[rows].tolist()
        if name == "ctf":
            return [self._format_ctf(i) for i in range(*rows.indices(self.n_images))]
        return [self.pixel_size_A] * len(range(*rows.indices(self.n_images)))

    def _format_ctf(self, i):
        try:
            return format_ctf(self._ctf[i])
        except InputError as error:
            raise InputError(f"{self.path}: image {i}: {error}") from None

    def write_back_obstacle(self):
        """Why no header of this stack is written."""
        return "files of this format are never written to"

    def write_columns(self, columns):
        """Raise InputError: these files stay as they are."""
        raise InputError(f"{self.path} is never written to, as no file but HDF and bdb is: mrefali convert "
                         f"{shlex.quote(self.path)} NEW.hdf makes a stack whose {', '.join(columns)} can be set")
