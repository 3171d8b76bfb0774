"""Classes of particles that nothing is known of: the way in of the commands ``seed`` and ``classify``.

Six steps, the last four repeated:

1. *Neighbours.* Some particles, drawn at random, are references for all. Each gives way to the average of those that
   are most like it, twice over, see :mod:`mrefali.neighbours`.
2. *Choice.* Of these averages as many are taken, twice the classes asked for, as fit all particles best together.
3. *Alignment.* Every particle goes to its most probable class, and is aligned to its average; new averages.
4. *Dropping.* A class is dropped where nothing tells it from that which its members fit best of the others.
5. *Splitting.* A class whose members differ by more than noise is cut in two along a principal component, and its
   members are aligned to the two parts, which take its place.
6. *Newcomers.* Where there is nothing to split, and there are fewer classes than asked for, the particles that fit
   worst are what those drawn at random were, until no class comes of it.

What tells two classes apart, and whether particles differ by more than noise, is for :mod:`mrefali.structure` to say,
and what class is the likeliest for :mod:`mrefali.likelihood`.

Averages are filtered for what tells views apart, see :mod:`mrefali.contrast`. All of this is done on small images.

Arrays in, arrays out: this module knows no file and no rank.
"""

from dataclasses import dataclass, replace

import numpy as np

from mrefali import average, geometry, structure
from mrefali.contrast import Contrast, centered_average
from mrefali.fourier import shrink_factor
from mrefali.likelihood import Likeliest
from mrefali.neighbours import choose, coarse_search, neighbourhoods
from mrefali.search import Search
from mrefali.structure import SMALLEST_PART, SURE, Structures

#: Images are shrunk to about this box: what tells views apart is there.
BOX = 64

#: Particles that begin as references, and averages chosen of those, for each class asked for.
FIRST_REFERENCES, FIRST_CLASSES = 8, 2

#: Newcomers at a time are this share of the classes asked for, and so many at least where there is room; each is chosen
#: of so many particles.
NEWCOMERS, FEWEST_NEWCOMERS, NEWCOMER_REFERENCES = 0.25, 2, 8

#: Iterations of alignment between droppings, and of the two parts of a class, until less than this share of the
#: particles changes class.
FEWEST_ITERATIONS, MOST_ITERATIONS, SETTLED = 3, 10, 0.01

#: Iterations of the first classes at most, of which several are one view: they would exchange particles for long.
FIRST_ITERATIONS = 4

#: Iterations, 1 at least, that search all shifts whenever classes have changed, the first in the steps of neighbours,
#: since averages are to change; those after them search so many px about the shifts that were found.
WIDE_ITERATIONS, NEAR = 2, 1.0

#: How often classes are dropped at most; in between they are split, or newcomers join them.
ROUNDS = 8

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


