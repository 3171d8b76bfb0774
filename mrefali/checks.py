"""Everything that is checked before a run creates or changes anything, the pixels of the whole stack included."""

import dataclasses
import logging
import math
import os
import shlex
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  loads scipy's BLAS, or threadpoolctl would not find it
from threadpoolctl import threadpool_limits

from mrefali import (
    average,
    classification,
    ctf,
    fourier,
    geometry,
    likelihood,
    memory,
    parallel,
    reference,
    sharpening,
)
from mrefali.assignment import ASSIGNMENTS, LIMITED
from mrefali.band import Band
from mrefali.classes import SMALLEST_CLASS, VANISHED
from mrefali.errors import InputError
from mrefali.fourier import EXTRA_GAIN, INTERPOLATIONS
from mrefali.io import check_parent, open_stack
from mrefali.particles import Particles, StackCtf
from mrefali.refine import AUTO_STOP_ITERATIONS, Settings
from mrefali.search import Search
from mrefali.warmup import compile_kernels

logger = logging.getLogger(__name__)

#: What ``write_back`` may be.
WRITE_BACK = ("journal", "copy")


@dataclass(frozen=True)
class Options:
    """What a caller asks for, by the names of the command line; see :func:`mrefali.run.mref_ali2d`."""

    mask: object
    ir: int
    ou: int
    rs: int
    xr: float | tuple
    yr: float | tuple
    ts: float | tuple
    center: int
    maxit: int
    function: object
    rand_seed: int
    vanished: str
    center_limit: float | None
    quiet: bool
    mirror: bool = True
    CTF: bool = False
    snr: float = 1.0
    max_memory: object = None
    subpixel: bool = False
    local: bool = False
    lowpass: float | None = None
    highpass: float | None = None
    interpolation: str = "quadratic"
    reference_free: bool = False
    K: int | None = None
    normalize_references: bool = False
    assignment: str = "best"
    settled: float | None = None


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check.

    Attributes
    ----------
    particles : Particles
    references : (n_references, n, n) float32 or None
        None where the particles are still to make one.
    poses : (n_particles,) geometry.POSE
        Those in the headers, or given.
    assign : (n_particles,) int64 or None
        The classes in the headers; None where an image has none.
    classes : (n_particles,) int or None
        The class that each particle is refined against, where nothing is searched; of seeds that whose reference it is
        part of, -1 for none.
    settings : Settings
    n_bytes : int
        Memory that this rank will take.
    start : (n_particles,) geometry.POSE
        Where the search starts.
    notes : sequence of str
        What is to be in the log of what was done before there was one.
    """

    particles: Particles
    references: np.ndarray
    poses: np.ndarray
    assign: np.ndarray | None
    classes: np.ndarray | None
    settings: Settings
    n_bytes: int
    start: np.ndarray
    notes: tuple | list = ()

    @property
    def stack(self):
        return self.particles.stack


def prepare(stack, references, options, comm, poses=None):
    """Check everything but the places that are written to; reads the whole stack once, shared among the ranks.

    Parameters
    ----------
    stack, references
        As :func:`mrefali.io.open_stack` gives them, or an ``ArrayStack``; ``references`` is None where the particles
        make the one there is.
    options : Options
    comm
        See :mod:`mrefali.parallel`.
    poses : (n_particles,) geometry.POSE, optional
        Where the search starts; those in the headers if not given.

    Returns
    -------
    Plan

    Raises
    ------
    InputError, FileNotFoundError, PermissionError
        On all ranks alike.
    """
    with comm.agreeing():
        options = _check_options(options)
        if options.reference_free:
            _check_enough(stack, options.K or 1)
        else:
            _check_same_images(stack, references)
            if options.assignment in LIMITED:
                _check_class_size(stack, references, options.assignment)
        if options.K is not None:
            options = _with_default_search(options, stack.box)
        ou = geometry.default_outer_radius(stack.box) if options.ou == -1 else options.ou
        search, *finer = (Search(stack.box, options.ir, ou, options.rs, *stage, options.mirror)
                          for stage in _stages(options.xr, options.yr, options.ts))
        function = reference.find_function(options.function)
        mask = _read_mask(options.mask, stack, search.outer_radius)
        if options.K is not None and not stack.all_have_poses():  # which are for the record only
            poses = geometry.identity_poses(stack.n_images)
        poses, assign = _read_poses(stack, poses), read_classes(stack)
        classes = _classes_to_refine(stack, references, poses, assign) if options.local else None
        of_stack = read_ctf(stack, options.snr) if options.CTF else None
        images = None if options.reference_free else references.read(0, references.n_images)
    compile_kernels(comm, options.assignment)
    with comm.agreeing():
        if images is not None:
            _check_pixels(average.pixel_statistics(images, mask != 0), references.path, 0)
        n_references = len(images) if images is not None else options.K or 1
        others = _bytes_beside_blocks(stack, options, n_references, comm.size)
        block_bytes = memory.block_bytes(options.max_memory, others, stack.box)
        blocks = memory.BLOCKS_HELD * min(block_bytes, 4 * stack.n_images * stack.box**2)
        if options.K is not None and comm.is_root:  # seeds are found before blocks are read
            blocks = max(blocks, _bytes_of_seeds(stack, search, options, others))
        particles = Particles(stack, mask != 0, of_stack, block_bytes)
    with comm.agreeing():
        largest = scan_pixels(particles, *comm.share(particles.n_images))
    contrast = None
    if options.assignment == "likeliest":
        contrast = comm.made_by_root(lambda: particles.contrast(search.outer_radius, mask))
    settings = _settings(options, (search, *finer), mask, function, max(comm.all_values(largest)), contrast)
    return Plan(particles, images, poses, assign, classes, settings, others + blocks, poses)


def _settings(options, searches, mask, function, largest, contrast):
    """``refine.Settings`` of checked options, one search a stage; ``largest`` is that of the particles as they are."""
    largest *= 1 if options.interpolation == "quadratic" else EXTRA_GAIN
    settings = Settings(searches[0], mask, options.center, options.maxit, function, options.rand_seed,
                        largest, options.snr, options.vanished, options.center_limit, options.quiet, searches[1:],
                        options.subpixel, options.local, move=INTERPOLATIONS[options.interpolation],
                        normalize_references=options.normalize_references, assignment=options.assignment,
                        contrast=contrast, settled=options.settled)
    band = Band(options.lowpass, options.highpass, settings.most_iterations)
    return dataclasses.replace(settings, band=band)


def _bytes_beside_blocks(stack, options, n_references, n_ranks):
    """Memory that a rank takes beside the blocks of pixels, and beside the search for seeds."""
    needed = memory.without_blocks(stack.n_images, n_references, stack.box) + options.CTF * ctf.KERNEL_BYTES
    if options.assignment in LIMITED:
        needed += memory.of_peaks(stack.n_images, n_references, n_ranks)
    elif options.assignment == "likeliest":
        needed += likelihood.bytes_needed(n_references, stack.box)
    needed += (options.subpixel or options.local) * sharpening.spline_bytes(n_references, stack.box)
    return needed + (options.interpolation == "fourier") * fourier.work_bytes(stack.box)


def _bytes_of_seeds(stack, search, options, others):
    """Memory in which the references are found, within ``max_memory`` beside the ``others``."""
    needed = classification.bytes_needed(stack.n_images, options.K, search)
    if options.max_memory is not None and others + needed > options.max_memory:
        helps = needed > classification.bytes_needed(stack.n_images, 1, search)
        raise InputError(f"max_memory={options.max_memory / 2**20:.0f}MB is not enough: finding references for "
                         f"K={options.K} takes {(others + needed) / 2**20 + 1:.0f} MB; give more"
                         + ", or a smaller K" * helps)
    return needed


def _check_options(options):
    """Those that need no file, with each number as what it stands for."""
    numbers = {name: whole_number(name, getattr(options, name))
               for name in ("ir", "ou", "rs", "center", "maxit", "rand_seed")}
    numbers["snr"] = real_number("snr", options.snr)
    numbers |= {name: _real_numbers(name, getattr(options, name)) for name in ("xr", "yr", "ts")}
    numbers |= {name: _frequency(name, getattr(options, name)) for name in ("lowpass", "highpass")}
    if options.max_memory is not None:
        numbers["max_memory"] = memory.parse_size("max_memory", options.max_memory)
    options = dataclasses.replace(options, **numbers)
    _check_choices(options.center, options.maxit, options.snr, options.vanished, options.center_limit)
    if options.K is not None and whole_number("K", options.K) < 1:
        raise InputError(f"K={options.K} is not allowed: give a number of classes of at least 1")
    if options.reference_free and options.rand_seed < 0:
        raise InputError(f"rand_seed={options.rand_seed} is not allowed: give a whole number of at least 0")
    if None not in (options.lowpass, options.highpass) and options.highpass >= options.lowpass:
        raise InputError(f"highpass={options.highpass:g} is not below lowpass={options.lowpass:g}, which leaves "
                         "nothing to align by: give a lower highpass, or a higher lowpass")
    if options.assignment not in ASSIGNMENTS:
        raise InputError(f"assignment={options.assignment} is not known: give {', '.join(ASSIGNMENTS)}")
    if options.interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation={options.interpolation} is not known: give {' or '.join(INTERPOLATIONS)}")
    return options


def _with_default_search(options, box):
    """Options of raw particles with ``xr``, ``yr`` and ``ou`` as the box suggests, where they are -1."""
    half = float(max(1, round(box / 20)))
    xr, yr = ((half,) if half_ranges == (-1.0,) else half_ranges for half_ranges in (options.xr, options.yr))
    ou = options.ou
    if ou == -1:
        ou = geometry.default_outer_radius(box) + 1 - math.ceil(max(xr + yr))
        if ou < box // 4:
            raise InputError(f"xr={max(xr + yr):g} leaves a disc of {ou} px in images of {box} px: give a smaller xr, "
                             "or say with ou how large the particles are")
    return dataclasses.replace(options, xr=xr, yr=yr, ou=ou)


def _real_numbers(name, value):
    """A number, or one for each stage, as a tuple of float."""
    if isinstance(value, (list, tuple)) and value:
        return tuple(real_number(name, number) for number in value)
    return (real_number(name, value),)


def _frequency(name, value):
    if value is not None and not 0 < real_number(name, value) <= 0.5:
        raise InputError(f"{name}={value} is not allowed: give a frequency in 1/px above 0 to 0.5")
    return value


def _stages(xr, yr, ts):
    """(xr, yr, ts) of each stage; a single number serves all stages."""
    n_stages = max(len(xr), len(yr), len(ts))
    for name, values in (("xr", xr), ("yr", yr), ("ts", ts)):
        if len(values) not in (1, n_stages):
            raise InputError(f"{name}={' '.join(f'{v:g}' for v in values)} has {len(values)} stages, but xr, yr and ts "
                             f"together {n_stages}: give {n_stages} numbers, or one for all stages")
    return zip(*(values * (n_stages // len(values)) for values in (xr, yr, ts)), strict=True)


def _classes_to_refine(stack, references, poses, assign):
    """The class of each particle: that in the headers, or class 0 where there is one reference, (n_images,) int64."""
    far = np.flatnonzero(np.abs(geometry.inverse_shift(poses)).max(axis=1) > stack.box / 2)
    if far.size:
        raise InputError(f"{stack.path}: image {far[0]} has a pose (sx {poses['sx'][far[0]]:g}, sy "
                         f"{poses['sy'][far[0]]:g}) that puts its centre outside the image: align it first, or set it "
                         "with mrefali header")
    if references.n_images == 1:
        return np.zeros(stack.n_images, np.int64)
    if assign is None:
        raise InputError(f"{stack.path}: an image has no header assign, its class among the {references.n_images} "
                         f"references of {references.path}: align the stack with mrefali mref_ali2d first, or give one "
                         "reference")
    wrong = np.flatnonzero((assign < 0) | (assign >= references.n_images))
    if wrong.size:
        raise InputError(f"{stack.path}: image {wrong[0]} has assign={assign[wrong[0]]}, but {references.path} holds "
                         f"{references.n_images} references, 0 to {references.n_images - 1}: give those that the stack "
                         "was aligned to")
    return assign


def _read_poses(stack, poses):
    """The ``poses`` given or else those in the headers, (n_images,) POSE, all of them numbers."""
    if poses is None:
        poses = stack.poses()
    elif np.shape(poses) != (stack.n_images,) or np.asarray(poses).dtype != geometry.POSE:
        raise InputError(f"poses has the shape {np.shape(poses)} and the type {np.asarray(poses).dtype}: give one "
                         f"geometry.POSE for each of the {stack.n_images} images")
    finite = np.isfinite([poses["alpha"], poses["sx"], poses["sy"]]).all(axis=0)
    if not finite.all():
        raise InputError(f"{stack.path}: image {np.flatnonzero(~finite)[0]} has a pose with NaN or infinity: set it, "
                         "in a file with mrefali header STACK --params=xform.align2d --zero or --import=FILE")
    return poses


def read_classes(stack):
    """The headers ``assign``, (n_images,) int64; None where an image has none."""
    classes, n_absent = np.empty(stack.n_images, np.int64), 0
    for i, value in enumerate(stack.values("assign")):
        if value is None:
            n_absent += 1
        elif _is_class(value):
            classes[i] = value
        else:
            raise InputError(f"{stack.path}: image {i} has assign={str(value)[:40]!r}, which is no class: set it with "
                             f"mrefali header {shlex.quote(stack.path)} --params=assign --zero")
    return None if n_absent else classes


def _is_class(value):
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and abs(value) < 2**31 and value == int(value)  # a NaN fails the first comparison


def _check_choices(center, maxit, snr, vanished, center_limit):
    if center not in reference.CENTERINGS:
        known = ", ".join(f"{value} ({meaning})" for value, meaning in reference.CENTERINGS.items())
        raise InputError(f"center={center} is not allowed: give {known}")
    if maxit < 0:
        raise InputError(f"maxit={maxit} is not allowed: give a number of iterations, or 0 for at most "
                         f"{AUTO_STOP_ITERATIONS} with auto-stop")
    if not snr > 0:
        raise InputError(f"snr={snr} is not allowed: give a signal-to-noise ratio above 0")
    if vanished not in VANISHED:
        raise InputError(f"vanished={vanished} is not allowed: give {', '.join(VANISHED)}")
    if center_limit is not None and not real_number("center_limit", center_limit) > 0:
        raise InputError(f"center_limit={center_limit} is not allowed: give a distance in px above 0")


def read_ctf(stack, snr):
    """The CTF of every image; a nonsense is refused with the image's number."""
    parameters, applied = stack.ctf()
    sizes = parameters["pixel_size_A"]
    other = np.flatnonzero(~np.isclose(sizes, sizes[0], rtol=1e-3))
    if other.size:
        raise InputError(f"{stack.path}: image {other[0]} has a CTF of pixel size {sizes[other[0]]:g} A, but image 0 "
                         f"of {sizes[0]:g} A: a stack has one pixel size")
    return StackCtf(parameters, applied, snr)


