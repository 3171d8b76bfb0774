"""Classes of particles that nothing is known of: the way in of the commands ``seed`` and ``classify``.

Five steps, the last three repeated:

1. *Neighbours.* Some particles, drawn at random, are references for all. Each gives way to the average of those that
   are most like it, twice over.
2. *Choice.* Of these averages as many are taken, twice the classes asked for, as fit all particles best together.
3. *Alignment.* Every particle goes to the average it fits best, in the pose that is refined continuously; new averages.
4. *Dropping.* A class is dropped where the particles fit the others as well.
5. *Splitting.* Each class is cut in two along the principal components of its members, which are then aligned to the
   two parts. The parts take its place where the particles surely tell them apart; in the end, as long as there are
   fewer classes than asked for, where they seem to; of these classes those are kept that all particles together are
   likely to need, and one of each view.

Whether particles fit is cross-validated, or classes of one view, each with noise of its own, would seem to be two: each
half of the particles makes averages; the class is chosen by those of one half, and what it is worth measured by those
of the other. A particle's own part in an average is taken out of its score.

Averages are filtered for what tells views apart, :class:`Contrast`. All of this is done on small images.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
import scipy.linalg

from mrefali import average, geometry, health
from mrefali.errors import InputError
from mrefali.fourier import half_spectrum, shrink_factor
from mrefali.parallel import SERIAL
from mrefali.reference import fourier_shift, power_center
from mrefali.search import Alignments, Search, align, align_each, ring_spectra
from mrefali.sharpening import sharpen, splines

#: Images are shrunk to about this box: what tells views apart is there.
BOX = 64

#: Particles that begin as references, and averages chosen of those, for each class asked for.
FIRST_REFERENCES, FIRST_CLASSES = 8, 2

#: Neighbours that are averaged, round by round; step of their search in px, coarse for speed.
NEIGHBOURS, NEIGHBOUR_STEP = (8, 12), 2.0

#: Iterations of alignment between droppings, and of the two parts of a class.
ITERATIONS = 3

#: How often classes are split and dropped at most, and how often without gain.
ROUNDS, VAIN_ROUNDS = 8, 2

#: A class is not cut anew that has this share of its particles in common with one that was cut before.
SAME_CLASS = 0.95

#: A class of fewer particles is not split, and no part may have fewer than ``SMALLEST_PART``.
SMALLEST_SPLIT, SMALLEST_PART = 16, 4

#: Standard errors that are taken off what a class is worth, and where classes are filled up to the number asked for.
SURE, LIKELY = 2.0, 1.0

#: Principal components along which a class is cut, each tried.
COMPONENTS = 3

#: Classes of a particle whose scores are refined, the best by the grid search; those of the others are estimated.
REFINED_SCORES = 4

#: Of the product of a particle with itself, what is taken out of its score against an average of which it is part. 0.62
#: to 0.78 of it is there, as both are smoothed on the way: measured on simulated particles of 32 and 64 px. The rest is
#: for noise that comes back by way of others, aligned to averages with this particle in them. With 0.7 large classes
#: fell apart: with eight views of sizes as 20 to 1, at SNR 0.1, 75 to 77 % of the particles were right; with 1.2, 93 %.
OWN_SHARE = 1.2

#: Memory of a pair of a particle and a first reference, in bytes: score and pose, and what they are made of. Measured.
PAIR_BYTES = 230

#: Width in px of the soft edge within which images are compared.
EDGE = 3.0


@dataclass(frozen=True)
class Seeds:
    """Classes found, the largest first.

    Attributes
    ----------
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
        Carry particles onto the averages of their classes.
    n_classes : int
    """

    assign: np.ndarray
    poses: np.ndarray
    n_classes: int


def n_first_pairs(n_particles, n_classes):
    """How many pairs of a particle and a first reference there are."""
    return n_particles * min(FIRST_REFERENCES * n_classes, n_particles)


def bytes_needed(n_particles, n_classes, box):
    """Memory that :func:`find_seeds` takes, its images of ``box`` px included."""
    return 2 * 4 * n_particles * box**2 + PAIR_BYTES * n_first_pairs(n_particles, n_classes)


def search_of(box, outer_radius, half_range, mirror=True):
    """The ``Search`` of the small images, and how many times smaller they are."""
    factor = shrink_factor(box, BOX)
    small = box // factor
    half = half_range / factor
    radius = int(np.clip(outer_radius // factor, 1, geometry.largest_outer_radius(small)))
    return Search(small, 1, radius, 1, half, half, 1.0, mirror), factor


def find_seeds(images, n_classes, search, rng, report=lambda text: None):
    """Classes of unaligned particles.

    Parameters
    ----------
    images : (n_particles, n, n) float32
        Normalised; centred to within the search.
    n_classes : int
        Classes at most; fewer where cross-validation finds no more.
    search : search.Search
        See :func:`search_of`.
    rng : numpy.random.Generator
    report : callable
        Is told of every round in words.

    Returns
    -------
    Seeds
    """
    contrast = Contrast(images, search.outer_radius)
    averages, counts = _first_averages(images, n_classes, contrast, search, rng)
    best, n_vain, cuts = None, 0, []
    for number in range(ROUNDS):
        state = _settle(images, averages, counts, contrast, search)
        kept = _needed(state.scores, n_classes)
        state = _settle(images, state.averages[kept], state.counts[kept], contrast, search)
        report(f"round {number + 1}: {len(state.counts)} classes")
        better = best is None or state.rank > best.rank
        best, n_vain = (state, 0) if better else (best, n_vain + 1)
        averages, counts = _split(images, state, n_classes, contrast, search, cuts)
        if averages is None or n_vain == VAIN_ROUNDS:
            break
    averages, counts = _split(images, best, n_classes - len(best.counts), contrast, search, cuts, sure=0.0)
    if averages is not None:
        fuller = _settle(images, averages, counts, contrast, search)
        # so far the members of one class were asked, and in doubt
        kept = _of_different_views(images, fuller, _needed(fuller.scores, n_classes, LIKELY), search)
        if len(kept) > len(best.counts):
            best = fuller
            if len(kept) < len(fuller.counts):
                best = _settle(images, fuller.averages[kept], fuller.counts[kept], contrast, search)
            report(f"filled up to {len(best.counts)} classes")
    order = np.argsort(-best.counts, kind="stable")
    order = order[best.counts[order] > 0]
    new = np.full(len(best.counts), -1, np.int32)
    new[order] = np.arange(len(order))
    return Seeds(new[best.found.assign], best.found.poses, len(order))


class Contrast:
    """What of the particles is signal, ring by ring of Fourier space, and averages filtered for it.

    The noise is that of the corners, beyond the soft edge, or else that of high frequencies; what the disc has beyond
    it is signal. With S their ratio an average of m particles is multiplied by S / ((1 + S) (S + 1/m)): by
    S / (S + 1/m) for its noise, and divided by 1 + S since all views have much in common where S is large, at low
    frequencies.

    Parameters
    ----------
    images : (n_particles, n, n) float32
    radius : float, px
    """

    def __init__(self, images, radius):
        n = images.shape[1]
        y, x = np.indices((n, n)) - n // 2
        self.edge = np.clip((radius + EDGE - np.hypot(x, y)) / EDGE, 0, 1).astype(np.float32)
        self.disc = geometry.disc(n, radius)
        frequency, self._times = half_spectrum(n)
        self._ring = np.minimum(np.rint(frequency).astype(int), n // 2)
        outside = 1 - self.edge
        power = self._ring_power(images, self.edge) / (self.edge**2).sum()
        level = np.tensordot(images, outside, 2) / outside.sum()
        corners = (image - its_level for image, its_level in zip(images, level, strict=True))
        noise = self._ring_power(corners, outside) / (outside**2).sum()
        # where the corners are masked, or are of another kind, the noise is what is left at high frequencies
        highest = slice(3 * n // 8, None)
        if not 0.5 < noise[highest].mean() / power[highest].mean() < 2:
            noise = np.full(len(power), power[highest].mean())
        if not (power[1:] > noise[1:]).any():
            raise InputError(f"the particles have nothing within radius ou={radius} that they have not outside it, or "
                             "at high frequencies: they seem to be noise alone")
        self.ratio = np.maximum(power / noise - 1, 0)
        self.ratio[0] = self.ratio[1]  # the mean of a particle says nothing
        # what a coefficient of a filtered particle adds to its product with itself over the disc, noise to a variance
        own = self._ring_power(images, self.edge, self.edge * self.disc)
        self._own = OWN_SHARE * own[self._ring] * self._times
        self._noise = (noise * self.disc.sum())[self._ring] * self._times

    def _ring_power(self, images, weight, other=None):
        """Mean product of a Fourier coefficient of images weighted in two ways, or in one, in each ring."""
        power, n_images = np.zeros(self._ring.shape), 0
        for image in images:  # spectra of all together would be several copies of them
            first = scipy.fft.rfft2(image * weight)
            second = first if other is None else scipy.fft.rfft2(image * other)
            power += (first.conj() * second).real
            n_images += 1
        return np.bincount(self._ring.ravel(), power.ravel()) / np.bincount(self._ring.ravel()) / n_images

    def filter(self, count):
        """Factors of the half spectrum of an average of so many particles."""
        s = self.ratio[self._ring]
        return s / ((1 + s) * (s + 1 / count))

    def _filtered(self, image, factors):
        return scipy.fft.irfft2(scipy.fft.rfft2(image * self.edge) * factors, s=image.shape)

    def pixels(self, images, count):
        """Pixels within the disc of images filtered as averages of ``count``, (n_images, n_pixels)."""
        factors = self.filter(count)
        return np.stack([self._filtered(image, factors)[self.disc] for image in images])

    def references(self, averages, counts):
        """``References`` of averages, (n_classes, n, n) and (n_classes,)."""
        images, own, growth = np.empty(averages.shape, np.float32), np.empty(len(averages)), np.empty(len(averages))
        n_pixels, area = averages[0].size, self.disc.sum()
        for k, count in enumerate(np.maximum(counts, 1)):
            factors = self.filter(count)
            image = self._filtered(averages[k], factors) * self.edge
            image -= image[self.disc].mean()
            variance = (image[self.disc]**2).mean()
            images[k] = image / np.sqrt(variance)
            own[k] = (factors * self._own).sum() / n_pixels / np.sqrt(variance)
            noise = (factors**2 * self._noise).sum() / n_pixels / area  # of a single particle, filtered
            growth[k] = np.sqrt(1 + noise * (1 / max(count - 1, 1) - 1 / count) / variance)
        return References(images, np.maximum(counts, 1), own, growth)

    def centered(self, averages):
        """Averages moved so that the centre of their power is in the middle."""
        return np.stack([fourier_shift(image.astype(np.float64), -power_center(image, self.edge))
                         for image in averages]).astype(np.float32)


@dataclass(frozen=True)
class References:
    """Averages as particles are held against them.

    Attributes
    ----------
    images : (n_classes, n, n) float32
        Filtered, of mean 0 and deviation 1 over the disc.
    counts : (n_classes,) int
        Particles in each.
    own : (n_classes,) float64
        What a member adds by itself to its score, times ``counts``.
    growth : (n_classes,) float64
        By how much the deviation of the filtered average grows without one of its members.
    """

    images: np.ndarray
    counts: np.ndarray
    own: np.ndarray
    growth: np.ndarray

    def without_own(self, scores, classes):
        """Scores of members, (n,), as if each had no part in the average of its class, (n,)."""
        m = self.counts[classes]
        return (m * scores - self.own[classes]) / np.maximum(m - 1, 1) / self.growth[classes]


@dataclass(frozen=True)
class State:
    """Averages, and what particles make of them.

    Attributes
    ----------
    averages : (n_classes, n, n) float32
        Centred.
    counts : (n_classes,) int64
    found : search.Alignments
        Of the particles that made them.
    scores : (2, n_particles, n_classes) float64
        Of all particles against the averages of the particles of even number, and of odd number.
    """

    averages: np.ndarray
    counts: np.ndarray
    found: Alignments
    scores: np.ndarray

    @property
    def rank(self):
        """The higher the better: all classes are needed, there are more of them, particles fit better."""
        everything = np.arange(len(self.counts))
        needed = len(everything) < 2 or _worth(self.scores, everything).min() > 0
        return needed, len(everything) if needed else 0, _fit(self.scores)


# --- steps 1 and 2


def coarse_search(search):
    """The ``Search`` for neighbours."""
    return replace(search, shift_step=min(NEIGHBOUR_STEP, max(1.0, search.xr)))


def _first_averages(images, n_classes, contrast, search, rng):
    """Averages of neighbours, and how many are in each."""
    coarse = coarse_search(search)
    drawn = np.sort(rng.choice(len(images), min(FIRST_REFERENCES * n_classes, len(images)), replace=False))
    averages, counts = images[drawn], np.ones(len(drawn), np.int64)
    for n_neighbours in NEIGHBOURS:
        found = _align_each(images, contrast.references(averages, counts).images, coarse)
        n_neighbours = min(n_neighbours, len(images))
        nearest = np.argsort(-found.peak, axis=1, kind="stable")[:, :n_neighbours]
        averages = contrast.centered(np.stack([
            average.transform(images[members], found.poses[k, members]).mean(axis=0)
            for k, members in enumerate(nearest)]))
        counts = np.full(len(drawn), n_neighbours)
    found = _align_each(images, contrast.references(averages, counts).images, coarse)
    chosen = _choose(found.peak.T, min(FIRST_CLASSES * n_classes, len(drawn)))
    best = found.peak[chosen].argmax(axis=0)
    poses = found.poses[chosen][best, np.arange(len(images))]
    return _averages(images, best, poses, averages[chosen], contrast)


def _choose(scores, n):
    """Columns of (n_particles, n_averages) scores whose best makes the largest sum, chosen one after the other."""
    chosen, best = [], scores.mean(axis=1)
    for _ in range(n):
        total = np.maximum(scores, best[:, None]).sum(axis=0)
        total[chosen] = -np.inf
        chosen.append(int(total.argmax()))
        best = np.maximum(best, scores[:, chosen[-1]])
    return chosen


def _align_each(images, references, search):
    return align_each(images, geometry.identity_poses(len(images)), ring_spectra(references, search), search)


# --- step 3


def _averages(images, assign, poses, before, contrast):
    """Centred averages and counts; a class without particles keeps the average it had."""
    averages, counts = before.copy(), np.bincount(assign, minlength=len(before))
    moved = average.transform(images, poses)
    for k in np.flatnonzero(counts):
        averages[k] = moved[assign == k].mean(axis=0)
    return contrast.centered(averages), counts


def _align(images, averages, counts, contrast, search):
    """The best class and continuous pose of every particle."""
    references = contrast.references(averages, counts)
    found = align(images, geometry.identity_poses(len(images)), ring_spectra(references.images, search), search)
    return sharpen(images, found, splines(references.images), search)


def _settle(images, averages, counts, contrast, search):
    """``State`` after ``ITERATIONS`` of alignment."""
    for _ in range(ITERATIONS):
        found = _align(images, averages, counts, contrast, search)
        averages, counts = _averages(images, found.assign, found.poses, averages, contrast)
    half = np.arange(len(images)) % 2
    scores = np.stack([_scores(images, found, half == h, averages, contrast, search) for h in (0, 1)])
    return State(averages, counts, found, scores)


def _scores(images, found, used, averages, contrast, search):
    """Of all particles against the averages of those that are ``used``, (n_particles, n_classes)."""
    members = np.flatnonzero(used)
    halves, counts = _averages(images[members], found.assign[members], found.poses[members], averages, contrast)
    references = contrast.references(halves, counts)
    grid = _align_each(images, references.images, search)
    scores, coefficients = grid.peak.T.copy(), splines(references.images)
    rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
    refined = rank < REFINED_SCORES
    for k in range(len(averages)):
        who = np.flatnonzero(refined[:, k])
        start = Alignments(np.full(len(who), k, np.int32), grid.poses[k, who], grid.peak[k, who])
        scores[who, k] = sharpen(images[who], start, coefficients, search).peak
    # the peak of a continuous pose is another number than that of a grid; those not refined take the usual ratio
    scores[~refined] *= np.median(scores[refined] / grid.peak.T[refined])
    scores[members, found.assign[members]] = references.without_own(
        scores[members, found.assign[members]], found.assign[members])
    scores[:, counts < 2] = scores.min() - np.ptp(scores)  # a single particle cannot be without itself
    return scores


# --- steps 4 and 5


def _worth(scores, classes, sure=SURE):
    """How much less well particles fit without each of the ``classes``, at least, (len(classes),).

    Cross-validated, less ``sure`` standard errors: the members of a class that can be done without fit others as well.
    """
    total, squares, i = np.zeros(len(classes)), np.zeros(len(classes)), np.arange(scores.shape[1])
    for chooser, judge in (scores[:, :, classes], scores[::-1, :, classes]):
        first, second = np.argsort(-chooser, axis=1, kind="stable")[:, :2].T
        loss = judge[i, first] - judge[i, second]
        total += np.bincount(first, loss, minlength=len(classes)) / 2
        squares += np.bincount(first, loss**2, minlength=len(classes)) / 2
    return total - sure * np.sqrt(squares)


def _fit(scores):
    """Sum of the scores of all particles, cross-validated."""
    i = np.arange(scores.shape[1])
    return sum(judge[i, chooser.argmax(axis=1)].sum() for chooser, judge in (scores, scores[::-1])) / 2


def _of_different_views(images, state, kept, search):
    """Of the classes ``kept`` one of each view, the largest, as :mod:`mrefali.health` tells views of the run's own."""
    moved, half = average.transform(images, state.found.poses), np.arange(len(images)) % 2
    groups = [[(state.found.assign == k) & (half == h) for h in (0, 1)] for k in kept]
    pairs = np.array([[moved[some].sum(axis=0) / max(some.sum(), 1) for some in pair] for pair in groups], np.float32)
    found = health.examine(pairs, search, SERIAL)
    counts, again = state.counts[kept], []
    for group in health.same_views(found.like, found.likeness):
        again += [k for k in group if k != max(group, key=lambda k: counts[k])]
    return np.delete(kept, again)