def find_seeds(images, n_classes, search, rng, report=lambda text: None, ctf=None):
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
        Is told in words of every round that changes the classes.
    ctf : (n_particles,) ctf.CTF_PARAMETERS, optional
        Of images that are multiplied by their CTF.

    Returns
    -------
    Seeds
    """
    contrast = Contrast(images, search.outer_radius)
    classes = _first_classes(images, n_classes, contrast, search, rng)
    structures, already_cut = Structures(images, contrast, search, rng, ctf), []
    came, settled = np.zeros(len(images), bool), None
    for number in range(1, ROUNDS + 1):
        state = _settle(images, classes, contrast, search, FIRST_ITERATIONS if number == 1 else MOST_ITERATIONS)
        kept = _needed(state, n_classes, structures)
        if settled is not None and kept.max() < len(settled.counts):  # no newcomer is a class of its own
            state = settled
            break
        while len(kept) < len(state.counts):
            state = _settle(images, state.only(kept), contrast, search)
            kept = np.flatnonzero(state.counts >= min(SMALLEST_PART, state.counts.max()))
        report(f"round {number}: {len(state.counts)} classes")
        if number == ROUNDS:
            break
        classes = _split(images, state, contrast, search, structures, already_cut)
        settled = state if classes is None else None  # what newcomers join
        if classes is None:
            classes = _with_newcomers(images, state, n_classes, contrast, search, came)
        if classes is None:
            break
    state = state.only(np.argsort(-state.counts, kind="stable"))
    return Seeds(state.assign, state.poses, len(state.counts))


@dataclass(frozen=True)
class Classes:
    """Averages, and which particles are in them.

    Attributes
    ----------
    averages : (n_classes, n, n) float32
        Centred.
    counts : (n_classes,) int64
    assign : (n_particles,) int32
        -1 for a particle that is in none.
    """

    averages: np.ndarray
    counts: np.ndarray
    assign: np.ndarray

    def only(self, kept):
        """Some of the classes, in this order; the particles of the others are in none."""
        new = np.full(len(self.counts), -1, np.int32)
        new[kept] = np.arange(len(kept))
        return replace(self, averages=self.averages[kept], counts=self.counts[kept],
                       assign=np.where(self.assign < 0, np.int32(-1), new[self.assign]))


@dataclass(frozen=True)
class State(Classes):
    """Classes once particles were aligned to those before.

    Attributes
    ----------
    poses : (n_particles,) geometry.POSE
        Of the particles in the averages.
    scores : (n_particles, n_classes) float64
        With the averages of the iteration before, see :meth:`mrefali.contrast.References.fair`; of the grid search,
        which may stand about the shift found for ``assign``.
    """

    poses: np.ndarray
    scores: np.ndarray

    def only(self, kept):
        """The same of some of the classes."""
        return replace(super().only(kept), scores=self.scores[:, kept])


# --- steps 1 and 2


def _first_classes(images, n_classes, contrast, search, rng):
    """``Classes`` about averages of neighbours."""
    drawn = np.sort(rng.choice(len(images), min(FIRST_REFERENCES * n_classes, len(images)), replace=False))
    near = neighbourhoods(images, drawn, contrast, search)
    scores = near.found.peak.T
    chosen = choose(scores, scores.mean(axis=1), min(FIRST_CLASSES * n_classes, len(drawn)))
    best = scores[:, chosen].argmax(axis=1).astype(np.int32)
    poses = near.found.poses[chosen][best, np.arange(len(images))]
    return Classes(*_averages(images, best, poses, near.averages[chosen]), best)


# --- step 3


def _averages(images, assign, poses, before):
    """Centred averages and counts; a class without particles keeps the average it had."""
    averages, counts = before.copy(), np.bincount(assign, minlength=len(before))
    moved = average.transform(images, poses)
    for k in np.flatnonzero(counts):
        averages[k] = centered_average(moved[assign == k], poses[assign == k])
    return averages, counts


def _settle(images, classes, contrast, search, most=MOST_ITERATIONS):
    """``State`` once hardly a particle changes class, or after ``most`` iterations of alignment."""
    near = _near_search(search)
    for number in range(most):
        before = classes
        if number < WIDE_ITERATIONS:
            within, starts = search if number else coarse_search(search), geometry.identity_poses(len(images))
        else:  # averages were centred anew since, by about half a px at first: less than a near search reaches
            within, starts = near, _starts(before.poses, search, near)
        likeliest = Likeliest(contrast.references(before.averages, before.counts), within)
        found, scores = likeliest.with_scores(images, starts, before.assign)
        classes = State(*_averages(images, found.assign, found.poses, before.averages), found.assign, found.poses,
                        scores)
        if number >= FEWEST_ITERATIONS - 1 and (found.assign != before.assign).mean() < SETTLED:
            break
    return classes


def _near_search(search):
    """The ``Search`` about shifts that were found."""
    return replace(search, xr=min(NEAR, search.xr), yr=min(NEAR, search.yr))


def _starts(poses, search, near):
    """The shifts of ``poses``, moved inwards where ``near`` about them would leave ``search`` or the disc the image."""
    left, right = geometry.search_range(np.array([search.xr, search.yr]), np.zeros(2), search.box, search.outer_radius)
    room = np.maximum(np.minimum(left, right) - [near.xr, near.yr], 0)
    return geometry.make_poses(0.0, *-geometry.inverse_shift(poses).clip(-room, room).T)


# --- steps 4 to 6


def _worth(scores):
    """How much less well particles, by their scores (n_particles, n_classes), fit without each of the classes."""
    second, first = np.partition(scores, -2, axis=1)[:, -2:].T
    return np.bincount(scores.argmax(axis=1), first - second, minlength=scores.shape[1])


def _needed(state, most, structures):
    """The classes, ``most`` of them at most, without those that nothing tells from another one."""
    kept, told_by_fit = np.flatnonzero(state.counts), {}
    while len(kept) > 1:
        # particles of classes that were dropped go where they fit best
        best = kept[state.scores[:, kept].argmax(axis=1)]
        assign = np.where(np.isin(state.assign, kept), state.assign, best)
        surely = {}
        for k in kept[np.argsort(_worth(state.scores[:, kept]), kind="stable")]:
            surely[k] = _told_apart(state, k, kept, assign, structures, told_by_fit)
            if surely[k] <= SURE:
                break
        least = min(surely, key=surely.get)
        if surely[least] > SURE and len(kept) <= most:
            break
        kept = kept[kept != least]
    return kept


def _told_apart(state, k, kept, assign, structures, told_by_fit):
    """How surely a class is another one than that which its members fit best of the others, in standard errors.

    ``told_by_fit`` has what is known of pairs of classes, and gets more.
    """
    sizes = np.bincount(assign, minlength=len(state.counts))
    others = kept[(kept != k) & (sizes[kept] > 0)]
    if sizes[k] < SMALLEST_PART or not len(others):
        return -np.inf
    near = others[state.scores[assign == k][:, others].mean(axis=0).argmax()]
    pair = sorted([k, near])
    known_as = *pair, *sizes[pair]  # classes that are kept lose no member, so of the same size they are the same
    if known_as not in told_by_fit:
        told_by_fit[known_as] = structures.told_by_fit(
            [np.flatnonzero(assign == one) for one in pair], state.averages[pair], state.counts[pair],
            np.select([state.assign == one for one in pair], [0, 1], -1))
    if told_by_fit[known_as] > SURE:  # quickly told, unlike structure
        return told_by_fit[known_as]
    both = structures.of(np.flatnonzero((assign == k) | (assign == near)), min(sizes[k], sizes[near]),
                         state.averages[near], state.counts[near])
    return -np.inf if both is None else both.tells(assign[both.members] == k)


def _split(images, state, contrast, search, structures, already_cut):
    """``Classes`` with two parts in place of each that has structure.

    None if there are none. ``already_cut`` has structures that were cut before, and gets those of others.
    """
    parts = {}
    for k in range(len(state.counts)):
        members = np.flatnonzero(state.assign == k)
        group = structures.of(members, len(members), state.averages[k], state.counts[k])
        if group is None or group.excess.max() <= SURE or group in already_cut:
            continue
        already_cut.append(group)
        mine = np.isin(group.members, members)  # what is known may be of a group that was nearly the same
        cut_up, part, poses = group.members[mine], group.parts[mine].astype(np.int32), group.poses[mine]
        if np.bincount(part, minlength=2).min() < SMALLEST_PART:
            continue
        both = _settle_parts(images[cut_up], part, poses, contrast, search)
        if both.counts.min() >= SMALLEST_PART:
            parts[k] = cut_up, both
    if not parts:
        return None
    classes = state.only(np.setdiff1d(np.arange(len(state.counts)), list(parts)))
    for members, both in parts.values():
        assign = classes.assign.copy()
        assign[members] = both.assign + len(classes.counts)
        classes = Classes(np.concatenate([classes.averages, both.averages]),
                          np.concatenate([classes.counts, both.counts]), assign)
    return classes


def _settle_parts(images, part, poses, contrast, search):
    """The ``State`` of two parts, 0 and 1, of particles by themselves."""
    moved = average.transform(images, poses)
    averages = np.stack([centered_average(moved[part == h], poses[part == h]) for h in (0, 1)])
    return _settle(images, Classes(averages, np.bincount(part, minlength=2), part), contrast, search)


def _with_newcomers(images, state, n_classes, contrast, search, came):
    """``Classes`` with some more, of neighbours of the particles that fit worst; None without room or such particles.

    ``came`` (n_particles,) bool has the particles that classes were begun about before, and gets those of now.
    """
    most = min(n_classes - len(state.counts), max(FEWEST_NEWCOMERS, int(NEWCOMERS * n_classes)))
    fit = state.scores.max(axis=1)
    worst = np.argsort(np.where(came, np.inf, fit), kind="stable")[:min(NEWCOMER_REFERENCES * most, (~came).sum())]
    if not len(worst):
        return None
    came[worst] = True
    near = neighbourhoods(images, worst, contrast, search)
    chosen = choose(near.scores(), fit, min(most, len(worst)))
    assign, poses = state.assign.copy(), state.poses.copy()
    for i, k in reversed(list(enumerate(chosen))):  # what two have in common is for the better one
        assign[near.members[k]], poses[near.members[k]] = len(state.counts) + i, near.member_poses[k]
    before = np.concatenate([state.averages, near.averages[chosen]])
    return Classes(*_averages(images, assign, poses, before), assign)
