"""The multi-reference refinement: parameters, what is checked before it starts, and the loop (SPEC section 1).

The loop reads like the method: transform the references, search every particle, add it to its class, make new
references of the sums. There is one loop; a serial run has one rank.
"""

import logging
import random
import time
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from mrefali import average, geometry, reference
from mrefali.search import Search, align, ring_spectra

logger = logging.getLogger(__name__)

#: A class with fewer particles has vanished.
SMALLEST_CLASS = 4

#: Iterations at most where ``maxit=0`` asks for auto-stop.
AUTO_STOP_ITERATIONS = 10

#: Pixels read and searched at a time, as bytes of float32.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Settings:
    """What a refinement does.

    Attributes
    ----------
    search : Search
    mask : (n, n) float32
    center : int
        0 none, 1 phase centre of gravity, -1 mean shift of the class.
    maxit : int
        Iterations; 0 means at most ten, ended when the criterion falls.
    function : callable
        See :mod:`mrefali.reference`.
    rand_seed : int
    largest : float
        Largest absolute pixel of the normalised particles.
    quiet : bool
    """

    search: Search
    mask: np.ndarray
    center: int
    maxit: int
    function: object
    rand_seed: int
    largest: float
    quiet: bool = False

    @property
    def inside(self):
        """Where normalisation looks: mask != 0, (n, n) bool (SPEC section 6)."""
        return self.mask != 0

    @property
    def core(self):
        """Where averages are measured: mask > 0.5, (n, n) bool (SPEC section 6)."""
        return self.mask > 0.5


@dataclass(frozen=True)
class ClassUpdate:
    """What became of one class in one iteration.

    Attributes
    ----------
    image : (n, n) float32
        The new reference.
    members : (count,) int64
        Sorted indices of its particles; of a vanished class the particle drawn to replace it.
    count : int
    frc : (n_rings, 3) float64 or None
        None for a class that vanished.
    filter : TanhFilter or None
        None for a class that vanished, or where the reference function names none.
    shift : (2,) float64, px
        By which the average was moved to centre it.
    """

    image: np.ndarray
    members: np.ndarray
    count: int
    frc: np.ndarray | None = None
    filter: reference.TanhFilter | None = None
    shift: np.ndarray | None = None

    @property
    def vanished(self):
        """Whether the class was replaced by a single particle."""
        return self.frc is None


@dataclass(frozen=True)
class Iteration:
    """One finished iteration; arrays over the particles are None except at the root.

    Attributes
    ----------
    number : int
        From 0.
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
        Centring folded in.
    peak : (n_particles,) float64
    changed : (n_particles,) bool
        Whether the class is another than an iteration before; all of them in the first.
    classes : list of ClassUpdate
    criterion : float
    seconds : float
    """

    number: int
    assign: np.ndarray
    poses: np.ndarray
    peak: np.ndarray
    changed: np.ndarray
    classes: list
    criterion: float
    seconds: float

    @property
    def averages(self):
        """The new references, (n_references, n, n) float32."""
        return np.stack([c.image for c in self.classes])


def refine(stack, references, poses, settings, comm):
    """Run the refinement; yields an ``Iteration`` after each.

    Parameters
    ----------
    stack
        Anything with ``n_images``, ``read(start, stop)`` and ``read_at(indices)``, see :mod:`mrefali.io`.
    references : (n_references, n, n) float32
    poses : (n_particles,) geometry.POSE
        Where the first search starts.
    settings : Settings
    comm
        See :mod:`mrefali.parallel`.
    """
    rng = random.Random(settings.rand_seed)
    start, stop = comm.share(stack.n_images)
    poses, assign = poses[start:stop].copy(), np.full(stop - start, -1, np.int32)
    previous = -np.inf
    for number in range(settings.maxit or AUTO_STOP_ITERATIONS):
        began = time.perf_counter()
        before = assign.copy()
        assign, poses, peak, sums = _search_and_sum(stack, references, poses, start, settings, comm, number)
        comm.sum_into(sums.sums)
        everywhere = comm.gather(assign), comm.gather(poses)
        classes = comm.from_root(
            update_classes(sums, *everywhere, stack, settings, rng) if comm.is_root else None)
        poses = fold_in_centring(poses, assign, classes)
        references = np.stack([c.image for c in classes])
        criterion = average.criterion(references, settings.core)
        found = [comm.gather(a) for a in (assign, poses, peak, assign != before)]
        yield Iteration(number, *found, classes, criterion, time.perf_counter() - began)
        if settings.maxit == 0 and criterion < previous:
            return
        previous = criterion


