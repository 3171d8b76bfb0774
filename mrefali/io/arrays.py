"""Images in memory, read like a file. Imports geometry and errors of ours only."""

from itertools import repeat

import numpy as np

from mrefali.errors import InputError
from mrefali.geometry import identity_poses


class ArrayStack:
    """The images of an array, with the reading methods of a file's stack.

    Parameters
    ----------
    images : (n_images, n, n) array_like
    name : str
        What messages call it.
    """

    pixel_size_A = None

    def __init__(self, images, name):
        self.path = name
        self._images = np.asarray(images)
        if self._images.ndim != 3 or self._images.shape[1] != self._images.shape[2] or not self._images.size:
            raise InputError(f"{name} has the shape {self._images.shape}: give (n, y, x) with square images")
        if self._images.dtype.kind not in "fiu":
            raise InputError(f"{name} holds {self._images.dtype}: give real numbers")
        self.n_images, self.box = self._images.shape[:2]

    def read(self, start, stop):
        """Images ``start`` to ``stop``, a new (stop - start, n, n) float32 array."""
        return self._images[start:stop].astype(np.float32)

    def read_at(self, indices):
        """The images of those indices, a new (n_indices, n, n) float32 array."""
        return self._images[indices].astype(np.float32)

    def poses(self):
        """``(n_images,) POSE``, all the identity."""
        return identity_poses(self.n_images)

    def values(self, name):
        """None for every image: an array has no headers."""
        return repeat(None, self.n_images)
