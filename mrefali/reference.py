"""Reference functions: a class average and its FRC to the next reference (SPEC section 5), and centring.

A reference function takes (mask, center, average, frc) and returns (reference, shift), and may add the filter it
used, for the log; see :func:`ref_ali2d`. Arrays in, arrays out. Imports average, geometry and errors only.
"""

import functools
import importlib
import inspect
import os
import types
from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy.ndimage import distance_transform_edt
from scipy.optimize import minimize

from mrefali import average as averages
from mrefali import geometry
from mrefali.errors import InputError

#: What ``center`` may be, and what it means.
CENTERINGS = {
    0: "none",
    1: "phase centre of gravity",
    -1: "mean shift of the class",
    2: "correlation with the mask",
    3: "correlation with the average's own rotational average",
    4: "phase centre of the power, within a dead band",
}

#: A centring that is repeated ends when it moves by less, in px, or after so many rounds.
CENTERED_PX, CENTERING_ROUNDS = 0.1, 20

#: An average whose power is centred to within this distance, in px, stays where it is with ``center=4``.
DEAD_BAND_PX = 0.5


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


def power_center(image, mask):
    """Phase centre of gravity (x, y), in px, of the squared deviation from the background, outside the mask.

    What is not cut out by a mask moves with the image, pixel for pixel, and even noise adds nothing to it. Bright or
    dark makes no difference.
    """
    outside = mask < 0.5
    background = image[outside].mean() if outside.any() else image.mean()
    return phase_center((image - background) ** 2)


def find_center(image, mask, center):
    """Centre (x, y) in px from the centre pixel that ``center`` asks for, see ``CENTERINGS``.

    Those by correlation take the highest peak, moved to the vertex of a parabola along each axis, and repeat with
    the image moved there until it moves by less than ``CENTERED_PX``, never farther than the mask is deep:
    in a poor average noise correlates too. They want the whole image, bright on dark where
    it is held against the mask: one cut out by the mask correlates with the rim of its own hole.
    """
    if not np.isscalar(center):
        return np.asarray(center, np.float64)
    if center == 0:
        return np.zeros(2)
    if center == 1:
        return phase_center(image)
    if center == 4:
        place = power_center(image, mask)
        return place if np.hypot(*place) > DEAD_BAND_PX else np.zeros(2)
    depth = mask_depth(mask)
    place = np.zeros(2)
    for _ in range(CENTERING_ROUNDS):
        moved = fourier_shift(image, -place)
        step = correlation_peak(moved, rotational_average(moved) if center == 3 else depth, place, depth.max())
        place += step
        if np.hypot(*step) < CENTERED_PX:
            break
    return place


def mask_depth(mask):
    """Distance in px of each pixel within ``mask`` (n, n) from its edge, 0 outside.

    Within the mask itself a small particle correlates the same wherever it lies; with its depth, in the middle best.
    """
    return distance_transform_edt(np.pad(mask > 0.5, 1))[1:-1, 1:-1]  # the image's edge is one of the mask's


def correlation_peak(image, target, place=(0.0, 0.0), farthest=np.inf):
    """(x, y) px by which ``target`` must be moved to correlate best with ``image``; both (n, n), cyclic.

    Together with ``place``, the way come before, it leads no farther than ``farthest`` px, but for the parabola.
    """
    n = image.shape[0]
    ccf = scipy.fft.irfft2(scipy.fft.rfft2(image) * scipy.fft.rfft2(target).conj(), s=(n, n))
    d = scipy.fft.fftfreq(n, 1 / n)
    allowed = np.hypot(d[:, None] + place[1], d + place[0]) <= farthest
    y, x = np.unravel_index(np.argmax(np.where(allowed, ccf, -np.inf)), ccf.shape)
    about = np.arange(-1, 2)
    return np.array([_vertex(ccf[y, (x + about) % n], x, n), _vertex(ccf[(y + about) % n, x], y, n)])