def _search_and_sum(stack, references, poses, start, settings, comm, number):
    """Search this rank's particles, the first of which is ``start``, and add each to its class."""
    n_particles, box = len(poses), references.shape[1]
    spectra = ring_spectra(average.normalize_references(references, settings.inside), settings.search)
    sums = average.ClassSums(len(references), box, stack.n_images, settings.largest)
    assign, new_poses, peak = np.empty(n_particles, np.int32), np.empty_like(poses), np.empty(n_particles)
    with tqdm(total=n_particles, desc=f"iteration {number}", unit=" particles", leave=False,
              disable=None if comm.is_root and not settings.quiet else True) as progress:
        for first, last in blocks(n_particles, box):
            images = stack.read(start + first, start + last)
            average.normalize_particles(images, settings.inside)
            found = align(images, poses[first:last], spectra, settings.search)
            sums.add(images, found.poses, found.assign, start + first)
            assign[first:last], new_poses[first:last], peak[first:last] = found.assign, found.poses, found.peak
            progress.update(last - first)
    return assign, new_poses, peak, sums


def blocks(n_particles, box):
    """First and one past the last particle of each block of ``BLOCK_BYTES``."""
    size = max(1, BLOCK_BYTES // (4 * box * box))
    return [(first, min(first + size, n_particles)) for first in range(0, n_particles, size)]


def update_classes(sums, assign, poses, stack, settings, rng):
    """New references of the class sums (SPEC section 5).

    Parameters
    ----------
    sums : ClassSums
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
    stack
        Where the particle that replaces a vanished class is read.
    settings : Settings
    rng : random.Random

    Returns
    -------
    list of ClassUpdate
    """
    classes = []
    order = np.argsort(assign, kind="stable")
    ends = np.cumsum(np.bincount(assign, minlength=len(sums.sums)))
    for k, members in enumerate(np.split(order, ends[:-1])):
        if len(members) < SMALLEST_CLASS:
            drawn = rng.randint(0, stack.n_images - 1)
            image = stack.read_at([drawn])
            average.normalize_particles(image, settings.inside)
            classes.append(ClassUpdate(image[0], np.array([drawn]), len(members)))
            continue
        halves = sums.halves(k)
        frc = average.frc(*halves)
        center = _mean_shift(poses[members]) if settings.center == -1 else settings.center
        image, shift, *fitted = settings.function(settings.mask, center, halves.sum(axis=0) / len(members), frc)
        classes.append(ClassUpdate(image.astype(np.float32), members, len(members), frc, *(fitted or [None]), shift))
    return classes


def _mean_shift(poses):
    """Mean (sx, sy) of a class, sx negated for its mirrored members (SPEC section 5, ``center=-1``)."""
    sign = np.where(poses["mirror"] != 0, -1.0, 1.0)
    return np.array([(sign * poses["sx"]).mean(), poses["sy"].mean()])


def fold_in_centring(poses, assign, classes):
    """``poses``, each composed with the shift that centred the average of its class."""
    shifts = np.array([np.zeros(2) if c.shift is None else c.shift for c in classes])[assign]
    moved = shifts.any(axis=1)
    folded = poses.copy()
    folded[moved] = geometry.compose(poses[moved], geometry.make_poses(0.0, shifts[moved, 0], shifts[moved, 1]))
    return folded
