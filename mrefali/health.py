"""What class averages say of their classes: which are the same view, and which are junk.

Both are measured on what the two halves of each average agree on. All averages are band-passed alike: each ring is
scaled to the same power, then weighted by its reliability 2 FRC / (1 + FRC). All views of a molecule share its
blob-like low frequencies: plain averages of different views correlate by 0.8, such ones by 0.4. The limits are
measured on simulated particles, see docs/reading_classes.md.

Arrays in, arrays out: this module knows no file and no rank. Imports geometry and what is below it of the method.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft

from mrefali import geometry
from mrefali.fourier import shrink, transform
from mrefali.reference import low_pass
from mrefali.search import Alignments, Search, align, ring_spectra
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


def examine(halves, search):
    """``Health`` of classes.

    Parameters
    ----------
    halves : iterable of (2, n, n) float
        Of each class the means of the normalised particles of its two halves.
    search : search.Search
        Of the run: its box and radius, and whether a mirrored view is the same.
    """
    factor = max(1, round(search.box / BOX))
    pairs = np.stack([shrink(pair, factor) for pair in halves])
    fine = _search_in(pairs.shape[-1], search.outer_radius // factor, search.mirror)
    disc = geometry.disc(fine.box, fine.outer_radius)
    for pair in pairs:
        pair[:] = _centered(pair, disc) * disc
    weight, n_independent = _weights(pairs)
    for pair in pairs:
        pair[:] = _centered(_weighted(pair, weight), disc)

    agreed, *powers = np.array([_products(*pair[:, disc].astype(np.float64)) for pair in pairs]).T
    power = np.sqrt(powers[0] * powers[1])
    r = np.divide(agreed, power, out=np.full(len(pairs), np.nan), where=power > 0)
    # of the mean product of two equal signals in noise of their own
    error = power * np.sqrt((1 - r**2).clip(0) / (n_independent * disc.mean()))
    detail, error = _in_medians(agreed, error, power > 0)

    like, likeness = np.full(len(pairs), -1), np.full(len(pairs), np.nan)
    reliability = 2 * np.maximum(r, 0) / (1 + np.maximum(r, 0))
    told = np.flatnonzero(reliability >= LEAST_RELIABLE)  # NaN is not
    if told.size > 1:
        other, correlation = _most_alike(pairs[told].sum(axis=1), disc, fine)
        like[told] = told[other]
        likeness[told] = correlation / np.sqrt(reliability[told] * reliability[told[other]])
    return Health(like, likeness, detail, error)


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


def _normalized(images, disc):
    """Images of mean 0 and standard deviation 1 over the disc, (n_images, n, n) float32."""
    statistics = [(image[disc].mean(dtype=np.float64), image[disc].std(dtype=np.float64)) for image in images]
    mean, deviation = np.array(statistics, np.float32).T[..., None, None]
    return (images - mean) / deviation


def _weights(pairs):
    """Factor of each ring of Fourier space, and how many independent numbers are left of an image.

    Parameters
    ----------
    pairs : (n_classes, 2, n, n) float32
        The halves of averages, 0 outside the disc.

    Returns
    -------
    weight : (n // 2 + 1,) float64
    n_independent : float
    """
    n = pairs.shape[-1]
    frequency = scipy.fft.fftfreq(n, 1 / n)
    ring = np.rint(np.hypot(frequency, frequency[:, None])).astype(int).ravel()

    def ring_sums(values):
        return np.bincount(ring, values.ravel())[:n // 2 + 1]

    reliability, share = np.zeros((2, n // 2 + 1))
    for pair in pairs:
        first, second = scipy.fft.fft2(pair.astype(np.float64))
        both = np.sqrt(ring_sums(np.abs(first) ** 2) * ring_sums(np.abs(second) ** 2))
        frc = np.divide(ring_sums((first * second.conj()).real), both, out=np.zeros_like(both), where=both > 0)
        frc = frc.clip(0, 1)
        total = ring_sums(np.abs(first + second) ** 2)
        reliability += 2 * frc / (1 + frc) / len(pairs)
        share += total / max(total.sum(), np.finfo(float).tiny)
    reliability[0] = 0.0
    count = np.bincount(ring)[:n // 2 + 1]
    weight = np.divide(reliability, np.sqrt(share / count), out=np.zeros_like(share), where=share > 0)
    power = count * reliability**2
    squares = (power * reliability**2).sum()
    return weight, power.sum() ** 2 / squares if squares else 1.0


def _weighted(pair, weight):
    n = pair.shape[-1]

    def factor(frequency):
        return np.interp(n * frequency, np.arange(len(weight)), weight, right=0.0)

    return np.stack([low_pass(image.astype(np.float64), factor) for image in pair])


def _products(first, second):
    """Mean of the product of two halves, and of the square of each."""
    return (first * second).mean(), (first**2).mean(), (second**2).mean()


def _most_alike(averages, disc, search):
    """Of each average the other that it correlates best with once aligned, and that correlation."""
    averages = _normalized(averages, disc)
    found = sharpen(averages, _find_coarsely(averages, search), splines(averages), search)
    moved = transform(averages, found.poses)
    return found.assign, np.array([np.corrcoef(image[disc], averages[k][disc])[0, 1]
                                   for image, k in zip(moved, found.assign, strict=True)])


def _find_coarsely(averages, search):
    """``search.Alignments`` of each average to the best of the others, found in images of about ``COARSE_BOX``."""
    factor = max(1, round(search.box / COARSE_BOX))
    small = shrink(averages, factor)
    coarse = _search_in(small.shape[-1], search.outer_radius // factor, search.mirror)
    found = _best_others(_normalized(small, geometry.disc(coarse.box, coarse.outer_radius)), coarse)
    found.poses["sx"] *= factor
    found.poses["sy"] *= factor
    return found


def _best_others(images, search):
    """``search.Alignments`` of each image to the best of the others.

    The search finds one reference an image, which must not be the image itself: half of the images are searched for
    among the other half, and so on within each half. No pair is looked at twice.
    """
    best = Alignments(np.zeros(len(images), np.int32), geometry.identity_poses(len(images)),
                      np.full(len(images), -np.inf))
    pending = [np.arange(len(images))]
    while pending:
        parts = np.array_split(pending.pop(), 2)
        for these, others in (parts, parts[::-1]):
            found = align(images[these], geometry.identity_poses(len(these)), ring_spectra(images[others], search),
                          search)
            better = found.peak > best.peak[these]
            chosen = these[better]
            best.assign[chosen] = others[found.assign[better]]
            best.poses[chosen], best.peak[chosen] = found.poses[better], found.peak[better]
        pending += [part for part in parts if len(part) > 1]
    return best


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
