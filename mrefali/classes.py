"""One update of the classes: averages and FRC of the sums, new references, replacements for vanished classes.

Plain Python over :mod:`mrefali.average` and a reference function (SPEC section 5); knows no rank.
"""

import logging
from dataclasses import dataclass, replace

import numpy as np

from mrefali import average, health, reference
from mrefali.ctf import wiener_divide
from mrefali.parallel import SERIAL

details = logging.getLogger("mrefali.details")  # for the log of the run alone

#: A class with fewer particles has vanished.
SMALLEST_CLASS = 4

#: Where classes are compared, added to the mean CTF^2 of their particles, which is about 0.5 but near its zeros.
LEAST_CTF_SQ = 0.1


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


def update_classes(sums, found, references, particles, settings, rng):
    """New references of the class sums.

    Parameters
    ----------
    sums : average.ClassSums
    found : search.Alignments
        Of all particles.
    references : (n_references, n, n) float32
        The present ones.
    particles : particles.Particles
        Where those that replace a vanished class are read.
    settings : refine.Settings
    rng : random.Random

    Returns
    -------
    list of ClassUpdate
    """
    members = members_of(found.assign, len(references))
    updates = average_classes(sums, members, found.poses, settings)
    _examine(updates, sums, settings)
    substitute = VANISHED[settings.vanished](members, found, references, particles, settings, rng)
    return [substitute(k) if update is None else update for k, update in enumerate(updates)]


def average_classes(sums, members, poses, settings):
    """The ``ClassUpdate`` of each class by itself, None for one that vanished.

    Parameters
    ----------
    sums : average.ClassSums
    members : list of int array
        See :func:`members_of`.
    poses : (n_particles,) geometry.POSE
    settings : refine.Settings
    """
    return [_averaged(k, sums, k, those, poses, settings) if len(those) >= SMALLEST_CLASS else None
            for k, those in enumerate(members)]


def members_of(assign, n_classes):
    """Sorted indices of the particles of each class, a list of ``n_classes`` int arrays."""
    order = np.argsort(assign, kind="stable")
    return np.split(order, np.cumsum(np.bincount(assign, minlength=n_classes))[:-1])


def _examine(updates, sums, settings):
    """Put into the updates that there are what their averages say of the classes."""
    there = [k for k, update in enumerate(updates) if update is not None]
    if not there:
        return
    pairs = np.stack([health.shrunk(_half_means(sums, k, updates[k].members), settings.search) for k in there])
    found = health.examine(pairs, settings.search, SERIAL)
    for k, like, likeness, detail, error in zip(there, *(values.tolist() for values in vars(found).values()),
                                                strict=True):
        updates[k] = replace(updates[k], like=None if like < 0 else there[like], likeness=likeness, detail=detail,
                             detail_error=error)


def _half_means(sums, k, members):
    """The averages of the two halves of class ``k``, (2, n, n) float64, of one height however few its particles are."""
    halves, counts = sums.halves(k), np.maximum(np.bincount(members % 2, minlength=2), 1)
    if sums.ctf_sums is None:
        return halves / counts[:, None, None]
    # not by the snr of the run, whose Wiener term flattens a small class more than a large one
    return np.stack([wiener_divide(half, weight, 1 / (LEAST_CTF_SQ * count))
                     for half, weight, count in zip(halves, sums.ctf_sq(k), counts, strict=True)])


def _averaged(k, sums, row, members, poses, settings):
    """The update of class ``k``, whose sums are in ``row``."""
    halves = sums.halves(row)
    total, n_members = halves.sum(axis=0), len(members)
    if sums.ctf_sums is None:
        mean = total / n_members
    else:
        weights = sums.ctf_sq(row)
        halves = [wiener_divide(half, weight, settings.snr) for half, weight in zip(halves, weights, strict=True)]
        mean = wiener_divide(total, weights.sum(axis=0), settings.snr)
    frc = average.frc(*halves)
    center = _mean_shift(poses[members]) if settings.center == -1 else settings.center
    image, shift, fitted = _call(settings, k, center, mean, frc)
    if settings.center_limit is not None and np.hypot(*shift) > settings.center_limit:
        details.debug("class %d: its centre x %.3f, y %.3f lies beyond center_limit=%g: the average stays where it is",
                     k, *-shift, settings.center_limit)
        image, shift, fitted = _call(settings, k, 0, mean, frc)
    return ClassUpdate(image, members, n_members, frc, fitted, shift)


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


def _mean_shift(poses):
    """Mean (sx, sy) of a class, sx negated for its mirrored members (SPEC section 5, ``center=-1``)."""
    sign = np.where(poses["mirror"] != 0, -1.0, 1.0)
    return np.array([(sign * poses["sx"]).mean(), poses["sy"].mean()])


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
        sums = average.ClassSums(1, particles.box, particles.n_images, settings.largest, particles.ctf is not None,
                                 settings.move)
        for first in range(0, len(worse), particles.block_size):
            numbers = worse[first:first + particles.block_size]
            sums.add(particles.read(numbers), found.poses[numbers], np.zeros(len(numbers), np.int32), numbers,
                     particles.ctf_sq(numbers))
        split = _averaged(k, sums, 0, worse, found.poses, settings)
        return ClassUpdate(split.image, members[k], len(members[k]))
    return replace


#: What ``vanished`` may be.
VANISHED = {"random": _replace_at_random, "split": _split_largest, "keep": _keep}