def whole_number(name, value):
    """``value`` as int; InputError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name}={value!r} is not allowed: give a whole number")
    return int(value)


def real_number(name, value):
    """``value`` as float; InputError if it is none, or not finite."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise InputError(f"{name}={value!r} is not allowed: give a finite number")
    return float(value)


def _check_enough(stack, n_classes):
    if stack.n_images < SMALLEST_CLASS * n_classes:
        classes = "an average" if n_classes == 1 else f"K={n_classes} classes"
        raise InputError(f"{stack.path}: {stack.n_images} particles are too few for {classes}: give at least "
                         f"{SMALLEST_CLASS * n_classes}")


def _check_class_size(stack, references, assignment):
    """Of raw particles :func:`_check_enough` says the same."""
    if stack.n_images < SMALLEST_CLASS * references.n_images:
        most = stack.n_images // SMALLEST_CLASS
        raise InputError(f"{stack.path}: {stack.n_images} particles are too few for assignment={assignment} to "
                         f"{references.n_images} classes of at least {SMALLEST_CLASS}: give "
                         f"{f'at most {most} references, or ' if most else ''}assignment=best")


def _check_same_images(stack, references):
    if references.n_images > stack.n_images:
        raise InputError(f"{references.path}: {references.n_images} references for the {stack.n_images} particles of "
                         f"{stack.path}: give the particles first and at most as many references")
    if references.box != stack.box:
        raise InputError(f"{references.path}: references of {references.box} x {references.box} px, but the particles "
                         f"of {stack.path} have {stack.box} x {stack.box}: give references of the same box")
    sizes = [s.pixel_size_A for s in (stack, references)]
    # EMAN2 writes 1.0 where it does not know
    if all(size not in (None, 1.0) for size in sizes) and not math.isclose(*sizes, rel_tol=1e-3):
        raise InputError(f"{references.path}: pixel size {sizes[1]:g} A, but the particles of {stack.path} have "
                         f"{sizes[0]:g} A: scale the references, or correct apix_x, apix_y in one of the files")


