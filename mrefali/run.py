"""The main job on files: check everything, run the refinement, write what it finds; and the same on arrays."""

import datetime
import importlib.metadata
import logging
import math
import platform
import time
from dataclasses import dataclass

import numba
import numpy as np

import mrefali
from mrefali import average, geometry, parallel
from mrefali.checks import check_places_once, prepare, use_threads
from mrefali.io import ArrayStack, open_stack
from mrefali.outdir import OutputDirectory
from mrefali.particles import BLOCK_BYTES
from mrefali.refine import AUTO_STOP_ITERATIONS, Iteration, refine
from mrefali.search import align as search_particles
from mrefali.search import ring_spectra

logger = logging.getLogger(__name__)
details = logging.getLogger("mrefali.details")  # for the log of the run alone

#: Particles searched to estimate the time of a run.
TIMED_PARTICLES = 32


def mref_ali2d(stack, refim, outdir, maskfile=None, ir=1, ou=-1, rs=1, xrng=0, yrng=0, step=1, center=1, maxit=0,
               CTF=False, snr=1.0, user_func_name="ref_ali2d", rand_seed=1000, MPI=False, *,
               vanished="random", center_limit=None, threads=0, quiet=False, check=False):
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
        0 none, 1 phase centre of gravity, -1 mean shift of the class, 2 correlation with the mask, 3 correlation with
        the average's own rotational average.
    maxit : int
        Iterations; 0 means at most ten, ended when the criterion falls.
    CTF : bool
        Weight by the CTF in the headers ``ctf``; particles whose ``ctf_applied`` is 1 are multiplied by it already.
    snr : float
        Signal-to-noise ratio of the Wiener term.
    user_func_name : str
        Reference function, see :func:`mrefali.reference.find_function`.
    rand_seed : int
        Seed of the draws that replace vanished classes.
    MPI : bool
        Share the particles among MPI ranks.
    vanished : str
        What replaces the reference of a class with fewer than four particles: ``random`` a particle drawn at random,
        ``split`` the worse half of the largest class, ``keep`` the reference it had.
    center_limit : float, optional, px
        An average whose centre lies farther out is left where it is.
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
    with use_threads(threads):
        particles = open_stack(stack)
        job = prepare(particles, open_stack(refim), maskfile, ir, ou, rs, xrng, yrng, step, center, maxit, CTF, snr,
                       user_func_name, rand_seed, vanished, center_limit, quiet, comm)
        check_places_once(particles, outdir, comm)
        if check:
            if comm.is_root:
                _report_range(job)
                _report_estimates(job, comm)
            return
        if comm.is_root:
            with OutputDirectory(outdir, particles.pixel_size_A) as output:
                _run_and_write(job, output, options, comm)
        else:
            for _ in refine(job.particles, job.references, job.poses, job.settings, comm):
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
          function="ref_ali2d", rand_seed=1000, vanished="random", center_limit=None, threads=0, quiet=False):
    """Multi-reference alignment of arrays; no file is read or written.

    Parameters
    ----------
    images : (n_particles, n, n) array_like
    references : (n_references, n, n) array_like
    poses : (n_particles,) geometry.POSE, optional
        Where the search starts; identity if not given.
    mask : (n, n) array_like, optional
        A disc of radius ``ou`` if not given.
    ir, ou, rs, xr, yr, ts, center, maxit, function, rand_seed, vanished, center_limit, threads, quiet
        As for :func:`mref_ali2d`.

    Returns
    -------
    Aligned
    """
    with use_threads(threads):
        job = prepare(ArrayStack(images, "images"), ArrayStack(references, "references"), mask, ir, ou, rs, xr, yr, ts,
                       center, maxit, False, 1.0, function, rand_seed, vanished, center_limit, quiet, parallel.SERIAL,
                       poses)
        return Aligned(list(refine(job.particles, job.references, job.poses, job.settings, parallel.SERIAL)))


# --- what is reported and written


def _run_and_write(job, output, options, comm):
    parameters = _describe(job, options, comm)
    output.write_parameters(parameters)
    for name, value in parameters.items():
        details.debug("%s: %s", name, value)
    _report_range(job)
    obstacle = job.stack.write_back_obstacle()
    if obstacle is not None:
        logger.warning("the headers of %s cannot be written back: %s; poses and classes will go into %s",
                       job.stack.path, obstacle, output.path)
    output.write_start(_present_classes(job.stack), job.poses)
    iterations = job.settings.maxit or AUTO_STOP_ITERATIONS
    for iteration in refine(job.particles, job.references, job.poses, job.settings, comm):
        output.write_iteration(iteration)
        _report_iteration(iteration, iterations, job.settings)
    output.write_end(iteration)
    matrices = geometry.to_matrices(iteration.poses)
    if obstacle is None:
        job.stack.write_columns({"xform.align2d": matrices, "assign": iteration.assign})
        written = f"the headers of {job.stack.path}"
    else:
        written = output.write_poses_stack(job.stack, matrices, iteration.assign)
    logger.info("done: averages and FRC curves in %s, xform.align2d and assign in %s", output.path, written)


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
    sample = job.particles.read(slice(0, min(TIMED_PARTICLES, n_particles)))
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


def _report_iteration(iteration, iterations, settings):
    counts = np.array([c.count for c in iteration.classes])
    for k, c in enumerate(iteration.classes):
        if c.vanished:
            details.debug("class %d: vanished with %d particles%s", k, c.count,
                         f"; particle {c.members[0]} replaces it" if settings.vanished == "random" else "")
        else:
            fitted = f"; filter cutoff {c.filter.cutoff:.3f}, fall-off {c.filter.falloff:.3f}" if c.filter else ""
            details.debug("class %d: %d particles%s; centre x %.3f, y %.3f", k, c.count, fitted, *-c.shift)
    far = {k: float(np.hypot(*c.shift)) for k, c in enumerate(iteration.classes)
           if c.shift is not None and np.hypot(*c.shift) > settings.search.outer_radius / 4}
    if far:
        logger.warning("iteration %d: the centres of classes %s lie beyond a quarter of the radius (farthest %.1f px), "
                       "which a centring that fails looks like; center_limit leaves such an average where it is",
                       iteration.number + 1, ", ".join(map(str, far)), max(far.values()))
    vanished = sum(c.vanished for c in iteration.classes)
    logger.info("iteration %d/%d: criterion %.7g; classes %d/%d/%d (smallest/median/largest)%s; %.1f%% changed class; "
                "%.2f s, %.0f particles/s", iteration.number + 1, iterations, iteration.criterion, counts.min(),
                np.median(counts), counts.max(), f", {vanished} vanished" if vanished else "",
                100 * iteration.changed.mean(), iteration.seconds, len(iteration.assign) / iteration.seconds)
