"""The multi-reference refinement: parameters, what is checked before it starts, and the loop (SPEC section 1).

The loop reads like the method: transform the references, search every particle, add it to its class, make new
references of the sums. There is one loop; a serial run has one rank.
"""

import random
import time
from dataclasses import dataclass, replace

import numpy as np

from mrefali import average, geometry, signals
from mrefali.aligner import Aligner
from mrefali.assignment import LIMITED, assign_within_limits
from mrefali.band import Band
from mrefali.classes import SMALLEST_CLASS, update_classes
from mrefali.contrast import Contrast
from mrefali.progress import progress
from mrefali.search import Alignments, Search

#: Iterations at most where ``maxit=0`` asks for auto-stop.
AUTO_STOP_ITERATIONS = 10


@dataclass(frozen=True)
class Settings:
    """What a refinement does.

    Attributes
    ----------
    search : Search
        Of the first stage.
    mask : (n, n) float32
    center : int
        See ``reference.CENTERINGS``.
    maxit : int
        Iterations of a stage; 0 means at most ten, ended when the criterion falls.
    function : callable
        See :mod:`mrefali.reference`.
    rand_seed : int
    largest : float
        Largest absolute pixel of the normalised particles.
    snr : float
        Of the Wiener term, used with CTF.
    vanished : str
        What replaces a class that vanished, see ``classes.VANISHED``.
    center_limit : float or None, px
        An average whose centre lies farther out is not moved.
    quiet : bool
    finer : tuple of Search
        Of the stages that follow.
    subpixel : bool
        Whether what the search finds is refined continuously.
    local : bool
        Refine the poses that there are, each against its class, and search nothing.
    band : Band
        What the alignment sees of the references.
    move : callable
        Of images and poses; how particles are carried into the averages, see ``fourier.INTERPOLATIONS``.
    normalize_references : bool
        Whether references are scaled to one standard deviation for the alignment.
    assignment : str
        How a particle gets its class, see ``assignment.ASSIGNMENTS``.
    contrast : contrast.Contrast or None
        Of the particles, where they go to the likeliest class.
    settled : float or None
        With ``maxit=0``, end a stage when no larger share of the particles changed class, not when the criterion falls,
        but not after its first iteration.
    """

    search: Search
    mask: np.ndarray
    center: int
    maxit: int
    function: object
    rand_seed: int
    largest: float
    snr: float = 1.0
    vanished: str = "random"
    center_limit: float | None = None
    quiet: bool = False
    finer: tuple = ()
    subpixel: bool = False
    local: bool = False
    band: Band = Band()
    move: object = average.transform
    normalize_references: bool = False
    assignment: str = "best"
    contrast: Contrast | None = None
    settled: float | None = None

    @property
    def stages(self):
        """The settings of each stage, which has one search."""
        return [replace(self, search=search) for search in (self.search, *self.finer)]

    @property
    def most_iterations(self):
        """Iterations of all stages together, at most."""
        return (1 + len(self.finer)) * (self.maxit or AUTO_STOP_ITERATIONS)

    def class_sums(self, n_classes, particles):
        """Empty ``average.ClassSums`` of so many classes of these particles."""
        return average.ClassSums(n_classes, particles.box, particles.n_images, self.largest, particles.ctf is not None,
                                 self.move)

    @property
    def inside(self):
        """Where normalisation looks: mask != 0, (n, n) bool (SPEC section 6)."""
        return self.mask != 0

    @property
    def core(self):
        """Where averages are measured: mask > 0.5, (n, n) bool (SPEC section 6)."""
        return self.mask > 0.5


@dataclass(frozen=True)
class State:
    """All that the next iteration depends on.

    Attributes
    ----------
    number : int
        Of the last finished iteration; -1 before the first.
    references : (n_references, n, n) float32
    poses : (n_particles,) geometry.POSE
    assign : (n_particles,) int32
        Before the first iteration -1, but for particles that the references are made of, and in a local refinement.
    criterion : float
        Minus infinity before the first iteration.
    random : tuple
        State of the generator that draws for vanished classes, as ``random.Random.getstate`` gives it.
    stage : int
        From 0, of the last finished iteration.
    begun : int
        Number of the first iteration of that stage.
    stopped : bool
        Whether the criterion fell, which ends a stage with auto-stop.
    """

    number: int
    references: np.ndarray
    poses: np.ndarray
    assign: np.ndarray
    criterion: float
    random: tuple
    stage: int = 0
    begun: int = 0
    stopped: bool = False


