"""What the stacks of all file formats do alike. Imports geometry, pictures and errors of ours only."""

import html
import shlex

import numpy as np

from mrefali import pictures
from mrefali.errors import InputError
from mrefali.geometry import from_matrices

#: Images that a stack shows of itself in Jupyter, their largest side in px, and their quality as a JPEG.
SHOWN, SHOWN_SIDE, SHOWN_QUALITY = 10, 96, 80


class FileStack:
    """The images of a file; a format sets the attributes, and adds ``column`` and ``_read``.

    Attributes
    ----------
    path : str
    n_images : int
    box : int, px
    pixel_size_A : float or None
    keys : sequence of int
        What the file calls each image.
    """

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

    def poses(self):
        """``(n_images,) POSE`` from ``xform.align2d``; InputError if an image has none."""
        matrices = self.column("xform.align2d")
        reset = f"mrefali header {shlex.quote(self.path)} --params=xform.align2d --zero"
        for key, matrix in zip(self.keys, matrices, strict=True):
            if matrix is None:
                raise InputError(f"image {key} of {self.path} has no xform.align2d: set it with {reset}")
            if np.shape(matrix) != (3, 4) or not np.isfinite(matrix).all():
                raise InputError(f"xform.align2d of image {key} of {self.path} is no transform of finite numbers: "
                                 f"reset it with {reset}")
        return from_matrices(matrices)
