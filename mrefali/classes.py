"""One update of the classes: averages and FRC of the sums, new references, replacements for vanished classes.

Plain Python over :mod:`mrefali.average` and a reference function (SPEC section 5). The ranks share the classes, and
the root replaces those that vanished.
"""

import logging
from dataclasses import dataclass

import numpy as np

from mrefali import average, geometry, health, reference
from mrefali.ctf import LEAST_CTF_SQ, wiener_divide

details = logging.getLogger("mrefali.details")  # for the log of the run alone

#: A class with fewer particles has vanished.
SMALLEST_CLASS = 4

#: ``reseed`` looks at so many times as many particles as a class has on average, but never at more than half of all.
WORST = 2


@dataclass(frozen=True)
class ClassUpdate:
    """What became of one class in one iteration.

    Attributes
    ----------
    image : (n, n) float32
        The new reference.
    members : (n_members,) int64
        Sorted indices of its particles; of a class replaced by a single particle that one alone.
    count : int
        Particles assigned to it.
    frc : (n_rings, 3) float64 or None
        None for a class that vanished.
    filter : TanhFilter or None
        None for a class that vanished, or where the reference function names none.
    shift : (2,) float64 or None
        By which the average was moved to centre it, px; None for a class that vanished.
    like : int or None
        The class whose average is most alike; None for a class that vanished, or where there is no telling.
    likeness, detail, detail_error : float
        See ``health.Health``; NaN for a class that vanished, or where there is no telling.
    """

    image: np.ndarray
    members: np.ndarray
    count: int
    frc: np.ndarray | None = None
    filter: reference.TanhFilter | None = None
    shift: np.ndarray | None = None
    like: int | None = None
    likeness: float = np.nan
    detail: float = np.nan
    detail_error: float = np.nan

    @property
    def vanished(self):
        """Whether the class had too few particles for an average."""
        return self.frc is None


@dataclass(frozen=True)
class Tally:
    """What the average of a class needs to know of its particles.

    Attributes
    ----------
    k : int
        The class.
    counts : (2,) int64
        Particles of the even and of the odd half.
    center : int or (2,) float64, px
        What the reference function is told of centring; of ``center=-1`` that is the mean shift.
    """

    k: int
    counts: np.ndarray
    center: int | np.ndarray


@dataclass(frozen=True)
class Average:
    """What is made of the sums of one class.

    Attributes
    ----------
    image, frc, filter, shift
        As in ``ClassUpdate``.
    far : (2,) float64 or None, px
        The centre of an average that was not moved, as it lies beyond ``center_limit``.
    """

    image: np.ndarray
    frc: np.ndarray
    filter: reference.TanhFilter | None
    shift: np.ndarray
    far: np.ndarray | None


def update_classes(sums, found, references, particles, settings, rng, comm):
    """New references of the class sums.

    Parameters
    ----------
    sums : average.ClassSums
        Of all ranks, on every rank.
    found : search.Alignments
        Of all particles, at the root.
    references : (n_references, n, n) float32
        The present ones.
    particles : particles.Particles
        Where those that replace a vanished class are read.
    settings : refine.Settings
    rng : random.Random
    comm
        See :mod:`mrefali.parallel`.

    Returns
    -------
    list of ClassUpdate
        None except at the root.
    """
    members = members_of(found.assign, len(references)) if comm.is_root else None
    tallies = comm.from_root(tallies_of(members, found.poses, settings) if comm.is_root else None)
    averages = comm.each(lambda tally: average_class(tally, sums, tally.k, settings), tallies)
    healths = _examine(tallies, sums, settings, comm)
    if not comm.is_root:
        return None
    updates = {}
    for k, made, of_health in zip((tally.k for tally in tallies), averages, healths, strict=True):
        _say_if_far(k, made, settings)
        updates[k] = ClassUpdate(made.image, members[k], len(members[k]), made.frc, made.filter, made.shift, *of_health)
    substitute = VANISHED[settings.vanished](members, found, references, particles, settings, rng)
    return [updates[k] if k in updates else substitute(k) for k in range(len(references))]


