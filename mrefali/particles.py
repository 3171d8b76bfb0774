"""The particles of a stack as the search takes them: multiplied by their CTF if asked for, normalised.

Imports average and ctf; reads through whatever stack it is given.
"""

from dataclasses import dataclass

import numpy as np

from mrefali import average
from mrefali.ctf import CtfKernels, ctf_sq, premultiply

#: Pixels read and searched at a time, as bytes of float32.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class StackCtf:
    """The CTFs of a stack.

    Attributes
    ----------
    parameters : (n_particles,) ctf.CTF_PARAMETERS
    applied : (n_particles,) bool
        Whether the pixels are multiplied already.
    snr : float
        Of the Wiener term.
    """

    parameters: np.ndarray
    applied: np.ndarray
    snr: float


class Particles:
    """Images of a stack, ready to be searched.

    Parameters
    ----------
    stack
        Anything with ``n_images``, ``box``, ``read(start, stop)`` and ``read_at(indices)``, see :mod:`mrefali.io`.
    inside : (n, n) bool
        Where normalisation looks: mask != 0.
    ctf : StackCtf, optional
    """

    def __init__(self, stack, inside, ctf=None):
        self.stack, self.inside, self.ctf = stack, inside, ctf
        self.n_images, self.box = stack.n_images, stack.box
        self._kernels = None if ctf is None else CtfKernels(stack.box)

    def blocks(self, start, stop):
        """First and one past the last of each block of ``BLOCK_BYTES`` between two particles."""
        size = max(1, BLOCK_BYTES // (4 * self.box * self.box))
        return [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def read(self, indices):
        """Normalised images; ``indices`` is an array, or a slice with start and stop.

        Returns
        -------
        (n_indices, n, n) float32
        """
        images = self.multiplied(indices)
        average.normalize_particles(images, self.inside)
        return images

    def multiplied(self, indices):
        """The same before normalisation."""
        if isinstance(indices, slice):
            images = self.stack.read(indices.start, indices.stop)
        else:
            images = self.stack.read_at(indices)
        if self.ctf is not None:
            premultiply(images, self.ctf.parameters[indices], self.ctf.applied[indices], self._kernels)
        return images

    def ctf_sq(self, indices):
        """Weights of the Wiener division, (n_indices, n_radii) float64; None without CTF."""
        return None if self.ctf is None else ctf_sq(self.ctf.parameters[indices], self.box)
