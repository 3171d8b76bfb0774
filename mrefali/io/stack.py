"""What the stacks of all file formats do alike. Imports geometry and errors of ours only."""

import shlex

import numpy as np

from mrefali.errors import InputError
from mrefali.geometry import from_matrices


class FileStack:
    """The images of a file; a format sets the attributes, and adds ``column`` and ``_read``.

    Attributes
    ----------
    path : str
    n_images : int
    keys : sequence of int
        What the file calls each image.
    """

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Nothing is left open; ``with`` only marks where the stack is in use."""

    def __len__(self):
        return self.n_images

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
