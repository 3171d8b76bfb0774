"""K-means of aligned particles (the commands ``k_means`` and ``k_means_groups``), by scikit-learn.

Files in, files out; uses what :mod:`mrefali.run` does with a call and its files, and knows nothing of the search.
scikit-learn is imported where it works.
"""

import importlib.util
import logging
import os
import shlex
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from mrefali import average, geometry, memory, parallel, signals
from mrefali.checks import (
    Options,
    check_new_directory,
    check_places,
    check_saving,
    prepare,
    use_threads,
    whole_number,
)
from mrefali.classes import update_classes
from mrefali.errors import InputError
from mrefali.io import hold, replacing
from mrefali.outdir import OutputDirectory
from mrefali.page import Reporter
from mrefali.refine import Iteration
from mrefali.results import missing_for_pictures
from mrefali.run import describe, files_may_fail, open_on_all_ranks, stopping_with, versions
from mrefali.search import Alignments

logger = logging.getLogger(__name__)
details = logging.getLogger("mrefali.details")  # for the log of the run alone

#: Rows of pixels that are worked on together.
ROWS_AT_ONCE = 1024

#: How often the pixels are in memory at most: K-means takes their variance, the criteria squares of a whole class.
COPIES, COPIES_OF_CRITERIA = 2, 4

#: The criteria of :func:`k_means_groups`: by which name, and whether the largest or the smallest is best.
CRITERIA = {"coleman": ("Coleman", max), "calinski_harabasz": ("Calinski-Harabasz", max),
            "davies_bouldin": ("Davies-Bouldin", min)}

#: Where nothing is left of a call that was ended.
NOTHING = "nothing was created or changed"


@dataclass(frozen=True)
class Clusters:
    """What K-means found, the largest class first.

    Attributes
    ----------
    assign : (n_particles,) int32
    centers : (n_classes, n_pixels) float32
        Means of the classes.
    within : float
        Sum of the squared distances of the particles from the mean of their class.
    n_iterations : int
        Of the best trial.
    """

    assign: np.ndarray
    centers: np.ndarray
    within: float
    n_iterations: int


def k_means(stack, outdir, maskfile=None, *, K, ou=-1, maxit=100, trials=10, rand_seed=1000, CTF=False, snr=1.0,
            MPI=False, threads=0, max_memory=None, quiet=False, write_back="journal"):
    """Classify aligned particles by K-means of their pixels.

    The particles are normalised, moved by their poses, and compared by their pixels under the mask. OUTDIR gets what a
    run of one iteration writes; classes count from the largest, 0. K-means is :class:`sklearn.cluster.KMeans` on one
    thread, which finds the same whatever ``threads`` and the number of ranks.

    Parameters
    ----------
    stack : str
        Square 2-D images, in HDF and bdb with ``xform.align2d`` in their headers. At the end their ``assign`` is set;
        poses and pixels stay. Files of other formats stay as they are, and ``outdir`` gets ``particles.star`` and
        ``class_averages.mrcs``.
    outdir : str
        Made here; must not exist. Where the call is ended before all is found, it is removed again.
    maskfile : str or (n, n) array, optional
        Pixels above 0.5 are compared; without it those of a disc of radius ``ou``.
    K : int
        Classes, 2 to the number of particles.
    ou : int, px
        -1: n//2 - 2.
    maxit : int
        Iterations of a trial at most.
    trials : int
        Times K-means is begun, each from other particles; the one with the least variance within the classes counts.
    rand_seed : int
        Seed of the draws, 0 to 2**32 - 1.
    CTF : bool
        Multiply the particles by the CTF in their headers before they are compared, and weight the averages by it.
    snr : float
        Signal-to-noise ratio of the Wiener term.
    MPI : bool
        Share the checks among MPI ranks; the root alone classifies.
    threads : int
        Threads that move particles; 0: all cores this process may use.
    max_memory : str or int, optional
        Memory that the root may take, such as ``4GB``, or bytes; without it as much as the machine has. The pixels
        under the mask of all particles are held at once.
    quiet : bool
        Report warnings only.
    write_back : str
        ``journal`` or ``copy``, see :meth:`mrefali.io.HdfStack.write_columns`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created or changed; under MPI on all ranks alike.
    RunFailed
        Where a file cannot be read or written any more.
    Stopped
        On a signal, at the command line.
    """
    call = dict(locals())
    with _job(call, {"K": K}, write_back) as (plan, comm):
        with comm.agreeing():
            _check_classes("K", K, plan.stack, plan.stack.n_images)
            _check_memory(plan, max_memory, COPIES)
        if comm.is_root:
            _classify(plan, call, comm)