def first_average(particles, poses, settings, comm):
    """What all particles make, moved by their poses, as the reference to begin with.

    Parameters
    ----------
    particles : Particles
        At least four.
    poses : (n_particles,) geometry.POSE
    settings : Settings
    comm
        See :mod:`mrefali.parallel`.

    Returns
    -------
    references : (1, n, n) float32
        The average after the reference function, on every rank.
    poses : (n_particles,) geometry.POSE
        With the shift that centred the average.
    """
    start, stop = comm.share(particles.n_images)
    sums = settings.class_sums(1, particles)
    for block, images in particles.stream(start, stop):
        signals.check()
        average.normalize_particles(images, particles.inside)
        sums.add(images, poses[block], np.zeros(len(images), np.int32), np.arange(block.start, block.stop),
                 particles.ctf_sq(block))
    sums.merge(comm)
    n, none = particles.n_images, np.zeros((1, particles.box, particles.box), np.float32)
    everyone = Alignments(np.zeros(n, np.int32), poses, np.zeros(n))
    classes = update_classes(sums, everyone, none, particles, settings, None, comm)
    references, shifts = comm.from_root(_references_and_shifts(classes) if comm.is_root else None)
    return references, geometry.shifted(poses, shifts[everyone.assign])


def first_state(references, poses, settings, classes=None):
    """The ``State`` before the first iteration; ``classes`` (n_particles,) say which reference each is part of."""
    assign = np.full(len(poses), -1, np.int32) if classes is None else classes.astype(np.int32)
    return State(-1, references, poses, assign, -np.inf, random.Random(settings.rand_seed).getstate())


@dataclass(frozen=True)
class Iteration:
    """One finished iteration; classes, and arrays over the particles, are None except at the root.

    Attributes
    ----------
    number : int
        From 0.
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
        Centring folded in.
    peak : (n_particles,) float64
    changed : (n_particles,) bool
        Whether the class is another than an iteration before; of the first, than that whose reference it is in, if any.
    classes : list of classes.ClassUpdate
    criterion : float
    seconds : float
    random : tuple
        As in ``State``, at the root.
    stage, begun : int
    stopped : bool
        As in ``State``.
    """

    number: int
    assign: np.ndarray
    poses: np.ndarray
    peak: np.ndarray
    changed: np.ndarray
    classes: list
    criterion: float
    seconds: float
    random: tuple
    stage: int
    begun: int
    stopped: bool

    @property
    def averages(self):
        """The new references, (n_references, n, n) float32; at the root."""
        return np.stack([c.image for c in self.classes])

    @property
    def state(self):
        """The ``State`` after it; at the root."""
        return State(self.number, self.averages, self.poses, self.assign, self.criterion, self.random, self.stage,
                     self.begun, self.stopped)


def refine(particles, references, poses, settings, comm, state=None):
    """Run the refinement; yields an ``Iteration`` after each.

    Parameters
    ----------
    particles : Particles
    references : (n_references, n, n) float32
    poses : (n_particles,) geometry.POSE
        Where the first search starts.
    settings : Settings
    comm
        See :mod:`mrefali.parallel`.
    state : State, optional
        Where to go on, with its references and poses in place of those given; a local refinement needs it.
    """
    state = state or first_state(references, poses, settings)
    rng = random.Random()
    rng.setstate(state.random)
    start, stop = comm.share(particles.n_images)
    references, poses, assign = state.references, state.poses[start:stop], state.assign[start:stop]
    stage, begun, previous, stopped = state.stage, state.begun, state.criterion, state.stopped
    for number in range(state.number + 1, settings.most_iterations + 1):
        if stopped or number - begun >= (settings.maxit or AUTO_STOP_ITERATIONS):
            stage, begun, previous = stage + 1, number, -np.inf
        if stage == len(settings.stages):
            return
        began = time.perf_counter()
        found, sums = _search_and_sum(particles, references, poses, start, settings.stages[stage], comm, number, assign)
        sums.merge(comm)
        everyone = Alignments(*(comm.gather(a) for a in (found.assign, found.poses, found.peak)))
        classes = update_classes(sums, everyone, references, particles, settings, rng, comm)
        moved = found.assign != assign
        changed = comm.gather(moved)
        references, shifts = comm.from_root(_references_and_shifts(classes) if comm.is_root else None)
        assign, poses = found.assign, geometry.shifted(found.poses, shifts[found.assign])
        criterion = average.criterion(references, settings.core)
        stopped = settings.maxit == 0 and (
            criterion < previous if settings.settled is None else
            number > begun and sum(comm.all_values(int(moved.sum()))) <= settings.settled * particles.n_images)
        yield Iteration(number, everyone.assign, comm.gather(poses), everyone.peak, changed, classes, criterion,
                        time.perf_counter() - began, rng.getstate(), stage, begun, stopped)
        previous = criterion


