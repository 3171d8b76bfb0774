"""How well a pose can be known at all: the Cramer-Rao bound of a noise-free image in white noise (docs/accuracy.md).

Arrays in, arrays out: this module knows no file and no rank. Imports ctf only.
"""

import numpy as np
import scipy.fft

from mrefali.ctf import n_radii


def information(view):
    """What each ring of Fourier space tells of a pose, in noise of variance 1 a pixel.

    The pose errors are (sx, sy, alpha) of the small motion p' = R(alpha) p + s of the view itself, about pixel
    n // 2. The image then changes by g = (-df/dx, -df/dy, x df/dy - y df/dx), and a ring tells sum g_i g_j.

    Parameters
    ----------
    view : (n, n) array
        Noise-free; band-limited, as its derivatives are taken in Fourier space.

    Returns
    -------
    (n_radii, 3, 3) float64
        By whole Fourier pixels, see :func:`mrefali.ctf.n_radii`; 1/px^2, 1/(px degree), 1/degree^2.
    """
    n = len(view)
    frequency = scipy.fft.fftfreq(n)
    slope = np.where(2 * np.abs(frequency) == 1, 0.0, 2j * np.pi * frequency)  # at n/2 a derivative has no value
    spectrum = scipy.fft.fft2(view)
    dx, dy = scipy.fft.ifft2(spectrum * slope).real, scipy.fft.ifft2(spectrum * slope[:, None]).real
    place = np.arange(n) - n // 2
    turned = np.deg2rad(1.0) * (place * dy - place[:, None] * dx)
    spectra = scipy.fft.fft2(np.stack([-dx, -dy, turned]))
    ring = np.rint(n * np.hypot(frequency, frequency[:, None])).astype(int).ravel()
    products = np.einsum("iyx,jyx->ijyx", spectra, spectra.conj()).real.reshape(9, n * n) / n**2
    sums = [np.bincount(ring, product, n_radii(n)) for product in products]
    return np.stack(sums, axis=-1).reshape(-1, 3, 3)


def cramer_rao(informations, noise_variance, ctf_sq=None):
    """The smallest covariance that an unbiased estimate of (sx, sy, alpha) can have.

    Parameters
    ----------
    informations : (..., n_radii, 3, 3) float64
        See :func:`information`.
    noise_variance : (...) float
        Of white noise, per pixel.
    ctf_sq : (..., n_radii) float64, optional
        CTF^2 by which the power of the view is multiplied, see :func:`mrefali.ctf.ctf_sq`.

    Returns
    -------
    (..., 3, 3) float64
        px^2, px degrees, degrees^2. The mean square of the length of the shift error is the sum of the first two of
        the diagonal, that of the angle error the third.
    """
    weighted = informations if ctf_sq is None else informations * np.asarray(ctf_sq)[..., None, None]
    return np.linalg.inv(weighted.sum(axis=-3)) * np.asarray(noise_variance)[..., None, None]