def k_means_groups(stack, outdir, maskfile=None, *, K1=2, K2=10, ou=-1, maxit=100, trials=10, rand_seed=1000,
                   CTF=False, MPI=False, threads=0, max_memory=None, quiet=False):
    """K-means for every number of classes of a range, and which of them three published criteria prefer.

    OUTDIR gets ``groups.csv``, a log and, where the extra ``[viz]`` is installed, ``groups.png``. The criteria, with
    the traces W of the scatter within and B between K classes of n particles: Calinski-Harabasz, the largest
    (B / (K - 1)) / (W / (n - K)) [1]; Davies-Bouldin, the smallest mean, over the classes, of the largest ratio of the
    scatter of two classes to their distance [2]; Coleman, the largest B W. All three are of the pixels, noise included.

    Parameters
    ----------
    stack : str
        As for :func:`k_means`; its headers stay as they are.
    K1, K2 : int
        Fewest and most classes, 2 to one less than the number of particles.
    outdir, maskfile, ou, maxit, trials, rand_seed, CTF, MPI, threads, max_memory, quiet
        As for :func:`k_means`.

    Returns
    -------
    list of dict or None
        The rows of ``groups.csv``: K, coleman, calinski_harabasz, davies_bouldin, between, within, and particles of the
        smallest and the largest class. None on ranks other than the root.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
        Before anything is created; under MPI on all ranks alike.
    RunFailed
        Where a file cannot be read or written any more.
    Stopped
        On a signal, at the command line.

    References
    ----------
    .. [1] T. Calinski and J. Harabasz, Communications in Statistics 3 (1974) 1-27.
    .. [2] D. L. Davies and D. W. Bouldin, IEEE Trans. Pattern Anal. Mach. Intell. 1 (1979) 224-227.
    """
    call = dict(locals())
    with _job(call, {"K1": K1, "K2": K2}, None) as (plan, comm):
        with comm.agreeing():
            for name, value in (("K1", K1), ("K2", K2)):
                _check_classes(name, value, plan.stack, plan.stack.n_images - 1)
            if K1 > K2:
                raise InputError(f"K1={K1} is above K2={K2}: give the fewest classes as K1, the most as K2")
            _check_memory(plan, max_memory, COPIES_OF_CRITERIA)
        return _compare_groups(plan, call) if comm.is_root else None


# --- before the work