def _vertex(values, index, n):
    """Place of the vertex of a parabola through three values about ``index``, between -n/2 and n/2."""
    left, middle, right = values
    curvature = left - 2 * middle + right
    # at the border of what is allowed the middle need not be the highest
    offset = float(np.clip(0.5 * (left - right) / curvature, -0.5, 0.5)) if curvature else 0.0
    return (index + n // 2) % n - n // 2 + offset


def rotational_average(image):
    """``image`` (n, n) with each pixel the mean over its ring of one pixel's width about the centre pixel."""
    d = np.arange(image.shape[0]) - image.shape[0] // 2
    ring = np.rint(np.hypot(d[:, None], d)).astype(int)
    return (np.bincount(ring.ravel(), image.ravel()) / np.bincount(ring.ravel()))[ring]


# --- the functions


def ref_ali2d(mask, center, average, frc):
    """The original's default: masked, low-passed by a filter fitted to the FRC, centred (SPEC section 5).

    Parameters
    ----------
    mask : (n, n) float
    center : int or (x, y)
        One of ``CENTERINGS``, or a position in px from the centre pixel (what -1 comes to).
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
    return _prepare(mask, center, average, fit_filter(frc))


def ref_unfiltered(mask, center, average, frc):
    """Masked and centred, without a filter; parameters and result as of :func:`ref_ali2d`."""
    return _prepare(mask, center, average, None)


def ref_lowpass(mask, center, average, frc, cutoff, falloff=0.2):
    """Masked, low-passed with a fixed cutoff (1/px, 0 to 0.5) and relative falloff, centred."""
    if not 0 < cutoff <= 0.5 or not 0 < falloff <= 2:
        raise InputError(f"function=ref_lowpass,{cutoff:g},{falloff:g} is not allowed: give a cutoff above 0 to 0.5 in "
                         "1/px, and a relative falloff above 0 to 2")
    return _prepare(mask, center, average, TanhFilter(cutoff, falloff))


def ref_symmetry(mask, center, average, frc, order):
    """As :func:`ref_ali2d`, then averaged over the rotations of C_n about the centre; ``order`` is n, 1 to 360."""
    if not 1 <= order <= 360 or order != int(order):
        raise InputError(f"function=ref_symmetry,{order:g} is not allowed: give a whole number from 1 to 360")
    reference, shift, fitted = ref_ali2d(mask, center, average, frc)
    turns = geometry.make_poses(360.0 * np.arange(order) / order)
    copies = np.repeat(reference.astype(np.float32)[None], int(order), axis=0)
    return averages.transform(copies, turns).mean(axis=0, dtype=np.float64), shift, fitted


def _prepare(mask, center, average, low_pass_filter):
    reference = _filtered((average - average[mask > 0.5].mean()) * mask, low_pass_filter)
    whole = np.isscalar(center) and center in (2, 3, 4)
    place = find_center(_filtered(average, low_pass_filter) if whole else reference, mask, center)
    return (fourier_shift(reference, -place) if place.any() else reference), -place, low_pass_filter


def _filtered(image, low_pass_filter):
    return image if low_pass_filter is None else low_pass(image, low_pass_filter)


#: What ``function`` may name; those with parameters take them after commas, as ``ref_lowpass,0.2``.
FUNCTIONS = {f.__name__: f for f in (ref_ali2d, ref_unfiltered, ref_lowpass, ref_symmetry)}


def find_function(text):
    """The reference function that ``text`` names.

    Parameters
    ----------
    text : str or callable
        ``NAME`` or ``NAME,NUMBER,...`` of ``FUNCTIONS``; ``path/to/file.py:name`` or ``module:name`` of one's own; or
        the function itself.

    Returns
    -------
    callable
        Of (mask, center, average, frc), see :func:`ref_ali2d`; its ``__name__`` is ``text`` if that is a str.
    """
    if callable(text):
        return text
    if not isinstance(text, str):
        raise InputError(f"function={text!r} is not allowed: give a function, or the name of one")
    if ":" in text:
        return _named(functools.partial(_load(text)), text)
    name, *numbers = text.split(",")
    if name not in FUNCTIONS:
        raise InputError(f"function={text} is not known: give one of {', '.join(FUNCTIONS)}, or file.py:name or "
                         "module:name of your own")
    needed = list(inspect.signature(FUNCTIONS[name]).parameters.values())[4:]
    required = sum(p.default is p.empty for p in needed)
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = None
    if values is None or not np.isfinite(values).all() or not required <= len(values) <= len(needed):
        form = ",".join([name, *(p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in needed)])
        raise InputError(f"function={text} is not allowed: give {form}, with numbers")
    if not values:
        return FUNCTIONS[name]
    function = functools.partial(FUNCTIONS[name], **dict(zip((p.name for p in needed), values, strict=False)))
    _try_out(function)
    return _named(function, text)


def _try_out(function):
    """Have a built-in function refuse its parameters now, on a small image, not after an iteration."""
    n = 8
    function(np.ones((n, n)), 0, np.arange(n * n, dtype=float).reshape(n, n), np.ones((n // 2 + 1, 3)))


def _named(function, text):
    function.__name__ = text
    return function


def _load(text):
    """A function from a file or a module that the user names."""
    place, _, name = text.rpartition(":")
    if place.endswith(".py"):
        if not os.path.isfile(place):
            raise FileNotFoundError(f"function={text}: there is no file {place}: give path/to/file.py:name")
        module = types.ModuleType("mrefali_user_function")
        module.__file__ = place
        with open(place, "rb") as file:  # not by an import, which would leave a __pycache__ beside the file
            exec(compile(file.read(), place, "exec"), vars(module))
    elif not all(word.isidentifier() for word in place.split(".")):
        raise InputError(f"function={text}: {place!r} names no module: give module:name or path/to/file.py:name")
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError(f"function={text}: {error}: give module:name or path/to/file.py:name") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"function={text}: {place} has no function {name}: give module:name or path/to/file.py:name")
    return function
