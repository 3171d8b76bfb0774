"""Images as band-limited functions: moved by their poses, as :func:`mrefali.average.transform` does; shrunk.

Arrays in, arrays out: this module knows no file and no rank. Imports average, geometry and reference only.
"""

import numpy as np
import scipy.fft
from scipy.ndimage import map_coordinates
from scipy.signal import resample

from mrefali import average
from mrefali.geometry import inverse_shift
from mrefali.reference import fourier_shift

#: How much larger than by ``average.LARGEST_GAIN`` the largest pixel may become: a band-limited function may swing far
#: beyond its samples, some 6 times per axis and pass in a box of 1024 px if all of them conspire.
EXTRA_GAIN = 64.0

#: Samples a pixel, each way, of the grid on which a rotation is read.
OVERSAMPLING = 4


def transform(images, poses):
    """Images moved by their poses (SPEC section 2) as band-limited functions.

    An image counts as one period of the trigonometric polynomial through its pixels, so what leaves it at one
    side comes in at the other. A shift is a factor in Fourier space, and exact. A rotation reads the polynomial,
    computed on a grid four times as fine, by a spline of degree five: at the highest frequency of the image, where
    it is worst, that errs by (1/7)^6, some 1e-5 of the amplitude.

    Parameters
    ----------
    images : (n_images, n, n) float32
    poses : (n_images,) geometry.POSE

    Returns
    -------
    (n_images, n, n) float32
    """
    moved = np.empty_like(images)
    for image, pose, out in zip(images, poses, moved, strict=True):
        out[:] = _transform_one(image.astype(np.float64), pose)
    return moved


def _transform_one(image, pose):
    if pose["sx"] or pose["sy"]:
        image = fourier_shift(image, -inverse_shift(pose))  # before the rotation, whose corners are no period
    if pose["alpha"] % 360 != 0:
        image = _rotate(image, np.deg2rad(pose["alpha"]))
    if pose["mirror"]:
        n = len(image)
        image = image[:, (2 * (n // 2) - np.arange(n)) % n]
    return image


def _rotate(image, angle_rad):
    """``image``, (n, n) float64, turned about its centre by R of SPEC section 2."""
    n = len(image)
    fine = resample(resample(image, OVERSAMPLING * n, axis=0), OVERSAMPLING * n, axis=1)
    y, x = np.indices((n, n)) - n // 2
    cosine, sine = np.cos(angle_rad), np.sin(angle_rad)
    source = np.stack([sine * x + cosine * y, cosine * x - sine * y])  # y, x of R^T (x, y)
    return map_coordinates(fine, OVERSAMPLING * (source + n // 2), order=5, mode="grid-wrap")


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