def require_scikit_learn(what):
    """Raise InputError unless scikit-learn is installed; ``what`` needs it."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError(f"{what} needs scikit-learn: pip install 'mrefali[classify]'")
    import sklearn.cluster
    import sklearn.metrics  # noqa: F401  what libraries take counts as there when memory is estimated


@contextmanager
def _job(call, classes, write_back):
    """The plan of a call and its communicator, all checked but for the number of ``classes``.

    With ``write_back`` the headers of the stack must be writable, and the root holds it.
    """
    stack, outdir = call["stack"], call["outdir"]
    comm = parallel.communicator(call["MPI"])
    with (comm.ending_together(), stopping_with(lambda: NOTHING), use_threads(call["threads"], comm),
          ExitStack() as held):
        with comm.agreeing():
            require_scikit_learn("k_means" if write_back else "k_means_groups")
            _check_numbers(call, classes)
            if write_back:
                check_saving(0, write_back)
                if comm.is_root:
                    held.enter_context(hold(stack))
        particles = open_on_all_ranks(stack, comm)
        if write_back:
            check_places(particles, outdir, comm, None, write_back)
        else:
            with comm.agreeing():
                if comm.is_root:
                    check_new_directory(outdir)
        plan = prepare(particles, None, Options(
            mask=call["maskfile"], ir=1, ou=call["ou"], rs=1, xr=0.0, yr=0.0, ts=1.0, center=0, maxit=1,
            CTF=call["CTF"], snr=call.get("snr", 1.0), function="ref_unfiltered", rand_seed=call["rand_seed"],
            vanished="keep", center_limit=None, quiet=call["quiet"], reference_free=True), comm)
        signals.check()
        yield plan, comm
        comm.barrier()


def _check_numbers(call, classes):
    for name, value in {**classes, "maxit": call["maxit"], "trials": call["trials"]}.items():
        if whole_number(name, value) < 1:
            raise InputError(f"{name}={value} is not allowed: give a whole number of at least 1")
    if not 0 <= whole_number("rand_seed", call["rand_seed"]) < 2**32:
        raise InputError(f"rand_seed={call['rand_seed']} is not allowed: give 0 to {2**32 - 1}")


def _check_classes(name, value, stack, most):
    if not 2 <= value <= most:
        raise InputError(f"{name}={value} is not allowed: give 2 to {most} classes for the {stack.n_images} particles "
                         f"of {stack.path}")


def _check_memory(plan, max_memory, copies):
    """Raise InputError unless the pixels of all particles, so many times, stay within the limit."""
    if max_memory is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        limit = memory.parse_size("max_memory", max_memory)
    n, n_pixels = plan.stack.n_images, int(plan.settings.core.sum())
    needed = plan.n_bytes + 4 * copies * n * n_pixels
    if needed > limit:
        megabytes = -(-needed // memory.UNITS["M"]) + 1
        raise InputError(f"max_memory={limit / memory.UNITS['M']:.0f}MB is not enough for the {n_pixels} pixels under "
                         f"the mask of {n} particles: give --max_memory={megabytes}MB or more where there is so much, "
                         "a smaller ou or mask, or fewer pixels by mrefali convert --bin=2")
    logger.info("%d particles of %d x %d px, %d pixels under the mask; about %.0f MB of memory", n, plan.stack.box,
                plan.stack.box, n_pixels, needed / memory.UNITS["M"])
    if plan.stack.read_only and not plan.stack.has_poses():
        logger.warning("%s has no poses: its particles are compared as they are", plan.stack.path)


# --- arrays


def aligned_pixels(plan):
    """Pixels under the mask of all particles, normalised and moved by their poses, (n_particles, n_pixels) float32."""
    particles, core = plan.particles, plan.settings.core
    pixels = np.empty((particles.n_images, int(core.sum())), np.float32)
    for block, images in particles.stream(0, particles.n_images):
        signals.check()
        average.normalize_particles(images, particles.inside)
        pixels[block] = plan.settings.move(images, plan.poses[block])[:, core]
    return pixels


def cluster(pixels, n_classes, maxit, trials, rand_seed, *, keep=False):
    """K-means of the rows of ``pixels``.

    Parameters
    ----------
    pixels : (n_particles, n_pixels) float32
        Rounded anew unless ``keep``, which takes a copy.
    n_classes, maxit, trials, rand_seed : int
        See :func:`k_means`.
    keep : bool

    Returns
    -------
    Clusters
    """
    from sklearn.cluster import KMeans

    estimator = KMeans(n_classes, n_init=trials, max_iter=maxit, random_state=rand_seed, copy_x=keep)
    with threadpool_limits(1):  # sums of several threads would be rounded in the order in which they end
        estimator.fit(pixels)
    order = np.argsort(-np.bincount(estimator.labels_, minlength=n_classes), kind="stable")
    return Clusters(np.argsort(order)[estimator.labels_].astype(np.int32), estimator.cluster_centers_[order],
                    float(estimator.inertia_), int(estimator.n_iter_))


def _correlations(pixels, found):
    """Correlation of each row with the mean of its class, (n_particles,) float64."""
    centers = _unit_rows(found.centers)
    values = np.empty(len(pixels))
    for first in range(0, len(pixels), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        values[rows] = np.einsum("ij,ij->i", _unit_rows(pixels[rows]), centers[found.assign[rows]])
    return values


def _unit_rows(rows):
    """Rows minus their mean, of length 1, float64."""
    rows = rows - rows.mean(axis=1, dtype=np.float64, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def criteria(pixels, found):
    """The three criteria, and traces of the scatter between and within the classes; a dict of float.

    Parameters
    ----------
    pixels : (n_particles, n_pixels) float32
    found : Clusters
    """
    from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

    counts = np.bincount(found.assign, minlength=len(found.centers))
    centers = found.centers.astype(np.float64)
    distances = ((centers - counts @ centers / len(pixels)) ** 2).sum(axis=1)
    between = float(counts @ distances)
    with threadpool_limits(1):
        return {"coleman": between * found.within,
                "calinski_harabasz": float(calinski_harabasz_score(pixels, found.assign)),
                "davies_bouldin": float(davies_bouldin_score(pixels, found.assign)),
                "between": between, "within": found.within}


def preferred(rows):
    """``{criterion: K}`` of the rows of :func:`k_means_groups`; of equal ones the fewest classes."""
    return {name: best(rows, key=lambda row: row[name])["K"] for name, (_, best) in CRITERIA.items()}


# --- files


def _classify(plan, call, comm):
    """K-means, the output directory, and the headers; at the root."""
    stack, path = plan.stack, os.fspath(call["outdir"])
    with OutputDirectory(path, stack.pixel_size_A) as output:
        with files_may_fail(lambda: NOTHING):
            parameters = describe(plan, call["K"], call, comm) | versions("numba", "numpy", "scipy", "h5py",
                                                                          "scikit-learn")
            _log_parameters(parameters)
            began = time.perf_counter()
            pixels = aligned_pixels(plan)
            found = cluster(pixels, call["K"], call["maxit"], call["trials"], call["rand_seed"])
            peak = _correlations(pixels, found)
            del pixels
            iteration = _averaged(plan, found, peak, began)
            _report_classes(iteration, found, call)
            output.write_parameters(parameters)
            output.write_start(plan.assign, plan.poses)
            output.write_iteration(iteration)
            output.write_end(0)
            if stack.read_only:
                output.write_average_images(iteration.averages)
        output.has_begun()
        written = _write_back(output, stack, iteration, call["write_back"])
        logger.info("done: averages and FRC curves in %s, %s in %s", path,
                    "poses and classes" if stack.read_only else "assign", written)
        done = f"but all is done: averages in {path}, classes in {written}"
        with files_may_fail(lambda: done), stopping_with(lambda: done):
            Reporter(path, stack, False).finish()


def _averaged(plan, found, peak, began):
    """The averages of the classes as the only ``Iteration`` of a run."""
    particles, settings, n_classes = plan.particles, plan.settings, len(found.centers)
    sums = settings.class_sums(n_classes, particles)
    for block, images in particles.stream(0, particles.n_images):
        signals.check()
        average.normalize_particles(images, particles.inside)
        sums.add(images, plan.poses[block], found.assign[block], np.arange(block.start, block.stop),
                 particles.ctf_sq(block))
    counts = np.bincount(found.assign, minlength=n_classes)
    # what stands for a class too small for halves
    means = np.stack([sums.halves(k).sum(axis=0) / max(counts[k], 1) for k in range(n_classes)]).astype(np.float32)
    classes = update_classes(sums, Alignments(found.assign, plan.poses, peak), means, particles, settings, None,
                             parallel.SERIAL)
    averages = np.stack([c.image for c in classes])
    return Iteration(0, found.assign, plan.poses, peak, np.ones(len(peak), bool), classes,
                     average.criterion(averages, settings.core), time.perf_counter() - began, None, 0, 0, False)


def _log_parameters(parameters):
    for name, value in parameters.items():
        details.debug("%s: %s", name, value)


def _report_classes(iteration, found, call):
    counts = np.array([c.count for c in iteration.classes])
    for k, count in enumerate(counts):
        details.debug("class %d: %d particles", k, count)
    logger.info("K-means, the best of %d trials: %d iterations of at most %d; %.7g within the classes; classes "
                "%d/%g/%d (smallest/median/largest); %.2f s", call["trials"], found.n_iterations, call["maxit"],
                found.within, counts.min(), np.median(counts), counts.max(), iteration.seconds)


def _write_back(output, stack, iteration, write_back):
    """The classes into the headers of the stack, or else into OUTDIR; where they are."""
    table = f"{output.path}/poses.csv"
    state = f"but all is done, its result in {table}"
    if not stack.read_only and stack.write_back_obstacle() is None:
        state += (f": mrefali header {shlex.quote(stack.path)} --params=assign --import={shlex.quote(table)} puts it "
                  "into the headers")
    with files_may_fail(lambda: state), stopping_with(lambda: state):
        if stack.read_only:
            return output.write_particles(stack, iteration.poses, iteration.assign)
        if stack.write_back_obstacle() is not None:
            logger.warning("the headers of %s cannot be written back: %s", stack.path, stack.write_back_obstacle())
            return output.write_poses_stack(stack, geometry.to_matrices(iteration.poses), iteration.assign)
        stack.write_columns({"assign": iteration.assign}, write_back)
        return f"the headers of {stack.path}"


def _compare_groups(plan, call):
    """K-means and criteria for each number of classes, and the files of them; at the root."""
    path = os.fspath(call["outdir"])
    with OutputDirectory(path, plan.stack.pixel_size_A) as output, files_may_fail(lambda: NOTHING):
        _log_parameters(call | versions("numba", "numpy", "scipy", "h5py", "scikit-learn"))
        pixels, rows = aligned_pixels(plan), []
        for n_classes in range(call["K1"], call["K2"] + 1):
            signals.check()
            found = cluster(pixels, n_classes, call["maxit"], call["trials"], call["rand_seed"], keep=True)
            counts = np.bincount(found.assign, minlength=n_classes)
            rows.append({"K": n_classes} | criteria(pixels, found) | {"smallest": int(counts.min()),
                                                                      "largest": int(counts.max())})
            logger.info("K=%d: %s; classes %d to %d", n_classes,
                        ", ".join(f"{label} {rows[-1][name]:.6g}" for name, (label, _) in CRITERIA.items()),
                        counts.min(), counts.max())
        output.write_groups(rows)
        best = preferred(rows)
        if not missing_for_pictures():
            from mrefali import plots

            with replacing(os.path.join(path, "groups.png")) as temporary:
                plots.groups(rows, {label: (name, best[name]) for name, (label, _) in CRITERIA.items()}).savefig(
                    temporary, format="png", dpi=144, metadata={"Software": None})
        logger.info("done: %s/groups.csv; %s; %s is as it was", path, ", ".join(
            f"{label} prefers K={best[name]}" for name, (label, _) in CRITERIA.items()), plan.stack.path)
        output.has_begun()
    return rows