def _needed(scores, most, sure=SURE):
    """The classes without those that can be done without, ``most`` of them at most."""
    kept = np.arange(scores.shape[2])
    while len(kept) > 1:
        worth = _worth(scores, kept, sure)
        if len(kept) <= most and worth.min() > 0:
            break
        kept = np.delete(kept, worth.argmin())
    return kept


def _split(images, state, most, contrast, search, cuts, sure=SURE):
    """Averages and counts with the parts of ``most`` classes, at most, in place of those that particles tell apart.

    None if there are none. ``cuts`` has members and parts of classes that were cut before, and gets those of others.
    """
    parts = {}
    for k in np.flatnonzero((state.counts >= SMALLEST_SPLIT) & (most > 0)):
        members = np.flatnonzero(state.found.assign == k)
        cut = next((known for others, known in cuts if _are_same(members, others)), None)
        if cut is None:
            cut = _cut_in_two(images[members], state.found.poses[members], contrast, search)
            cuts.append((members, cut))
        worths = [_worth(both.scores, np.arange(2), sure).min() for both in cut]
        if worths and max(worths) > 0:
            parts[k] = max(worths), cut[int(np.argmax(worths))]
    chosen = sorted(parts, key=lambda k: -parts[k][0])[:most]
    if not chosen:
        return None, None
    rest = np.setdiff1d(np.arange(len(state.counts)), chosen)
    averages, counts = (np.concatenate([old[rest], *(getattr(parts[k][1], name) for k in chosen)])
                        for name, old in (("averages", state.averages), ("counts", state.counts)))
    return averages, counts


