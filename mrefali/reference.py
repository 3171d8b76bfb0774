"""Reference functions: a class average and its FRC to the next reference (SPEC section 5).

A reference function takes (mask, center, average, frc) and returns (reference, shift); see :func:`ref_ali2d`.
Arrays in, arrays out. Imports nothing of ours but errors.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy.optimize import minimize

from mrefali.errors import InputError


@dataclass(frozen=True)
class TanhFilter:
    """The low-pass H(f) = 0.5 [tanh(pi (f + fl) / (2 aa fl)) - tanh(pi (f - fl) / (2 aa fl))].

    Attributes
    ----------
    cutoff : float, 1/px
        fl, where H falls to one half.
    falloff : float
        aa, relative to the cutoff.
    """

    cutoff: float
    falloff: float

    def __call__(self, frequency):
        """H at ``frequency`` in 1/px."""
        scale = np.pi / (2 * self.falloff * self.cutoff)
        return 0.5 * (np.tanh(scale * (frequency + self.cutoff)) - np.tanh(scale * (frequency - self.cutoff)))


def fit_filter(frc):
    """The tanh low-pass that ``ref_ali2d`` fits to a FRC (SPEC section 5).

    Parameters
    ----------
    frc : (n_rings, 3) float64
        Frequency in 1/px, correlation, count; of the two halves.

    Returns
    -------
    TanhFilter
    """
    frequency = frc[:, 0]
    value = frc[:, 1].copy()
    value[0] = abs(value[0])  # before it is converted: halves whose means differ in sign have -1 there
    with np.errstate(divide="ignore"):
        value = 2 * value / (1 + value)  # of the whole set
    lost = np.flatnonzero(value[1:] < 0.1)
    if lost.size:
        value[lost[0] + 1:] = 0.0
    below = np.flatnonzero(value[1:] < 0.5)
    if not below.size:
        return TanhFilter(0.4, 0.2)
    start = np.array([frequency[below[0]], 0.1])  # below[0] counts from ring 1: this is the ring before it

    def misfit(p):
        return ((value - TanhFilter(*p)(frequency)) ** 2).sum()

    # a cutoff or fall-off of 0 on the way of the simplex is no number: nan compares false, and it moves on
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        cutoff, falloff = minimize(misfit, start, method="Nelder-Mead", options={
            "initial_simplex": start + 0.05 * np.array([[0, 0], [1, 0], [0, 1]]), "xatol": 1e-6, "fatol": 1e-12}).x
    return TanhFilter(float(np.clip(cutoff, 0.12, 0.4)), float(min(falloff, 0.2)))


def low_pass(image, tanh_filter):
    """``image`` (n, n) filtered by a function of the frequency in 1/px, in Fourier space without padding."""
    n = image.shape[0]
    frequency = np.hypot(scipy.fft.fftfreq(n)[:, None], scipy.fft.rfftfreq(n)[None, :])
    return scipy.fft.irfft2(scipy.fft.rfft2(image) * tanh_filter(frequency), s=(n, n))


def fourier_shift(image, shift):
    """``image`` (n, n) moved by ``shift`` = (x, y) px in Fourier space."""
    n = image.shape[0]
    turns = scipy.fft.fftfreq(n)[:, None] * shift[1] + scipy.fft.rfftfreq(n)[None, :] * shift[0]
    return scipy.fft.irfft2(scipy.fft.rfft2(image) * np.exp(-2j * np.pi * turns), s=(n, n))


def phase_center(image):
    """Phase centre of gravity (x, y) in px from the centre pixel (SPEC section 5).

    For each axis the phase of the first Fourier coefficient of the projection onto it, as a position; between
    -n/2 and n/2.
    """
    n = image.shape[0]
    wave = np.exp(2j * np.pi * (np.arange(n) - n // 2) / n)
    return np.array([np.angle(image.sum(axis=axis) @ wave) * n / (2 * np.pi) for axis in (0, 1)])


def ref_ali2d(mask, center, average, frc):
    """The original's default: masked, low-passed by a filter fitted to the FRC, centred (SPEC section 5).

    Parameters
    ----------
    mask : (n, n) float
    center : 0, 1 or (x, y)
        0: leave it; 1: phase centre of gravity; a position in px from the centre pixel: as given.
    average : (n, n) float64
    frc : (n_rings, 3) float64
        As :func:`mrefali.average.frc` gives it.

    Returns
    -------
    reference : (n, n) float64
    shift : (2,) float64, px
        x, y by which the average was moved.
    TanhFilter
    """
    fitted = fit_filter(frc)
    reference = low_pass((average - average[mask > 0.5].mean()) * mask, fitted)
    if np.isscalar(center):
        place = phase_center(reference) if center == 1 else np.zeros(2)
    else:
        place = np.asarray(center)
    return (fourier_shift(reference, -place) if place.any() else reference), -place, fitted


#: What ``--function`` may name.
FUNCTIONS = {"ref_ali2d": ref_ali2d}


def find_function(name):
    """The reference function called ``name``."""
    if name not in FUNCTIONS:
        raise InputError(f"function={name} is not known: give one of {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name]
