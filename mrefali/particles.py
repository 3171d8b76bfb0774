"""The particles of a stack as the search takes them: multiplied by their CTF if asked for, normalised.

Imports average, contrast, ctf and memory; reads through whatever stack it is given.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mrefali import average
from mrefali.contrast import Contrast
from mrefali.ctf import CtfKernels, ctf_sq, premultiply
from mrefali.memory import BLOCK_BYTES

#: Particles of which the contrast of all is taken, at most.
CONTRAST_PARTICLES = 500


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
    block_bytes : int
        Pixels read at a time, though never less than one image.
    """

    def __init__(self, stack, inside, ctf=None, block_bytes=BLOCK_BYTES):
        self.stack, self.inside, self.ctf = stack, inside, ctf
        self.block_size = max(1, block_bytes // (4 * stack.box**2))
        self.n_images, self.box = stack.n_images, stack.box
        self._kernels = None if ctf is None else CtfKernels(stack.box)

    def stream(self, start, stop):
        """Particles from ``start`` to ``stop``, a block at a time; a thread reads the next block meanwhile.

        That thread must run no kernel: one of numba's threading layers ends a process that enters it twice at a time.

        Yields
        ------
        block : slice
        images : (n, n_pixels, n_pixels) float32
            Multiplied by their CTF, not normalised.
        """
        blocks = [slice(first, min(first + self.block_size, stop)) for first in range(start, stop, self.block_size)]
        with ThreadPoolExecutor(1, "read ahead") as reader:
            coming = [reader.submit(self.multiplied, block) for block in blocks[:1]]
            for i, block in enumerate(blocks):
                images = coming.pop().result()  # or what was raised in reading
                coming = [reader.submit(self.multiplied, following) for following in blocks[i + 1:i + 2]]
                yield block, images
                del images  # the next but one takes its place

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

    def contrast(self, radius, mask=None):
        """The ``contrast.Contrast`` of some particles, evenly spaced among all."""
        some = np.unique(np.linspace(0, self.n_images - 1, CONTRAST_PARTICLES).astype(int))
        pieces = (some[first:first + self.block_size] for first in range(0, len(some), self.block_size))
        images = (image for piece in pieces for image in self.read(piece))
        if self.ctf is None:
            return Contrast(images, radius, mask)
        return Contrast(images, radius, mask, self.ctf_sq(some), self.ctf.snr)

    def ctf_sq(self, indices):
        """Weights of the Wiener division, (n_indices, n_radii) float64; None without CTF."""
        return None if self.ctf is None else ctf_sq(self.ctf.parameters[indices], self.box)