def _search_and_sum(particles, references, poses, start, settings, comm, number, assign):
    """Align this rank's particles, the first of which is ``start``, and add each to its class."""
    n = len(poses)
    counts = None
    if settings.assignment == "likeliest":
        counts, assign = _averaged(assign, len(references), particles.n_images, comm)
    aligner = Aligner(references, settings, number, counts)
    sums = settings.class_sums(len(references), particles)
    found = Alignments(np.empty(n, np.int32), np.empty(n, geometry.POSE), np.empty(n))
    passes = 2 if settings.assignment in LIMITED else 1
    with progress(passes * particles.n_images, number, settings.most_iterations,
                  comm.is_root and not settings.quiet) as bar:
        if settings.assignment in LIMITED:
            assign = _assign_together(aligner, particles, poses, start, settings, comm, bar)
        for block, images in _normalized(particles, start, start + n, bar):
            mine = slice(block.start - start, block.stop - start)
            aligned = aligner(images, poses[mine], assign[mine])
            sums.add(images, aligned.poses, aligned.assign, np.arange(block.start, block.stop),
                     particles.ctf_sq(block))
            found.assign[mine], found.poses[mine], found.peak[mine] = aligned.assign, aligned.poses, aligned.peak
    return found, sums


def mean_class_size(n_particles, n_references):
    """As an average of how many particles a reference counts of which that is not known."""
    return max(SMALLEST_CLASS, n_particles // n_references)


def _averaged(assign, n_references, n_particles, comm):
    """How many particles each reference is the average of, and which of these particles are in which.

    Where a reference is of particles unknown, given or put in place of a vanished class, it counts as one of mean size.

    Parameters
    ----------
    assign : (n,) int32
        Classes that this rank's particles had; -1 for none.

    Returns
    -------
    counts : (n_references,) int64
    assign : (n,) int32
        -1 for those in none.
    """
    counts = sum(comm.all_values(np.bincount(assign[assign >= 0], minlength=n_references)))
    known = counts >= SMALLEST_CLASS
    counts = np.where(known, counts, mean_class_size(n_particles, n_references))
    return counts, np.where((assign >= 0) & known[assign], assign, np.int32(-1))


def _references_and_shifts(classes):
    """What every rank needs of the classes: (n_references, n, n) float32, and by how much each was moved, px."""
    return (np.stack([c.image for c in classes]),
            np.array([np.zeros(2) if c.shift is None else c.shift for c in classes]))


def _assign_together(aligner, particles, poses, start, settings, comm, bar):
    """The class of each of this rank's particles, which depends on how all particles fit all references."""
    n = len(poses)
    peaks = np.empty((n, aligner.n_references), np.float32)
    for block, images in _normalized(particles, start, start + n, bar):
        mine = slice(block.start - start, block.stop - start)
        peaks[mine] = aligner.peaks(images, poses[mine])
    peaks = comm.gather(peaks)
    assign = assign_within_limits(peaks, settings.assignment) if comm.is_root else None
    comm.barrier()  # where the others wait without keeping a core busy
    return comm.from_root(assign)[start:start + n].copy()


def _normalized(particles, start, stop, bar):
    """Blocks of particles as ``Particles.stream`` has them, normalised; the ``bar`` moves as each is done with."""
    begun = bar.n
    for block, images in particles.stream(start, stop):
        signals.check()
        average.normalize_particles(images, particles.inside)
        yield block, images
        # the other ranks are as far
        bar.update(begun + (block.stop - start) * particles.n_images // (stop - start) - bar.n)