def members_of(assign, n_classes):
    """Sorted indices of the particles of each class, a list of ``n_classes`` int arrays."""
    order = np.argsort(assign, kind="stable")
    return np.split(order, np.cumsum(np.bincount(assign, minlength=n_classes))[:-1])


def tallies_of(members, poses, settings):
    """The ``Tally`` of each class that has not vanished, in order.

    Parameters
    ----------
    members : list of int array
        See :func:`members_of`.
    poses : (n_particles,) geometry.POSE
    settings : refine.Settings
    """
    return [_tally(k, those, poses, settings) for k, those in enumerate(members) if len(those) >= SMALLEST_CLASS]


def _tally(k, members, poses, settings):
    center = geometry.mean_shift(poses[members]) if settings.center == -1 else settings.center
    return Tally(k, np.bincount(members % 2, minlength=2), center)


def average_class(tally, sums, row, settings):
    """The ``Average`` of a class.

    Parameters
    ----------
    tally : Tally
    sums : average.ClassSums
    row : int
        Where they have the class.
    settings : refine.Settings
    """
    halves = sums.halves(row)
    total = halves.sum(axis=0)
    if sums.ctf_sums is None:
        mean = total / tally.counts.sum()
    else:
        weights = sums.ctf_sq(row)
        halves = [wiener_divide(half, weight, settings.snr) for half, weight in zip(halves, weights, strict=True)]
        mean = wiener_divide(total, weights.sum(axis=0), settings.snr)
    frc, far = average.frc(*halves), None
    image, shift, fitted = _call(settings, tally.k, tally.center, mean, frc)
    if settings.center_limit is not None and np.hypot(*shift) > settings.center_limit:
        far = -shift
        image, shift, fitted = _call(settings, tally.k, 0, mean, frc)
    return Average(image, frc, fitted, shift, far)


def _say_if_far(k, made, settings):
    """Have the log of the run name an average that ``center_limit`` leaves where it is; at the root, which has it."""
    if made.far is not None:
        details.debug("class %d: its centre x %.3f, y %.3f lies beyond center_limit=%g: the average stays where it is",
                      k, *made.far, settings.center_limit)


def _half_means(tally, sums):
    """The averages of the two halves of a class, (2, n, n) float64, of one height however few its particles are."""
    halves, counts = sums.halves(tally.k), np.maximum(tally.counts, 1)
    if sums.ctf_sums is None:
        return halves / counts[:, None, None]
    # added to the mean CTF^2, not by the snr of the run, whose Wiener term flattens a small class more than a large one
    return np.stack([wiener_divide(half, weight, 1 / (LEAST_CTF_SQ * count))
                     for half, weight, count in zip(halves, sums.ctf_sq(tally.k), counts, strict=True)])


def _examine(tallies, sums, settings, comm):
    """``like``, ``likeness``, ``detail`` and ``detail_error`` of each class that there is."""
    if not tallies:
        return []
    pairs = np.stack(comm.each(lambda tally: health.shrunk(_half_means(tally, sums), settings.search), tallies))
    found, there = health.examine(pairs, settings.search, comm), [tally.k for tally in tallies]
    return [(None if like < 0 else there[like], *numbers)
            for like, *numbers in zip(*(values.tolist() for values in vars(found).values()), strict=True)]


def _call(settings, k, center, mean, frc):
    """What the reference function makes of class ``k``; a function that fails stops the run."""
    name = getattr(settings.function, "__name__", repr(settings.function))
    try:
        image, shift, *rest = settings.function(settings.mask, center, mean, frc)
        image, shift = np.asarray(image, np.float32), np.asarray(shift, np.float64)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"reference function {name} failed for class {k}: {reason}") from error
    if image.shape != mean.shape or shift.shape != (2,):
        raise RuntimeError(f"reference function {name} returned for class {k} a reference of shape {image.shape} and a "
                           f"shift of shape {shift.shape}: it must return {mean.shape} and (2,)")
    if not np.isfinite(image).all() or not np.isfinite(shift).all():
        raise RuntimeError(f"reference function {name} returned NaN or infinite numbers for class {k}")
    fitted = rest[0] if rest else None
    if not isinstance(fitted, reference.TanhFilter | None):
        raise RuntimeError(f"reference function {name} returned for class {k} as its filter {fitted!r}: it must return "
                           f"a TanhFilter, or nothing after the shift")
    return image, shift, fitted