def _read_mask(mask, stack, outer_radius):
    if mask is None:
        return geometry.disc(stack.box, outer_radius).astype(np.float32)
    if isinstance(mask, (str, os.PathLike)):
        name, file = mask, open_stack(mask)
        if file.n_images != 1:
            raise InputError(f"{name}: {file.n_images} images: a mask is one")
        mask = file.read(0, 1)[0]
    else:
        name, mask = "mask", np.array(mask, np.float32)
    if mask.shape != (stack.box, stack.box):
        raise InputError(f"{name}: a mask of {' x '.join(map(str, mask.shape))} px, but the particles have "
                         f"{stack.box} x {stack.box}: give a mask of the same box")
    if not np.isfinite(mask).all():
        raise InputError(f"{name}: the mask has a NaN or infinite pixel: give numbers from 0 to 1")
    if not (mask > 0.5).any():
        raise InputError(f"{name}: no pixel of the mask is above 0.5 (largest {mask.max():g}): give a mask that is 1 "
                         "where the particle is")
    return mask


def scan_pixels(particles, start, stop):
    """Look through the particles of a rank; the largest absolute pixel after normalisation."""
    largest = 0.0
    for block, images in particles.stream(start, stop):
        statistics = average.pixel_statistics(images, particles.inside)
        _check_pixels(statistics, particles.stack.path, block.start)
        largest = max(largest, statistics.largest)
    return largest


