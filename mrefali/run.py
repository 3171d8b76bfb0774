"""The main job on files: check everything, run the refinement, write what it finds; and the same on arrays.

Nothing is created before every check has passed, the pixels of the whole stack included.
"""

import datetime
import importlib.metadata
import logging
import math
import os
import platform
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import numpy as np

import mrefali
from mrefali import average, geometry, parallel, reference
from mrefali.errors import InputError
from mrefali.io import ArrayStack, open_stack
from mrefali.outdir import OutputDirectory
from mrefali.refine import AUTO_STOP_ITERATIONS, BLOCK_BYTES, Iteration, Settings, blocks, refine
from mrefali.search import Search, ring_spectra
from mrefali.search import align as search_particles

logger = logging.getLogger(__name__)

#: Particles searched to estimate the time of a run.
TIMED_PARTICLES = 32


def mref_ali2d(stack, refim, outdir, maskfile=None, ir=1, ou=-1, rs=1, xrng=0, yrng=0, step=1, center=1, maxit=0,
               CTF=False, snr=1.0, user_func_name="ref_ali2d", rand_seed=1000, MPI=False, *,
               threads=0, quiet=False, check=False):
    """Align a stack to several references and average each class, as SPARX's ``mref_ali2d`` does.

    Parameters
    ----------
    stack : str
        Square 2-D images with ``xform.align2d`` in their headers. At the end their ``xform.align2d`` and ``assign``
        are set; their pixels never change.
    refim : str
        Initial references of the same box.
    outdir : str
        Made here; must not exist.
    maskfile : str or (n, n) array, optional
        For normalisation and criterion; without it a disc of radius ``ou``.
    ir, ou, rs : int, px
        First ring, last ring (-1: n//2 - 2) and ring step.
    xrng, yrng, step : float, px
        Half-ranges and step of the translation search.
    center : int
        0 none, 1 phase centre of gravity, -1 mean shift of the class.
    maxit : int
        Iterations; 0 means at most ten, ended when the criterion falls.
    CTF : bool
        Weight by the CTF in the headers.
    snr : float
        Signal-to-noise ratio of the Wiener term.
    user_func_name : str
        Reference function, see :mod:`mrefali.reference`.
    rand_seed : int
        Seed of the draws that replace vanished classes.
    MPI : bool
        Share the particles among MPI ranks.
    threads : int
        Threads of this process; 0: all cores it may use.
    quiet : bool
        Report warnings only.
    check : bool
        Check everything, report search range and estimates of time and memory, and stop.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed.
    """
    options = dict(locals())
    comm = parallel.communicator(MPI)
    with _threads(threads):
        particles = open_stack(stack)
        job = _prepare(particles, open_stack(refim), maskfile, ir, ou, rs, xrng, yrng, step, center, maxit, CTF, snr,
                       user_func_name, rand_seed, quiet, comm)
        _check_places_once(particles, outdir, comm)
        if check:
            if comm.is_root:
                _report_range(job)
                _report_estimates(job, comm)
            return
        if comm.is_root:
            with OutputDirectory(outdir, particles.pixel_size_A) as output:
                _run_and_write(job, output, options, comm)
        else:
            for _ in refine(job.stack, job.references, job.poses, job.settings, comm):
                pass


@dataclass(frozen=True)
class Aligned:
    """What :func:`align` found.

    Attributes
    ----------
    assign : (n_particles,) int32
    poses : (n_particles,) geometry.POSE
    peak : (n_particles,) float64
    averages : (n_references, n, n) float32
    iterations : list of mrefali.refine.Iteration
    """

    iterations: list[Iteration]

    @property
    def assign(self):
        return self.iterations[-1].assign

    @property
    def poses(self):
        return self.iterations[-1].poses

    @property
    def peak(self):
        return self.iterations[-1].peak

    @property
    def averages(self):
        return self.iterations[-1].averages


def align(images, references, poses=None, mask=None, *, ir=1, ou=-1, rs=1, xr=0.0, yr=0.0, ts=1.0, center=1, maxit=10,
          function="ref_ali2d", rand_seed=1000, threads=0, quiet=False):
    """Multi-reference alignment of arrays; no file is read or written.

    Parameters
    ----------
    images : (n_particles, n, n) array_like
    references : (n_references, n, n) array_like
    poses : (n_particles,) geometry.POSE, optional
        Where the search starts; identity if not given.
    mask : (n, n) array_like, optional
        A disc of radius ``ou`` if not given.
    ir, ou, rs, xr, yr, ts, center, maxit, function, rand_seed, threads, quiet
        As for :func:`mref_ali2d`.

    Returns
    -------
    Aligned
    """
    with _threads(threads):
        job = _prepare(ArrayStack(images, "images"), ArrayStack(references, "references"), mask, ir, ou, rs, xr, yr, ts,
                       center, maxit, False, 1.0, function, rand_seed, quiet, parallel.SERIAL, poses)
        return Aligned(list(refine(job.stack, job.references, job.poses, job.settings, parallel.SERIAL)))


# --- what is checked


