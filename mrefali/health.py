"""What class averages say of their classes: which are the same view, and which are junk.

Both are measured on what the two halves of each average agree on. All averages are band-passed alike: each ring is
scaled to the same power, then weighted by its reliability 2 FRC / (1 + FRC). All views of a molecule share its
blob-like low frequencies: plain averages of different views correlate by 0.8, such ones by 0.4. The limits are
measured on simulated particles, see docs/reading_classes.md.

Arrays in, arrays out: this module knows no file, and of ranks no more than that they share the comparisons. Imports
geometry and what is below it of the method.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
from scipy.ndimage import map_coordinates

from mrefali import geometry
from mrefali.average import normalize_particles
from mrefali.fourier import half_spectrum, shrink, shrink_factor
from mrefali.search import Search, align, only, ring_spectra
from mrefali.sharpening import sharpen, splines

#: Averages are shrunk to about this box: what tells views apart is there, and the cost is that of small images.
BOX = 64

#: Partners are found in averages of about this box, moved against each other so far each way in such steps, in px.
COARSE_BOX, HALF_RANGE, STEP = 32, 1.5, 0.5

#: Two averages that are at least so alike are one view.
SAME_VIEW = 0.9

#: An average of which less is signal is held against no other: noise fits noise as well in the best of so many poses.
LEAST_RELIABLE = 0.3

#: A class is junk whose detail is so small, with ``SURE`` standard errors added.
JUNK_DETAIL, SURE = 0.7, 2.0


@dataclass(frozen=True)
class Health:
    """One entry a class each; NaN, and -1 for ``like``, where there is nothing to say.

    Attributes
    ----------
    like : (n_classes,) int64
        The other class whose average is most alike.
    likeness : (n_classes,) float64
        Correlation with it once aligned, corrected for noise: 1 for the same view, whatever the noise.
    detail, detail_error : (n_classes,) float64
        Power of what the halves agree on, as a share of that of the median class, and its standard error.
    """

    like: np.ndarray
    likeness: np.ndarray
    detail: np.ndarray
    detail_error: np.ndarray


def shrunk(halves, search):
    """The halves of an average as :func:`examine` takes them.

    Parameters
    ----------
    halves : (2, n, n) float
        Means of the normalised particles of each half.
    search : search.Search
        Of the run.

    Returns
    -------
    (2, m, m) float32
        ``m`` is about ``BOX``, or n where that is less.
    """
    return shrink(halves, _factor(search))


def examine(pairs, search, comm):
    """``Health`` of classes.

    Parameters
    ----------
    pairs : (n_classes, 2, m, m) float32
        What :func:`shrunk` makes of each class.
    search : search.Search
        Of the run: its box and radius, and whether a mirrored view is the same.
    comm
        Of the ranks that share the comparisons, all of which have the same pairs; see :mod:`mrefali.parallel`.
    """
    fine = _search_in(pairs.shape[-1], search.outer_radius // _factor(search), search.mirror)
    disc = geometry.disc(fine.box, fine.outer_radius)
    pairs, n_independent = _banded(pairs, disc)
    agreed, *powers = np.array([_products(*pair[:, disc].astype(np.float64)) for pair in pairs]).T
    power = np.sqrt(powers[0] * powers[1])
    r = np.divide(agreed, power, out=np.full(len(pairs), np.nan), where=power > 0)
    # of the mean product of two equal signals in noise of their own
    error = power * np.sqrt((1 - r**2).clip(0) / (n_independent * disc.mean()))
    detail, error = _in_medians(agreed, error, power > 0)

    like, likeness = np.full(len(pairs), -1), np.full(len(pairs), np.nan)
    reliability = 2 * np.maximum(r, 0) / (1 + np.maximum(r, 0))
    # NaN is not; the root decides, for a processor of another kind may round the other way
    told = comm.from_root(np.flatnonzero(reliability >= LEAST_RELIABLE))
    if told.size > 1:
        other, correlation = _most_alike(pairs[told].sum(axis=1), disc, fine, comm)
        like[told] = told[other]
        likeness[told] = correlation / np.sqrt(reliability[told] * reliability[told[other]])
    return Health(like, likeness, detail, error)


def _factor(search):
    """By which the averages of a run are shrunk."""
    return shrink_factor(search.box, BOX)


def _in_medians(agreed, error, known):
    """``agreed`` and its error as shares of the median; NaN where it is not ``known``, or where that is no power."""
    median = np.median(agreed[known]) if known.any() else 0.0
    if median <= 0:
        return np.full((2, len(agreed)), np.nan)
    return np.where(known, [agreed, error], np.nan) / median


def _search_in(box, radius, mirror):
    """A ``Search`` over all rings to ``radius``, or to what the box holds."""
    radius = int(np.clip(radius, 1, geometry.largest_outer_radius(box)))
    return Search(box, 1, radius, 1, HALF_RANGE, HALF_RANGE, STEP, mirror)


def _centered(images, disc):
    """Images minus their mean over the disc."""
    return images - images[..., disc].mean(axis=-1)[..., None, None]


def _banded(pairs, disc):
    """The halves of averages band-passed, all alike, and how many independent numbers are left of an image."""
    n, banded = len(disc), np.empty_like(pairs)
    spectra = np.empty((*pairs.shape[:-1], n // 2 + 1), np.complex64)
    for pair, out in zip(pairs, spectra, strict=True):
        out[:] = scipy.fft.rfft2(_centered(pair, disc) * disc)
    radius, times = half_spectrum(n)
    weight, n_independent = _weights(spectra, radius, times)
    spectra *= np.interp(radius, np.arange(len(weight)), weight, right=0.0).astype(np.float32)
    for spectrum, out in zip(spectra, banded, strict=True):
        out[:] = _centered(scipy.fft.irfft2(spectrum, s=disc.shape), disc)
    return banded, n_independent


def _weights(spectra, radius, times):
    """Factor of each ring of Fourier space, and how many independent numbers are left of an image.

    Parameters
    ----------
    spectra : (n_classes, 2, n, n // 2 + 1) complex64
        Of the halves of averages, 0 outside the disc.
    radius, times
        Of their coefficients, see :func:`mrefali.fourier.half_spectrum`.

    Returns
    -------
    weight : (n // 2 + 1,) float64
    n_independent : float
    """
    n_rings, ring = radius.shape[1], np.rint(radius).astype(int).ravel()

    def ring_sums(values):
        return np.bincount(ring, (times * values).ravel())[:n_rings]

    reliability, share = np.zeros((2, n_rings))
    for first, second in spectra:
        power = ring_sums(np.abs(first) ** 2), ring_sums(np.abs(second) ** 2)
        product, both = ring_sums((first * second.conj()).real), np.sqrt(power[0] * power[1])
        frc = np.divide(product, both, out=np.zeros_like(both), where=both > 0).clip(0, 1)
        total = (power[0] + power[1] + 2 * product).clip(0)
        reliability += 2 * frc / (1 + frc) / len(spectra)
        share += total / max(total.sum(), np.finfo(float).tiny)
    reliability[0] = 0.0
    count = ring_sums(np.ones(radius.shape))
    weight = np.divide(reliability, np.sqrt(share / count), out=np.zeros_like(share), where=share > 0)
    power = count * reliability**2
    squares = (power * reliability**2).sum()
    return weight, power.sum() ** 2 / squares if squares else 1.0


def _products(first, second):
    """Mean of the product of two halves, and of the square of each."""
    return (first * second).mean(), (first**2).mean(), (second**2).mean()


def _most_alike(averages, disc, search, comm):
    """Of each average the other that it correlates best with once aligned, and that correlation; normalises them."""
    factor = shrink_factor(search.box, COARSE_BOX)
    small = shrink(averages, factor)
    coarse = _search_in(small.shape[-1], search.outer_radius // factor, search.mirror)
    normalize_particles(small, geometry.disc(coarse.box, coarse.outer_radius))
    normalize_particles(averages, disc)
    spectra = ring_spectra(small, coarse)

    def partner(i):
        others = np.delete(np.arange(len(averages)), i)
        found = align(small[i:i + 1], geometry.identity_poses(1), only(spectra, others), coarse)
        k = others[found.assign[0]]
        found.assign[0] = 0  # the only one that it is held against from here on
        found.poses["sx"] *= factor
        found.poses["sy"] *= factor
        found = sharpen(averages[i:i + 1], found, splines(averages[k:k + 1]), search)
        return k, np.corrcoef(_moved(averages[i], found.poses[0], disc), averages[k][disc])[0, 1]

    partners, correlations = zip(*comm.each(partner, range(len(averages))), strict=True)
    return np.array(partners), np.array(correlations)


def _moved(image, pose, disc):
    """The pixels within the disc of an image moved by its pose, (n_pixels,) float64."""
    middle = len(disc) // 2
    x, y = np.argwhere(disc).T[::-1] - middle
    x, y = (geometry.to_matrices(geometry.invert(pose)) @ [x, y, 0 * x, np.ones_like(x)])[:2]
    # a spline of degree five, as averages have detail up to near the Nyquist frequency
    return map_coordinates(image.astype(np.float64), np.stack([y, x]) + middle, order=5, mode="grid-wrap")


def same_views(like, likeness):
    """Groups of classes whose averages are one view.

    Parameters
    ----------
    like, likeness : (n_classes,) arrays
        As in :class:`Health`.

    Returns
    -------
    list of list of int
        Each of two classes or more, in order of number.
    """
    groups = [{k} for k in range(len(like))]
    for k in np.flatnonzero(np.nan_to_num(likeness) >= SAME_VIEW):
        joined = groups[k] | groups[int(like[k])]
        for member in joined:
            groups[member] = joined
    return [sorted(group) for k, group in enumerate(groups) if k == min(group) and len(group) > 1]


def junk(detail, detail_error):
    """Classes whose halves agree on far less than those of the median class, (n,) int64; see ``JUNK_DETAIL``."""
    return np.flatnonzero(detail + SURE * detail_error < JUNK_DETAIL)  # NaN is not less