def _are_same(members, others):
    """Whether two classes, given by their members, have nearly all of these in common."""
    return len(np.intersect1d(members, others)) >= SAME_CLASS * max(len(members), len(others))


def _cut_in_two(images, poses, contrast, search):
    """The ``State`` of two parts of one class for each way to cut it, but for those with a part that is too small."""
    moved = average.transform(images, poses)
    pixels = contrast.pixels(moved, max(NEIGHBOURS))
    pixels -= pixels.mean(axis=0)
    states = []
    for component in _components(pixels):
        part = _cut(component)
        averages = contrast.centered(np.stack([moved[part == h].mean(axis=0) for h in (0, 1)]))
        states.append(_settle(images, averages, np.bincount(part, minlength=2), contrast, search))
    return [state for state in states if state.counts.min() >= SMALLEST_PART]


def _components(pixels):
    """Members, (n_members, n_pixels) of mean 0, along their first ``COMPONENTS`` principal components, as rows."""
    few_members = len(pixels) <= pixels.shape[1]
    products = (pixels @ pixels.T if few_members else pixels.T @ pixels).astype(np.float64)
    n = len(products)
    _, vectors = scipy.linalg.eigh(products, subset_by_index=[max(0, n - COMPONENTS), n - 1])
    return (vectors if few_members else pixels @ vectors).T[::-1]


def _cut(values):
    """0 or 1 for each value: the cut into lower and higher ones that leaves the least variance within."""
    order = np.argsort(values, kind="stable")
    n, below = len(values), np.cumsum((values - values.mean())[order])[:-1]
    size = np.arange(1, n)
    between = below**2 * (1 / size + 1 / (n - size))
    allowed = (size >= SMALLEST_PART) & (n - size >= SMALLEST_PART)
    part = np.zeros(n, np.int64)
    part[order[np.where(allowed, between, -1.0).argmax() + 1:]] = 1
    return part
