"""Classes of particles that nothing is known of: the way in of the commands ``seed`` and ``classify``.

Five steps, the last three repeated:

1. *Neighbours.* Some particles, drawn at random, are references for all. Each gives way to the average of those that
   are most like it, twice over.
2. *Choice.* Of these averages as many are taken, twice the classes asked for, as fit all particles best together.
3. *Alignment.* Every particle goes to the average it fits best, in the pose that is refined continuously; new averages.
4. *Dropping.* A class that the particles fit no worse without is in doubt; it is dropped where nothing tells it from
   the class that its members fit best of the others.
5. *Splitting.* A class whose members differ by more than noise is cut in two along a principal component, and its
   members are aligned to the two parts, which take its place.

What tells two classes apart, and whether particles differ by more than noise, is for :mod:`mrefali.structure` to say.
Whether particles fit is cross-validated: each half of the particles makes averages; the class is chosen by those of
one half, and what it is worth measured by those of the other. A particle's own part in an average is taken out of its
score.

Averages are filtered for what tells views apart, see :mod:`mrefali.contrast`. All of this is done on small images.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np

from mrefali import average, geometry, structure
from mrefali.contrast import Contrast, align_to_averages, centered_average
from mrefali.fourier import shrink_factor
from mrefali.search import Alignments, Search, align_each, ring_spectra
from mrefali.sharpening import sharpen, splines
from mrefali.structure import SMALLEST_PART, SURE, Structures

#: Images are shrunk to about this box: what tells views apart is there.
BOX = 64

#: Particles that begin as references, and averages chosen of those, for each class asked for.
FIRST_REFERENCES, FIRST_CLASSES = 8, 2

#: Neighbours that are averaged, round by round; step of their search in px, coarse for speed.
NEIGHBOURS, NEIGHBOUR_STEP = (8, 12), 2.0

#: Iterations of alignment between droppings, and of the two parts of a class, until less than this share of the
#: particles changes class.
FEWEST_ITERATIONS, MOST_ITERATIONS, SETTLED = 3, 10, 0.01

#: How often classes are dropped at most; they are split in between.
ROUNDS = 5

#: Standard errors that are taken off what a class is worth.
WORTH_ERRORS = 3.0

#: Classes of a particle whose scores are refined, the best by the grid search; those of the others are estimated.
REFINED_SCORES = 4

#: Memory of a pair of a particle and a first reference, in bytes: score and pose, and what they are made of. Measured.
PAIR_BYTES = 230


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
    work = max(PAIR_BYTES * n_first_pairs(n_particles, n_classes), structure.bytes_needed(n_particles, box))
    return 2 * 4 * n_particles * box**2 + work


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
        Classes at most; fewer where no more can be told apart.
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
    structures, already_cut = Structures(images, contrast, search, rng), []
    for number in range(1, ROUNDS + 1):
        state = _settle(images, averages, counts, contrast, search)
        kept = _needed(state, _scores(images, state, contrast, search), n_classes, structures)
        if len(kept) < len(state.counts):
            state = _settle(images, state.averages[kept], state.counts[kept], contrast, search)
        report(f"round {number}: {len(state.counts)} classes")
        if number == ROUNDS:
            break
        averages, counts = _split(images, state, contrast, search, structures, already_cut)
        if averages is None:
            break
    order = np.argsort(-state.counts, kind="stable")
    order = order[state.counts[order] > 0]
    new = np.full(len(state.counts), -1, np.int32)
    new[order] = np.arange(len(order))
    return Seeds(new[state.found.assign], state.found.poses, len(order))


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
    """

    averages: np.ndarray
    counts: np.ndarray
    found: Alignments


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
        averages = np.stack([
            centered_average(average.transform(images[members], found.poses[k, members]), found.poses[k, members])
            for k, members in enumerate(nearest)])
        counts = np.full(len(drawn), n_neighbours)
    found = _align_each(images, contrast.references(averages, counts).images, coarse)
    chosen = _choose(found.peak.T, min(FIRST_CLASSES * n_classes, len(drawn)))
    best = found.peak[chosen].argmax(axis=0)
    poses = found.poses[chosen][best, np.arange(len(images))]
    return _averages(images, best, poses, averages[chosen])


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


def _averages(images, assign, poses, before):
    """Centred averages and counts; a class without particles keeps the average it had."""
    averages, counts = before.copy(), np.bincount(assign, minlength=len(before))
    moved = average.transform(images, poses)
    for k in np.flatnonzero(counts):
        averages[k] = centered_average(moved[assign == k], poses[assign == k])
    return averages, counts