@dataclass(frozen=True)
class _Job:
    """A run that has passed every check."""

    stack: object
    references: np.ndarray
    poses: np.ndarray
    settings: Settings


def _prepare(stack, references, mask, ir, ou, rs, xr, yr, ts, center, maxit, CTF, snr, function, rand_seed, quiet, comm,
             poses=None):
    ir, ou, rs, center, maxit, rand_seed = (whole_number(name, value) for name, value in (
        ("ir", ir), ("ou", ou), ("rs", rs), ("center", center), ("maxit", maxit), ("rand_seed", rand_seed)))
    xr, yr, ts, snr = (real_number(name, value) for name, value in (
        ("xr", xr), ("yr", yr), ("ts", ts), ("snr", snr)))
    if center not in (-1, 0, 1):
        raise InputError(f"center={center} is not allowed: give 0 (none), 1 (phase centre of gravity) or "
                         "-1 (mean shift)")
    if maxit < 0:
        raise InputError(f"maxit={maxit} is not allowed: give a number of iterations, or 0 for at most "
                         f"{AUTO_STOP_ITERATIONS} with auto-stop")
    if not snr > 0:
        raise InputError(f"snr={snr} is not allowed: give a signal-to-noise ratio above 0")
    if CTF:
        raise InputError("CTF=True is not available in this version: leave --CTF out")
    _check_same_images(stack, references)
    search = Search(stack.box, ir, geometry.default_outer_radius(stack.box) if ou == -1 else ou, rs, xr, yr, ts)
    function = reference.find_function(function)
    mask = _read_mask(mask, stack, search.outer_radius)
    if poses is None:
        poses = stack.poses() if hasattr(stack, "poses") else geometry.identity_poses(stack.n_images)
    elif np.shape(poses) != (stack.n_images,):
        raise InputError(f"poses has the shape {np.shape(poses)}: give one for each of the {stack.n_images} images")
    images = references.read(0, references.n_images)
    _check_pixels(average.pixel_statistics(images, mask != 0), references.path, 0)
    settings = Settings(search, mask, center, maxit, function, rand_seed, _scan_pixels(stack, mask != 0, comm), quiet)
    return _Job(stack, images, poses, settings)


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


def _check_same_images(stack, references):
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


def _scan_pixels(stack, inside, comm):
    """Read the whole stack once; the largest absolute pixel after normalisation, over all ranks."""
    start, stop = comm.share(stack.n_images)
    largest, problem = 0.0, None
    for first, last in blocks(stop - start, stack.box):
        statistics = average.pixel_statistics(stack.read(start + first, start + last), inside)
        try:
            _check_pixels(statistics, stack.path, start + first)
        except InputError as error:
            problem = error
            break
        largest = max(largest, statistics.largest)
    everyone = comm.all_values((largest, problem))
    for _, problem in everyone:  # all ranks refuse together, for the first bad image of the stack
        if problem is not None:
            raise problem
    return max(largest for largest, _ in everyone)


def _check_pixels(statistics, path, first_index):
    bad = np.flatnonzero(np.isnan(statistics.lowest))
    if bad.size:
        raise InputError(f"{path}: image {first_index + bad[0]} has a NaN or infinite pixel: remove or repair it")
    scale = np.maximum(np.abs(statistics.lowest), np.abs(statistics.highest))
    constant = np.flatnonzero(statistics.deviation <= 1e-7 * scale)  # what float32 cannot tell from constant
    if constant.size:
        raise InputError(f"{path}: image {first_index + constant[0]} is constant under the mask: remove it")


def _check_places_once(stack, outdir, comm):
    """Check at the root, and have all ranks refuse together.

    The other ranks wait: they have read all they need for now, so none of them holds the lock that the check tries
    for, and the root cannot make OUTDIR before they have seen that there was none.
    """
    problem = None
    if comm.is_root:
        try:
            _check_places(stack, outdir)
        except (InputError, OSError) as error:
            problem = error
    problem = comm.from_root(problem)
    if problem is not None:
        raise problem


def _check_places(stack, outdir):
    if os.path.lexists(outdir):
        raise FileExistsError(f"{outdir}: the output directory exists already: give a new name, or remove it")
    parent = os.path.dirname(os.path.abspath(outdir))
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"{outdir}: its parent directory {parent} does not exist: make it first")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"{outdir}: no permission to write into {parent}: give a place you may write to")
    stack.check_writable()


@contextmanager
def _threads(threads):
    """Let numba use so many threads for a while."""
    threads = whole_number("threads", threads)
    allowed = min(numba.config.NUMBA_NUM_THREADS, len(os.sched_getaffinity(0)))
    if not 0 <= threads <= allowed:
        raise InputError(f"threads={threads} is not allowed: give 1 to {allowed} (the cores this process may use), "
                         "or 0 for all of them")
    before = numba.get_num_threads()
    numba.set_num_threads(threads or allowed)
    try:
        yield
    finally:
        numba.set_num_threads(before)


# --- what is reported and written