def _check_pixels(statistics, path, first_index):
    bad = np.flatnonzero(np.isnan(statistics.lowest))
    if bad.size:
        raise InputError(f"{path}: image {first_index + bad[0]} has a NaN or infinite pixel: remove or repair it")
    scale = np.maximum(np.abs(statistics.lowest), np.abs(statistics.highest))
    constant = np.flatnonzero(statistics.deviation <= 1e-7 * scale)  # what float32 cannot tell from constant
    if constant.size:
        raise InputError(f"{path}: image {first_index + constant[0]} is constant under the mask: remove it")


def check_places(stack, outdir, comm, resume=False, write_back="journal"):
    """Have all ranks refuse an OUTDIR that cannot be made, or gone on in, or a stack whose headers cannot be written.

    ``resume`` is None where nothing can be gone on with. The root looks and the others wait: none of them holds the
    lock that the check tries for, and the root cannot make OUTDIR before they have seen that there was none.
    """
    with comm.agreeing():
        if comm.is_root:
            if resume:
                check_old_directory(outdir)
            else:
                check_new_directory(outdir, resumable=resume is not None)
            if stack.write_back_obstacle() is None:
                stack.check_writable(write_back)


def check_saving(save_every, write_back):
    """Raise InputError unless these options say how often, and how, headers are written."""
    if whole_number("save_every", save_every) < 0:
        raise InputError(f"save_every={save_every} is not allowed: give a number of iterations, or 0 for the end only")
    if write_back not in WRITE_BACK:
        raise InputError(f"write_back={write_back} is not allowed: give {' or '.join(WRITE_BACK)}")