# --- vanished classes: each policy returns a function from class to ClassUpdate, called in order of class


def _replace_at_random(members, found, references, particles, settings, rng):
    """A particle drawn at random, as it is (SPEC section 5)."""
    def replace(k):
        drawn = np.array([rng.randint(0, particles.n_images - 1)])
        return ClassUpdate(particles.read(drawn)[0], drawn, len(members[k]))
    return replace


def _keep(members, found, references, particles, settings, rng):
    """The reference it had."""
    def replace(k):
        return ClassUpdate(references[k], members[k], len(members[k]))
    return replace


def _split_largest(members, found, references, particles, settings, rng):
    """The average of that half of the largest class which correlates worse with its reference.

    Each split leaves the better half to be split again; equal peaks go by index. A largest class of fewer than
    twice ``SMALLEST_CLASS`` is not split: the vanished one keeps its reference.
    """
    pieces = [m[np.lexsort((m, -found.peak[m]))] for m in members]

    def replace(k):
        largest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        piece = pieces[largest]
        if len(piece) < 2 * SMALLEST_CLASS:
            return ClassUpdate(references[k], members[k], len(members[k]))
        middle = (len(piece) + 1) // 2
        pieces[largest], worse = piece[:middle], np.sort(piece[middle:])
        details.debug("class %d: takes the %d particles of class %d that fit it worse", k, len(worse), largest)
        return ClassUpdate(_reference_of(worse, k, found, particles, settings), members[k], len(members[k]))
    return replace


def _reseed(members, found, references, particles, settings, rng):
    """The average of particles that fit worst, all of one class.

    Of the ``WORST`` N / K particles with the lowest peaks, equal ones by index, it takes those of the class that most
    of them are in: a view that has no class is in that of the view most like it, and fits badly, while particles of
    several classes, and so of several alignments, make no average. A second vanished class takes of what is left.
    A class of fewer than ``SMALLEST_CLASS`` such particles is not robbed: the vanished one keeps its reference.
    """
    left = np.lexsort((np.arange(particles.n_images), found.peak))
    n_worst = min(WORST * particles.n_images // len(members), particles.n_images // 2)

    def replace(k):
        nonlocal left
        worst = left[:n_worst]
        home = np.bincount(found.assign[worst], minlength=len(members)).argmax()
        taken = np.sort(worst[found.assign[worst] == home])
        if len(taken) < SMALLEST_CLASS:
            return ClassUpdate(references[k], members[k], len(members[k]))
        left = left[~np.isin(left, taken)]
        details.debug("class %d: takes the %d particles of class %d that fit worst", k, len(taken), home)
        return ClassUpdate(_reference_of(taken, k, found, particles, settings), members[k], len(members[k]))
    return replace


def _reference_of(numbers, k, found, particles, settings):
    """The reference of class ``k`` that these particles make, as they were aligned."""
    sums = settings.class_sums(1, particles)
    for first in range(0, len(numbers), particles.block_size):
        some = numbers[first:first + particles.block_size]
        sums.add(particles.read(some), found.poses[some], np.zeros(len(some), np.int32), some, particles.ctf_sq(some))
    made = average_class(_tally(k, numbers, found.poses, settings), sums, 0, settings)
    _say_if_far(k, made, settings)
    return made.image


#: What ``vanished`` may be.
VANISHED = {"random": _replace_at_random, "split": _split_largest, "keep": _keep, "reseed": _reseed}
