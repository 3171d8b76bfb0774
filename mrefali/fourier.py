"""Images as band-limited functions: moved by their poses, as :func:`mrefali.average.transform` does; shrunk.

Arrays in, arrays out: this module knows no file and no rank. Imports average, geometry, the compiled kernels and
reference only.
"""

import functools

import numba
import numpy as np
import scipy.fft

from mrefali import average
from mrefali.compiled import kernels
from mrefali.geometry import inverse_shift
from mrefali.reference import fourier_shift

#: How much larger than by ``average.LARGEST_GAIN`` the largest pixel may become: a band-limited function may swing far
#: beyond its samples, some 6 times per axis in a box of 1024 px if all of them conspire.
EXTRA_GAIN = 64.0

#: Samples a pixel, each way, of the grid on which a rotation is read.
OVERSAMPLING = 2

#: Shape of the weights: that of Potts and Steidl, whose aliases of a frequency up to n / 2 add up to 1e-6 of it.
BETA = np.pi * kernels.TAPS * (1 - 0.5 / OVERSAMPLING)

#: Memory that rotations work in, and what an image takes of it for each of its pixels; one image is always done.
BLOCK_BYTES, PIXEL_BYTES = 4 << 20, 72


def transform(images, poses):
    """Images moved by their poses (SPEC section 2) as band-limited functions.

    An image counts as one period of the trigonometric polynomial through its pixels, so what leaves it at one
    side comes in at the other. A shift alone is a factor in Fourier space, and exact. With a rotation the polynomial
    is read from a grid twice as fine, as a non-uniform FFT does: by the 8 x 8 samples about each place with the
    weights of Kaiser and Bessel, whose own transform is divided out beforehand. That errs by at most 3e-6 of the
    amplitude, at the highest frequency of the image, where it is worst.

    Parameters
    ----------
    images : (n_images, n, n) float32
        All pixels finite.
    poses : (n_images,) geometry.POSE

    Returns
    -------
    (n_images, n, n) float32

    Raises
    ------
    ValueError
        If a pose with a rotation is not finite.
    """
    n = images.shape[-1]
    moved = np.empty_like(images)
    turned = poses["alpha"] % 360 != 0
    for i in np.flatnonzero(~turned):
        moved[i] = _shift(images[i], poses[i])
    turned, step = np.flatnonzero(turned), max(1, BLOCK_BYTES // (PIXEL_BYTES * n**2))
    for first in range(0, len(turned), step):
        block = turned[first:first + step]
        moved[block] = _rotate_and_shift(images[block], poses[block])
    opposite = (2 * (n // 2) - np.arange(n)) % n
    for i in np.flatnonzero(poses["mirror"]):
        moved[i] = moved[i][:, opposite]
    return moved


def work_bytes(box):
    """Memory that :func:`transform` takes beside the images and what becomes of them."""
    return max(BLOCK_BYTES, PIXEL_BYTES * box**2)


def _shift(image, pose):
    if pose["sx"] or pose["sy"]:
        return fourier_shift(image.astype(np.float64), (pose["sx"], pose["sy"]))
    return image


def _rotate_and_shift(images, poses):
    """R p + s of SPEC section 2 on pixels: each takes the value at R^T (p - s)."""
    n = images.shape[-1]
    c = n // 2
    angle = np.deg2rad(poses["alpha"])
    cosine, sine = np.cos(angle), np.sin(angle)
    corner = inverse_shift(poses) + c * np.stack([1 - cosine + sine, 1 - sine - cosine], axis=1)
    if not np.isfinite(corner).all():  # where the kernel would read beside the image
        bad = poses[np.flatnonzero(~np.isfinite(corner).all(axis=1))[0]]
        raise ValueError(f"the pose {bad} leads nowhere: give finite numbers")
    # a whole period less is the same place, and one that the kernel counts samples to without loss
    first = OVERSAMPLING * np.mod(corner, n) - (kernels.TAPS // 2 - 1)
    step = OVERSAMPLING * np.stack([cosine, sine], axis=1)
    moved = np.empty_like(images)
    kernels.read_turned(_fine_grids(images), first, step, _tap_weights(), moved)
    return moved


def _fine_grids(images):
    """The polynomials through the pixels, made ready to be read by ``_tap_weights``, on finer grids.

    Returns
    -------
    (n_images, m, m) float32
        ``OVERSAMPLING`` n samples a period, and at the far edges the first ``kernels.TAPS`` once more.
    """
    n, period = images.shape[-1], OVERSAMPLING * images.shape[-1]
    half, workers = n // 2, numba.get_num_threads()
    spectra = scipy.fft.rfft2(images, workers=workers)
    factors = _spectrum_factors(n)
    spectra *= factors[np.abs(np.r_[0:n - half, -half:0]), None] * factors
    padded = np.zeros((len(images), period, half + 1), spectra.dtype)
    padded[:, :half + 1] = spectra[:, :half + 1]
    padded[:, -half:] = spectra[:, -half:]  # the row at n / 2 of an even box is at both ends
    columns = scipy.fft.ifft(padded, axis=1, overwrite_x=True, workers=workers)
    fine = np.empty((len(images), period + kernels.TAPS, period + kernels.TAPS), np.float32)
    fine[:, :period, :period] = scipy.fft.irfft(columns, period, axis=2, workers=workers)
    fine[:, :period, period:] = fine[:, :period, :kernels.TAPS]
    fine[:, period:] = fine[:, :kernels.TAPS]
    return fine


@functools.cache
def _tap_weights():
    """Weights of the samples about a place, (kernels.TABLE_STEPS + 1, kernels.TAPS) float32, see ``read_turned``."""
    fraction = np.linspace(0, 1, kernels.TABLE_STEPS + 1)[:, None]
    distance = np.arange(kernels.TAPS) - (kernels.TAPS // 2 - 1) - fraction
    return np.i0(BETA * np.sqrt(1 - (2 * distance / kernels.TAPS) ** 2)).astype(np.float32)


@functools.cache
def _spectrum_factors(n):
    """What frequencies 0 to n // 2 of an axis are multiplied by on their way to the finer grid, float32."""
    turns = np.pi * kernels.TAPS * np.arange(n // 2 + 1) / (OVERSAMPLING * n)
    root = np.sqrt(BETA**2 - turns**2)
    factors = OVERSAMPLING * root / (kernels.TAPS * np.sinh(root))
    if n % 2 == 0:
        factors[-1] /= 2  # it stands for -n / 2 too
    return factors.astype(np.float32)


def half_spectrum(n):
    """The coefficients that ``rfft2`` leaves of an image of n x n.

    Returns
    -------
    radius : (n, n // 2 + 1) float64
        In Fourier pixels.
    times : (n // 2 + 1,) int64
        Coefficients of the whole spectrum that one of the column stands for, itself and its mirror image.
    """
    column = np.arange(n // 2 + 1)
    radius = np.hypot(scipy.fft.fftfreq(n, 1 / n)[:, None], column)
    return radius, np.where((column == 0) | (2 * column == n), 1, 2)


def shrink_factor(box, about):
    """The factor by which :func:`shrink` makes images of ``box`` px such of ``about`` px, or leaves smaller ones."""
    return max(1, round(box / about))


def shrink(images, factor):
    """Images whose pixels are ``factor`` times as large: what lies below the new Nyquist frequency, mean kept.

    The centre, pixel n // 2, stays the centre. A box that is no multiple of ``factor`` is cut about it first.

    Parameters
    ----------
    images : (k, n, n) float32
    factor : int

    Returns
    -------
    (k, n // factor, n // factor) float32
    """
    n = images.shape[-1]
    m = n // factor
    start = n // 2 - m * factor // 2
    cut = slice(start, start + m * factor)
    spectra = scipy.fft.rfft2(scipy.fft.ifftshift(images[:, cut, cut], axes=(1, 2)))
    highest = (m - 1) // 2  # below Nyquist, where sign and size of a term are one
    rows, columns = np.r_[0:highest + 1, -highest:0], slice(highest + 1)
    kept = np.zeros((len(images), m, m // 2 + 1), spectra.dtype)
    kept[:, rows, columns] = spectra[:, rows, columns]
    small = scipy.fft.irfft2(kept, s=(m, m)) / factor**2
    return scipy.fft.fftshift(small, axes=(1, 2)).astype(np.float32, copy=False)


#: The ways to find values between pixels, by name.
INTERPOLATIONS = {"quadratic": average.transform, "fourier": transform}