def _settle(images, averages, counts, contrast, search):
    """``State`` once hardly a particle changes class, or after ``MOST_ITERATIONS`` of alignment."""
    before = np.full(len(images), -1)
    for number in range(MOST_ITERATIONS):
        found = align_to_averages(images, averages, counts, contrast, search)
        averages, counts = _averages(images, found.assign, found.poses, averages)
        if number >= FEWEST_ITERATIONS - 1 and (found.assign != before).mean() < SETTLED:
            break
        before = found.assign
    return State(averages, counts, found)


# --- steps 4 and 5


def _scores(images, state, contrast, search):
    """Of all particles against the averages of those of even number, and of odd number, (2, n_particles, n_classes)."""
    half = np.arange(len(images)) % 2
    return np.stack([_scores_of_half(images, state.found, half == h, state.averages, contrast, search) for h in (0, 1)])


def _scores_of_half(images, found, used, averages, contrast, search):
    """Of all particles against the averages of those that are ``used``, (n_particles, n_classes)."""
    members = np.flatnonzero(used)
    halves, counts = _averages(images[members], found.assign[members], found.poses[members], averages)
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


def _worth(scores, classes):
    """How much less well particles fit without each of the ``classes``, at least, (len(classes),).

    Cross-validated, less ``WORTH_ERRORS`` standard errors: the members of a class that can be done without fit others
    as well.
    """
    total, squares, i = np.zeros(len(classes)), np.zeros(len(classes)), np.arange(scores.shape[1])
    for chooser, judge in (scores[:, :, classes], scores[::-1, :, classes]):
        first, second = np.argsort(-chooser, axis=1, kind="stable")[:, :2].T
        loss = judge[i, first] - judge[i, second]
        total += np.bincount(first, loss, minlength=len(classes)) / 2
        squares += np.bincount(first, loss**2, minlength=len(classes)) / 2
    return total - WORTH_ERRORS * np.sqrt(squares)


def _needed(state, scores, most, structures):
    """The classes, ``most`` of them at most, without those that nothing tells from another one."""
    kept, fit = np.arange(len(state.counts)), scores.mean(axis=0)
    while len(kept) > 1:
        worth = _worth(scores, kept)
        # particles of classes that were dropped go where they fit best
        assign = np.where(np.isin(state.found.assign, kept), state.found.assign, kept[fit[:, kept].argmax(axis=1)])
        surely = np.array([np.inf if value > 0 else _told_apart(state, k, kept, fit, assign, structures)
                           for k, value in zip(kept, worth, strict=True)])
        if len(kept) <= most and surely.min() > SURE:
            break
        kept = np.delete(kept, surely.argmin() if surely.min() < np.inf else worth.argmin())
    return kept


def _told_apart(state, k, kept, fit, assign, structures):
    """How surely a class is another one than that which its members fit best of the others, in standard errors."""
    sizes = np.bincount(assign, minlength=len(state.counts))
    others = kept[(kept != k) & (sizes[kept] > 0)]
    if sizes[k] < SMALLEST_PART or not len(others):
        return -np.inf
    near = others[fit[assign == k][:, others].mean(axis=0).argmax()]
    both = structures.of(np.flatnonzero((assign == k) | (assign == near)), min(sizes[k], sizes[near]),
                         state.averages[near], state.counts[near])
    return -np.inf if both is None else both.tells(assign[both.members] == k)


def _split(images, state, contrast, search, structures, already_cut):
    """Averages and counts with two parts in place of each class that has structure.

    None if there are none. ``already_cut`` has structures that were cut before, and gets those of others.
    """
    parts = {}
    for k in range(len(state.counts)):
        members = np.flatnonzero(state.found.assign == k)
        group = structures.of(members, len(members), state.averages[k], state.counts[k])
        if group is None or group.excess.max() <= SURE or group in already_cut:
            continue
        already_cut.append(group)
        both = _settle_parts(images[group.members], group, contrast, search)
        if both.counts.min() >= SMALLEST_PART:
            parts[k] = both
    if not parts:
        return None, None
    rest = np.setdiff1d(np.arange(len(state.counts)), list(parts))
    return tuple(np.concatenate([old[rest], *(getattr(both, name) for both in parts.values())])
                 for name, old in (("averages", state.averages), ("counts", state.counts)))


def _settle_parts(images, group, contrast, search):
    """The ``State`` of the two parts of a group by itself."""
    moved, part = average.transform(images, group.poses), group.parts
    averages = np.stack([centered_average(moved[part == h], group.poses[part == h]) for h in (0, 1)])
    return _settle(images, averages, np.bincount(part, minlength=2), contrast, search)