def _run_and_write(job, output, options, comm):
    parameters = _describe(job, options, comm)
    output.write_parameters(parameters)
    for name, value in parameters.items():
        logger.debug("%s: %s", name, value)
    _report_range(job)
    output.write_start(_present_classes(job.stack), job.poses)
    iterations = job.settings.maxit or AUTO_STOP_ITERATIONS
    for iteration in refine(job.stack, job.references, job.poses, job.settings, comm):
        output.write_iteration(iteration)
        _report_iteration(iteration, iterations)
    output.write_end(iteration)
    job.stack.write_columns({"xform.align2d": geometry.to_matrices(iteration.poses), "assign": iteration.assign})
    logger.info("done: averages and FRC curves in %s, xform.align2d and assign in the headers of %s",
                output.path, job.stack.path)


def _present_classes(stack):
    """The ``assign`` headers, or None where an image has none."""
    assign = stack.column("assign")
    return None if any(value is None for value in assign) else np.array(assign)


def _describe(job, options, comm):
    """Every option, what it came to, and every version."""
    search = job.settings.search
    versions = {name: importlib.metadata.version(name) for name in ("numba", "numpy", "scipy", "h5py")}
    return {
        **{name: value if isinstance(value, (str, int, float, bool, type(None))) else "array"
           for name, value in options.items()},
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "n_particles": job.stack.n_images, "n_references": len(job.references), "box": search.box,
        "pixel_size_A": job.stack.pixel_size_A, "inner_radius": search.inner_radius,
        "outer_radius": search.outer_radius, "ring_step": search.ring_step,
        "ranks": comm.size, "threads_used": numba.get_num_threads(),
        "mrefali": mrefali.__version__, "python": platform.python_version(), **versions,
    }


def _report_range(job):
    """Log the translations that are really tried, and warn where ``ou`` cuts what was asked for (NEEDS 15)."""
    search = job.settings.search
    lines = []
    for axis, half in (("x", search.xr), ("y", search.yr)):
        left, right = geometry.search_range(half, 0.0, search.box, search.outer_radius)
        low, high = -math.floor(left / search.shift_step), math.floor(right / search.shift_step)
        lines.append(f"{axis} {low * search.shift_step:g} to {high * search.shift_step:g} px")
        if min(left, right) < half:
            short = half - min(left, right)
            logger.warning("%sr=%g is cut to %g for a centred particle, since the disc of radius ou=%d must stay "
                           "inside the %d-pixel image: ou=%d would leave it whole", axis, half, half - short,
                           search.outer_radius, search.box, search.outer_radius - math.ceil(short))
    logger.info("%d particles of %d x %d px, %d references, rings %d to %d px in steps of %d; search for a centred "
                "particle: %s, in steps of %g px", job.stack.n_images, search.box, search.box, len(job.references),
                search.inner_radius, search.outer_radius, search.ring_step, ", ".join(lines), search.shift_step)


def _report_estimates(job, comm):
    """Time a few particles, and add up the arrays."""
    search, n_particles = job.settings.search, job.stack.n_images
    sample = job.stack.read(0, min(TIMED_PARTICLES, n_particles))
    spectra = ring_spectra(average.normalize_references(job.references, job.settings.inside), search)
    search_particles(sample, job.poses[:len(sample)], spectra, search)  # compiles
    began = time.perf_counter()
    search_particles(sample, job.poses[:len(sample)], spectra, search)
    seconds = (time.perf_counter() - began) / len(sample) * n_particles / comm.size
    pixels = 4 * search.box**2
    megabytes = (3 * min(BLOCK_BYTES, pixels * n_particles) + 6 * len(job.references) * 2 * pixels
                 + 200 * n_particles) / 2**20 + 250  # 250 MB: Python, numba and the compiled search
    iterations = job.settings.maxit or AUTO_STOP_ITERATIONS
    logger.info("estimate: about %s an iteration, %s for %d, on %d threads of %d ranks; about %d MB of memory a rank",
                _duration(seconds), _duration(seconds * iterations), iterations, numba.get_num_threads(), comm.size,
                megabytes)


def _duration(seconds):
    return f"{seconds:.2g} s" if seconds < 99.5 else str(datetime.timedelta(seconds=round(seconds)))


def _report_iteration(iteration, iterations):
    counts = np.array([c.count for c in iteration.classes])
    for k, c in enumerate(iteration.classes):
        if c.vanished:
            logger.debug("class %d: vanished with %d particles; particle %d replaces it", k, c.count, c.members[0])
        else:
            fitted = f"; filter cutoff {c.filter.cutoff:.3f}, fall-off {c.filter.falloff:.3f}" if c.filter else ""
            logger.debug("class %d: %d particles%s; centre x %.3f, y %.3f", k, c.count, fitted, *-c.shift)
    vanished = sum(c.vanished for c in iteration.classes)
    logger.info("iteration %d/%d: criterion %.7g; classes %d/%d/%d (smallest/median/largest)%s; %.1f%% changed class; "
                "%.2f s, %.0f particles/s", iteration.number + 1, iterations, iteration.criterion, counts.min(),
                np.median(counts), counts.max(), f", {vanished} vanished" if vanished else "",
                100 * iteration.changed.mean(), iteration.seconds, len(iteration.assign) / iteration.seconds)
