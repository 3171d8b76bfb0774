"""Class sums: add, merge, finish to averages and FRC (SPEC sections 5 and 6).

Arrays in, arrays out: this module knows no file and no rank. Imports ctf and the compiled kernels only.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft

from mrefali.compiled import kernels
from mrefali.ctf import n_radii

#: The six-point formula is a sum of pixels whose weights add up to less than this in absolute value.
LARGEST_GAIN = 4.0


@dataclass(frozen=True)
class PixelStatistics:
    """What normalisation needs to know of images, one entry an image.

    Attributes
    ----------
    mean, deviation : (n_images,) float64
        Under the mask; population standard deviation.
    lowest, highest : (n_images,) float64
        Of the whole image; NaN where a pixel is NaN or infinite.
    """

    mean: np.ndarray
    deviation: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray

    @property
    def largest(self):
        """Largest absolute pixel of the normalised images."""
        low, high = ((edge - self.mean) / self.deviation for edge in (self.lowest, self.highest))
        return max(np.abs(low).max(initial=0.0), np.abs(high).max(initial=0.0))


def pixel_statistics(images, inside):
    """``PixelStatistics`` of ``(n_images, n, n) float32`` images under ``(n, n) bool``."""
    mean, deviation, lowest, highest = np.empty((4, len(images)))
    kernels.describe(images, inside, mean, deviation, lowest, highest)
    return PixelStatistics(mean, deviation, lowest, highest)


def normalize_particles(images, inside):
    """Images minus their mean, divided by their standard deviation under ``inside`` (SPEC section 6), in place.

    Parameters
    ----------
    images : (n_images, n, n) float32
    inside : (n, n) bool
        Where the mask is not 0.
    """
    statistics = pixel_statistics(images, inside)
    kernels.subtract_and_divide(images, statistics.mean, statistics.deviation)


def normalize_references(references, inside):
    """References minus their mean under ``inside`` (SPEC section 6), as a new float32 array."""
    return (references - references[:, inside].mean(axis=1, dtype=np.float64)[:, None, None]).astype(np.float32)


def transform(images, poses):
    """Images moved by their poses with the six-point quadratic formula (SPEC section 2).

    Parameters
    ----------
    images : (n_images, n, n) float32
    poses : (n_images,) geometry.POSE

    Returns
    -------
    (n_images, n, n) float32
    """
    moved = np.empty_like(images)
    alpha = np.deg2rad(poses["alpha"])
    kernels.transform(images, np.cos(alpha), np.sin(alpha), np.ascontiguousarray(poses["sx"]),
                      np.ascontiguousarray(poses["sy"]), np.ascontiguousarray(poses["mirror"]), moved)
    return moved


def _unit(largest_sum):
    """The power of two of which 2**62 make up a sum that is never reached."""
    return 2.0 ** (math.ceil(math.log2(largest_sum)) - 62)


class ClassSums:
    """Sums of the aligned particles of each class and half, in fixed point.

    The numbers are whole multiples of ``unit``, so a sum is the same in whatever order, on whatever number of
    threads and ranks it was made, to the bit.

    Parameters
    ----------
    n_classes, box : int
    n_particles : int
        Of the whole stack.
    largest : float
        Largest absolute pixel of any normalised particle.
    with_ctf : bool
        Whether CTF^2 is summed too.
    move : callable
        Of images and poses, :func:`transform` or another interpolation.

    Attributes
    ----------
    sums : (n_classes, 2, box, box) int64
        In units of ``unit``; even and odd half.
    ctf_sums : (n_classes, 2, n_radii) int64 or None
        CTF^2 at whole Fourier pixels, in units of ``ctf_unit``.
    """

    def __init__(self, n_classes, box, n_particles, largest, with_ctf=False, move=transform):
        self.move = move
        self.sums = np.zeros((n_classes, 2, box, box), np.int64)
        self.unit = _unit(n_particles * LARGEST_GAIN * max(largest, 1.0))
        self.ctf_sums = np.zeros((n_classes, 2, n_radii(box)), np.int64) if with_ctf else None
        self.ctf_unit = _unit(n_particles)

    def add(self, images, poses, assign, numbers, ctf_sq=None):
        """Add normalised particles.

        Parameters
        ----------
        images : (n_images, n, n) float32
        poses : (n_images,) geometry.POSE
        assign : (n_images,) int
        numbers : (n_images,) int
            Their indices in the stack, whose parity is the half.
        ctf_sq : (n_images, n_radii) float64, optional
            Their weights in the Wiener division, see :func:`mrefali.ctf.ctf_sq`.
        """
        half = numbers % 2
        kernels.add_to_classes(self.move(images, poses), assign, half, self.unit, self.sums)
        if ctf_sq is not None:
            np.add.at(self.ctf_sums, (assign, half), np.rint(ctf_sq / self.ctf_unit).astype(np.int64))

    def merge(self, comm):
        """Add up the sums of all ranks, on every rank."""
        comm.sum_into(self.sums)
        if self.ctf_sums is not None:
            comm.sum_into(self.ctf_sums)

    def ctf_sq(self, k):
        """Sums of CTF^2 of the two halves of class ``k``, (2, n_radii) float64."""
        return self.ctf_sums[k] * self.ctf_unit

    def halves(self, k):
        """The two half sums of class ``k``, (2, n, n) float64."""
        return self.sums[k] * self.unit


def frc(first, second):
    """Fourier ring correlation of two images (SPEC section 5).

    Parameters
    ----------
    first, second : (n, n) float64

    Returns
    -------
    (n // 2 + 1, 3) float64
        Spatial frequency in 1/px, correlation (0 where a ring has no power), and twice the number of coefficients.
    """
    n = first.shape[0]
    half = n // 2
    ky = scipy.fft.fftfreq(n, 1 / n)[:, None]
    kx = np.arange(half + 1)[None, :]
    ring = np.floor(np.hypot(kx, ky) + 0.5).astype(int)
    # of the column kx = 0 one half repeats the other; the row at n/2 of an even image has no counterpart
    counted = (ring <= half) & ((kx > 0) | (ky >= 0) | (2 * ky == -n))
    a, b = scipy.fft.rfft2(first)[counted], scipy.fft.rfft2(second)[counted]
    ring = ring[counted]
    cross, power_a, power_b = (np.bincount(ring, values, half + 1) for values in (
        (a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2))
    power = np.sqrt(power_a * power_b)
    value = np.divide(cross, power, out=np.zeros(half + 1), where=power > 0)
    return np.stack([np.arange(half + 1) / (2 * half), value, 2.0 * np.bincount(ring, minlength=half + 1)], axis=1)


def criterion(averages, core):
    """Sum over references of the mean over ``core`` of the squared average (SPEC section 5)."""
    return float((averages[:, core].astype(np.float64) ** 2).mean(axis=1).sum())