def check_old_directory(path):
    """Raise FileNotFoundError or PermissionError if a run cannot go on in the directory ``path``."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is no directory, so there is nothing to resume: leave --resume out")
    if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"{path}: no permission to write into it: resume as who began the run")


def check_new_directory(path, resumable=False):
    """Raise FileExistsError, FileNotFoundError or PermissionError if the directory ``path`` cannot be made."""
    if os.path.lexists(path):
        way_out = "give a new name, remove it, or go on with the run in it by --resume"
        raise FileExistsError(f"{path}: the output directory exists already: "
                              f"{way_out if resumable else 'give a new name, or remove it'}")
    check_parent(path)


@contextmanager
def use_threads(threads, comm=parallel.SERIAL):
    """Let numba use so many threads for a while, and BLAS none beside them.

    Parameters
    ----------
    threads : int
        0: all cores this process may use, shared fairly with the ranks that may use the same.
    comm
        See :mod:`mrefali.parallel`.
    """
    cores, sharers = comm.cores()
    with comm.agreeing():
        threads = _check_threads(threads, cores)
    threads = threads or max(1, min(numba.config.NUMBA_NUM_THREADS, cores // sharers))
    if comm.is_root and sharers * threads > cores:
        logger.warning("%d ranks of %d threads share %d cores, which takes longer than %d threads in all: give fewer "
                       "ranks, or --threads=%d", sharers, threads, cores, cores, max(1, cores // sharers))
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        numba.set_num_threads(before)


def _check_threads(threads, cores):
    threads, allowed = whole_number("threads", threads), min(numba.config.NUMBA_NUM_THREADS, cores)
    if not 0 <= threads <= allowed:
        raise InputError(f"threads={threads} is not allowed: give 1 to {allowed} (the cores this process may use), "
                         "or 0 for all of them")
    return threads
