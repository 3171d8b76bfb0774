"""Everything that is checked before a run creates or changes anything, the pixels of the whole stack included."""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass

import numba
import numpy as np

from mrefali import average, ctf, geometry, reference
from mrefali.classes import VANISHED
from mrefali.errors import InputError
from mrefali.io import open_stack
from mrefali.particles import Particles, StackCtf
from mrefali.refine import AUTO_STOP_ITERATIONS, Settings
from mrefali.search import Search


@dataclass(frozen=True)
class Job:
    """A run that has passed every check."""

    particles: Particles
    references: np.ndarray
    poses: np.ndarray
    settings: Settings

    @property
    def stack(self):
        return self.particles.stack


def prepare(stack, references, mask, ir, ou, rs, xr, yr, ts, center, maxit, CTF, snr, function, rand_seed, vanished,
             center_limit, quiet, comm, poses=None):
    ir, ou, rs, center, maxit, rand_seed = (whole_number(name, value) for name, value in (
        ("ir", ir), ("ou", ou), ("rs", rs), ("center", center), ("maxit", maxit), ("rand_seed", rand_seed)))
    xr, yr, ts, snr = (real_number(name, value) for name, value in (
        ("xr", xr), ("yr", yr), ("ts", ts), ("snr", snr)))
    _check_choices(center, maxit, snr, vanished, center_limit)
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
    particles = Particles(stack, mask != 0, _read_ctf(stack, snr) if CTF else None)
    settings = Settings(search, mask, center, maxit, function, rand_seed, _scan_pixels(particles, comm), snr, vanished,
                        center_limit, quiet)
    return Job(particles, images, poses, settings)


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


def _read_ctf(stack, snr):
    """The headers ``ctf`` and ``ctf_applied`` of every image; a nonsense is refused with the image's number."""
    texts, applied = stack.column("ctf"), stack.column("ctf_applied")
    known = {}  # a stack has far fewer micrographs than particles
    parameters = np.empty(stack.n_images, ctf.CTF_PARAMETERS)
    for i, text in enumerate(texts):
        if text is None:
            raise InputError(f"{stack.path}: image {i} has no header ctf: set it, or leave --CTF out")
        if text not in known:
            try:
                known[text] = ctf.parse_ctf(text)
            except InputError as error:
                raise InputError(f"{stack.path}: image {i}: {error}") from error
        parameters[i] = known[text]
    sizes = parameters["pixel_size_A"]
    other = np.flatnonzero(~np.isclose(sizes, sizes[0], rtol=1e-3))
    if other.size:
        raise InputError(f"{stack.path}: image {other[0]} has a CTF of pixel size {sizes[other[0]]:g} A, but image 0 "
                         f"of {sizes[0]:g} A: a stack has one pixel size")
    for i, value in enumerate(applied):
        if value not in (None, 0, 1):
            raise InputError(f"{stack.path}: image {i} has ctf_applied={value}: 0 (not multiplied by the CTF) or "
                             "1 (multiplied) is allowed")
    return StackCtf(parameters, np.array([value == 1 for value in applied]), snr)


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


def _scan_pixels(particles, comm):
    """Read the whole stack once; the largest absolute pixel after normalisation, over all ranks."""
    largest, problem = 0.0, None
    for first, last in particles.blocks(*comm.share(particles.n_images)):
        statistics = average.pixel_statistics(particles.multiplied(slice(first, last)), particles.inside)
        try:
            _check_pixels(statistics, particles.stack.path, first)
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


def check_places_once(stack, outdir, comm):
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
    check_new_directory(outdir)
    if stack.write_back_obstacle() is None:
        stack.check_writable()


def check_new_directory(path):
    """Raise FileExistsError, FileNotFoundError or PermissionError if the directory ``path`` cannot be made."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path}: the output directory exists already: give a new name, or remove it")
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise FileNotFoundError(f"{path}: its parent directory {parent} does not exist: make it first")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"{path}: no permission to write into {parent}: give a place you may write to")


@contextmanager
def use_threads(threads):
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
