"""Particles with a known answer: analytic blobs, projected, moved and sampled without any interpolation.

A phantom is a cloud of round 3-D Gaussian blobs. Projected, a blob stays a round Gaussian, so a particle is
its view's blobs, carried by the inverse of its true pose and evaluated on the pixel grid as a product of two
small matrices, plus white noise; with a CTF, multiplied by that in Fourier space, in a box twice as wide. Must
never import the search or the averages, which it is there to test.
"""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.fft
from scipy.spatial.transform import Rotation

from mrefali.ctf import CTF_PARAMETERS, CtfKernels, format_ctf
from mrefali.errors import InputError
from mrefali.geometry import (
    POSE,
    check_rings,
    default_outer_radius,
    disc,
    identity_poses,
    invert,
    make_poses,
    to_matrices,
)
from mrefali.io import check_new_file, write_stack

#: Diameter of the phantom over the box: every blob lies within it up to two of its sigmas.
FILL = 0.42
N_BLOBS = 40
SMALLEST_BOX = 16
TRUTH_COLUMNS = ("index", "class", "alpha", "sx", "sy", "mirror")
#: The class in truth of a particle that shows no view.
JUNK = -1
#: In a nearly symmetric phantom, by how much the second blob of a pair is lower than the first.
UNLIKE = 0.3
#: What the particles of a microscope share, and the ranges of what differs from one to the next.
VOLTAGE_KV, CS_MM, AMPCONT_PERCENT = 300.0, 2.7, 10.0
DEFOCUS_UM, DFDIFF_UM = (1.0, 3.0), (0.0, 0.1)

# Streams of random numbers drawn from one seed. Particle i has its own, so that it is the same whatever the
# number of particles and the order in which they are made.
_PHANTOM, _ORIENTATIONS, _CLASSES, _PARTICLE, _JUNK, _CTF = range(6)


@dataclass(frozen=True)
class Views:
    """Projections of the phantom as 2-D Gaussian blobs.

    Attributes
    ----------
    box : int, px
    centres : (n_views, n_blobs, 2) float64, px
        x, y about the centre of the image.
    sigmas : (n_blobs,) float64, px
        A round blob has the same width in every view.
    heights : (n_blobs,) float64
        The value at the middle of a blob.
    """

    box: int
    centres: np.ndarray
    sigmas: np.ndarray
    heights: np.ndarray


@dataclass(frozen=True)
class Particles:
    """Simulated particles and the truth about them.

    Attributes
    ----------
    images : (n_particles, box, box) float32
    views : (n_views, box, box) float32
        Free of noise, in the identity pose.
    classes : (n_particles,) int64
        The view that each particle shows; ``JUNK`` for one that shows none.
    poses : (n_particles,) POSE
        Carry each particle onto its view.
    ctf : (n_particles,) CTF_PARAMETERS or None
        By which each particle is multiplied.
    """

    images: np.ndarray
    views: np.ndarray
    classes: np.ndarray
    poses: np.ndarray
    ctf: np.ndarray | None = None


def make_views(n_views, box, *, seed, nearly_symmetric=False):
    """Views of one phantom in random orientations, as blobs.

    The phantom depends on ``seed`` alone, ``box`` only scales it, and more views begin with the same ones.
    A nearly symmetric phantom is made of pairs of blobs opposite each other, of which the second is lower by
    ``UNLIKE``: every view of it looks nearly the same when turned by 180 degrees.

    Parameters
    ----------
    n_views : int
    box : int, px
    seed : int
    nearly_symmetric : bool

    Returns
    -------
    Views
    """
    _check_whole("n_views", n_views, 1)
    _check_whole("box", box, SMALLEST_BOX)
    _check_whole("seed", seed, 0)
    phantom = _phantom(_stream(seed, _PHANTOM), nearly_symmetric)
    # normal quaternions, normalised, are uniform over the rotations
    rotations = Rotation.from_quat(_stream(seed, _ORIENTATIONS).standard_normal((n_views, 4))).as_matrix()
    return _project(*phantom, rotations, box)


def _phantom(rng, nearly_symmetric=False):
    """Centres (n_blobs, 3), sigmas and heights (n_blobs,) of blobs about the centre of mass, in units of a ball."""
    n_blobs = N_BLOBS // 2 if nearly_symmetric else N_BLOBS
    sigmas = rng.uniform(0.07, 0.13, n_blobs)
    heights = 10 ** rng.uniform(-1.0, 0.0, n_blobs)
    directions = rng.standard_normal((n_blobs, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # in a thick shell: views of a full ball of blobs are all much the same
    centres = directions * np.cbrt(rng.uniform(0.5**3, 1.0, n_blobs))[:, None]
    if nearly_symmetric:
        centres = np.concatenate([centres, -centres])
        sigmas, heights = np.tile(sigmas, 2), np.concatenate([heights, (1 - UNLIKE) * heights])
    centres -= np.average(centres, axis=0, weights=heights * sigmas**2)  # so that every view is centred
    return centres, sigmas, heights


def _project(centres, sigmas, heights, rotations, box):
    """``Views`` of a phantom that fills its share of the box, one for each of the (n_views, 3, 3) rotations."""
    scale = FILL * box / 2 / np.max(np.linalg.norm(centres, axis=1) + 2 * sigmas)
    projected = np.einsum("vij,bj->vbi", rotations[:, :2], centres)
    return Views(int(box), projected * scale, sigmas * scale, heights)


def render(views, classes, poses):
    """The noise-free images of particles: their views moved by the inverse of their poses.

    Parameters
    ----------
    views : Views
    classes : (n_particles,) int array
    poses : (n_particles,) POSE
        Carry each particle onto its view.

    Returns
    -------
    (n_particles, box, box) float32
    """
    images = np.empty((len(poses), views.box, views.box), np.float32)
    grid = np.arange(views.box) - views.box // 2
    for start in range(0, len(poses), 64):  # a block bounds the float64 scratch
        block = slice(start, start + 64)
        matrices = to_matrices(invert(poses[block]))
        centres = (np.einsum("pij,pbj->pbi", matrices[:, :2, :2], views.centres[classes[block]])
                   + matrices[:, None, :2, 3])
        offsets = (grid - centres[..., None]) / views.sigmas[:, None, None]  # [particle, blob, x or y, pixel]
        x, y = np.moveaxis(np.exp(-0.5 * offsets**2), 2, 0)
        images[block] = np.matmul((y * views.heights[:, None]).swapaxes(1, 2), x)
    return images


def simulate_particles(n_particles, n_views=8, box=64, snr=0.3, max_shift=3.0, mirror=True, sizes=None,
                       seed=0, outer_radius=-1, *, nearly_symmetric=False, junk=0.0, CTF=False, pixel_size=2.0):
    """Noisy particles of random views in random poses, with the truth.

    Angles are uniform in [0, 360), sx and sy uniform within +-``max_shift``, each particle is mirrored with
    probability 1/2, the noise is white and Gaussian. The random numbers behind pose, CTF and noise of a particle
    depend on ``seed`` and its index alone; its class depends on ``n_particles``, ``n_views``, ``sizes`` and
    ``junk`` as well, since the sizes of the classes are exact.

    Parameters
    ----------
    n_particles, n_views : int
    box : int, px
    snr : float
        Variance of the particle's clean image, CTF applied, over the disc ``outer_radius`` divided by the variance
        of its noise per pixel; ``inf`` for no noise.
    max_shift : float, px
        At most what keeps the whole phantom within the image.
    mirror : bool
        False: no particle is mirrored.
    sizes : list of n_views floats, optional
        Relative sizes of the classes; equal by default.
    seed : int
    outer_radius : int, px
        -1 means ``box//2 - 2``. It bears on ``snr`` only.
    nearly_symmetric : bool
        See :func:`make_views`.
    junk : float
        Share of the particles, rounded to whole ones, that show no view but each a phantom of its own.
    CTF : bool
        Multiply each particle by a CTF of its own: 300 kV, Cs 2.7 mm, 10 % amplitude contrast, defocus uniform in
        ``DEFOCUS_UM``, astigmatism in ``DFDIFF_UM``.
    pixel_size : float, Angstrom
        Bears on the CTF only.

    Returns
    -------
    Particles

    Raises
    ------
    InputError
    """
    _check_simulation(n_particles, n_views, box, snr, max_shift, mirror, sizes, seed, nearly_symmetric, junk, CTF,
                      pixel_size)
    if outer_radius == -1:
        outer_radius = default_outer_radius(box)
    check_rings(box, 1, outer_radius, 1)
    views = make_views(n_views, box, seed=seed, nearly_symmetric=nearly_symmetric)
    n_junk = round(junk * n_particles)
    counts = class_sizes(n_particles - n_junk, n_views, sizes)
    # shuffled: dealt out in turn, each of an even number of classes would lie in one even/odd half
    shown = _stream(seed, _CLASSES).permutation(np.repeat(np.arange(n_views + n_junk), [*counts, *[1] * n_junk]))

    streams = [_stream(seed, _PARTICLE, i) for i in range(n_particles)]
    poses = np.array([_draw_pose(rng, max_shift, mirror) for rng in streams], POSE)
    parameters = _draw_ctfs(n_particles, pixel_size, seed) if CTF else None
    images = _clean_images(_with_junk(views, n_junk, seed), shown, poses, parameters)
    signal = images[:, disc(box, outer_radius)].var(axis=1, dtype=np.float64)
    for image, rng, sigma in zip(images, streams, np.sqrt(signal / snr), strict=True):
        image += np.float32(sigma) * rng.standard_normal(image.shape, np.float32)
    return Particles(images, render(views, np.arange(n_views), identity_poses(n_views)),
                     np.where(shown < n_views, shown, JUNK), poses, parameters)


def _with_junk(views, n_junk, seed):
    """``views``, and after them ``n_junk`` more, of the same blobs in places of their own."""
    clouds = [_project(*_phantom(_stream(seed, _JUNK, i)), np.eye(3)[None], views.box) for i in range(n_junk)]
    return replace(views, centres=np.concatenate([views.centres, *(cloud.centres for cloud in clouds)]))


def _draw_ctfs(n_particles, pixel_size_A, seed):
    """``(n_particles,) CTF_PARAMETERS``, drawn for each particle alone."""
    parameters = np.zeros(n_particles, CTF_PARAMETERS)
    parameters["voltage_kV"], parameters["cs_mm"], parameters["ampcont_percent"] = VOLTAGE_KV, CS_MM, AMPCONT_PERCENT
    parameters["pixel_size_A"] = pixel_size_A
    for i in range(n_particles):
        rng = _stream(seed, _CTF, i)
        parameters["defocus_um"][i] = rng.uniform(*DEFOCUS_UM)
        parameters["dfdiff_um"][i] = rng.uniform(*DFDIFF_UM)
        parameters["dfang_deg"][i] = rng.uniform(0.0, 180.0)
    return parameters


def _clean_images(views, classes, poses, parameters):
    """:func:`render`, and each image multiplied by its CTF, in a box twice as wide, if there are ``parameters``."""
    if parameters is None:
        return render(views, classes, poses)
    box, wide = views.box, replace(views, box=2 * views.box)
    middle = slice(box - box // 2, 2 * box - box // 2)  # pixel box of the wide image is pixel box // 2 of the other
    kernels = CtfKernels(box)
    images = np.empty((len(poses), box, box), np.float32)
    for start in range(0, len(poses), 64):
        block = slice(start, start + 64)
        spectra = scipy.fft.rfft2(render(wide, classes[block], poses[block]))
        for spectrum, values in zip(spectra, parameters[block], strict=True):
            spectrum *= kernels(values)
        images[block] = scipy.fft.irfft2(spectra, s=(2 * box, 2 * box))[:, middle, middle]
    return images


def simulate(out, n_particles=800, n_views=8, box=64, snr=0.3, max_shift=3.0, mirror=True, sizes=None,
             pixel_size=2.0, seed=0, *, nearly_symmetric=False, junk=0.0, CTF=False):
    """Write a stack of simulated particles, the truth about them and their noise-free views.

    ``OUT.hdf`` holds the particles, with the identity as ``xform.align2d`` so that they can be aligned at
    once, and with their ``ctf``; ``OUT_truth.csv`` their class and pose (see :func:`read_truth`); ``OUT_views.hdf``
    the views.

    Parameters
    ----------
    out : str or Path
        Ends in ``.hdf``; none of the three files may exist.
    pixel_size : float, Angstrom
    n_particles, n_views, box, snr, max_shift, mirror, sizes, seed, nearly_symmetric, junk, CTF
        As for :func:`simulate_particles`.

    Raises
    ------
    FileExistsError, FileNotFoundError, PermissionError
    InputError
        Nothing was created then.
    """
    _check_simulation(n_particles, n_views, box, snr, max_shift, mirror, sizes, seed, nearly_symmetric, junk, CTF,
                      pixel_size)
    out, truth_path, views_path = _output_paths(out)
    particles = simulate_particles(n_particles, n_views, box, snr, max_shift, mirror, sizes, seed,
                                   nearly_symmetric=nearly_symmetric, junk=junk, CTF=CTF, pixel_size=pixel_size)
    write_truth(truth_path, particles.classes, particles.poses)
    write_stack(views_path, particles.views, pixel_size_A=pixel_size)
    # last, so that a stack is never without its truth
    headers = [{"xform.align2d": matrix} for matrix in to_matrices(identity_poses(n_particles))]
    if CTF:
        for header, parameters in zip(headers, particles.ctf, strict=True):
            header.update({"ctf": format_ctf(parameters), "ctf_applied": 0})
    write_stack(out, particles.images, headers=headers, pixel_size_A=pixel_size)


def write_truth(path, classes, poses):
    """Write one line a particle: index, class, alpha, sx, sy, mirror; floats with all their digits."""
    with open(path, "x", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TRUTH_COLUMNS)
        for i, (view, pose) in enumerate(zip(classes.tolist(), poses.tolist(), strict=True)):
            writer.writerow((i, view, *pose))


def read_truth(path):
    """Classes and poses from a truth file.

    Parameters
    ----------
    path : str or Path
        As :func:`simulate` writes it: a header line, then one line a particle in order of index.

    Returns
    -------
    classes : (n_particles,) int64
        ``JUNK`` (-1) for a particle that shows no view.
    poses : (n_particles,) POSE

    Raises
    ------
    FileNotFoundError
    InputError
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; `mrefali simulate OUT.hdf` writes OUT_truth.csv")
    classes, poses = [], []
    with open(path, newline="") as file:
        rows = csv.reader(file)
        header = tuple(next(rows, ()))
        if header != TRUTH_COLUMNS:
            raise InputError(f"{path}: the first line is {','.join(header)!r}: a truth file has the columns "
                             f"{','.join(TRUTH_COLUMNS)}")
        for i, row in enumerate(rows):
            view, pose = _parse_truth(path, i, row)
            classes.append(view)
            poses.append(pose)
    if not poses:
        raise InputError(f"{path} holds no particle: give a truth file with a line for each")
    return np.array(classes, np.int64), np.array(poses, POSE)


def class_sizes(n_particles, n_views, sizes=None):
    """Particles of each view, ``(n_views,) int64``: ``n_particles`` shared out in proportion to ``sizes``.

    Each view gets its share rounded down; what is left goes to the largest remainders, the first of equals.
    """
    shares = np.ones(n_views) if sizes is None else np.asarray(sizes, np.float64)
    shares = shares / shares.max()  # first, for a sum that does not overflow
    shares *= n_particles / shares.sum()
    counts = np.floor(shares).astype(np.int64)
    most_due = np.argsort(counts - shares, kind="stable")[: n_particles - counts.sum()]
    counts[most_due] += 1
    return counts


def largest_shift(box):
    """The largest ``max_shift`` in px, to 0.01, that keeps the phantom within the image even in a corner."""
    return math.floor(100 * ((box - 1) // 2 - FILL * box / 2) / math.sqrt(2)) / 100


def _check_simulation(n_particles, n_views, box, snr, max_shift, mirror, sizes, seed, nearly_symmetric, junk, CTF,
                      pixel_size):
    """Raise InputError unless these arguments of :func:`simulate_particles` are allowed."""
    _check_whole("n_views", n_views, 1)
    _require("n_particles", n_particles, _is_whole(n_particles) and n_particles >= n_views,
             f"a whole number of at least n_views={n_views}")
    _check_whole("box", box, SMALLEST_BOX)
    _check_whole("seed", seed, 0)
    _require("snr", snr, _is_number(snr) and snr >= 1e-6, "a number of at least 1e-6, or inf for no noise")
    _require("max_shift", max_shift, _is_number(max_shift) and 0 <= max_shift <= largest_shift(box),
             f"0 to {largest_shift(box)} px, which keep the particle within a {box}-pixel image")
    for name, value in (("mirror", mirror), ("nearly_symmetric", nearly_symmetric), ("CTF", CTF)):
        _require(name, value, value in (0, 1), "True or False")
    _require("pixel_size", pixel_size, _is_number(pixel_size) and 0 < pixel_size < np.inf,
             "a number of Angstrom above 0")
    _require("junk", junk, _is_number(junk) and 0 <= junk < 1 and n_particles - round(junk * n_particles) >= n_views,
             f"a share from 0 to what leaves one of n_particles={n_particles} for each of n_views={n_views}")
    n_particles -= round(junk * n_particles)
    if sizes is None:
        return
    well_formed = (isinstance(sizes, (list, tuple, np.ndarray)) and len(sizes) == n_views
                   and all(_is_number(size) and 0 < size < np.inf for size in sizes))
    _require("sizes", sizes, well_formed, f"a list of n_views={n_views} numbers above 0")
    empty = np.flatnonzero(class_sizes(n_particles, n_views, sizes) == 0)
    if empty.size:
        raise InputError(f"sizes={sizes!r} leave view {empty[0]} without one of n_particles={n_particles}: "
                         f"give more particles or more even sizes")


def _check_whole(name, value, at_least):
    """Raise InputError unless ``value`` is a whole number of at least ``at_least``."""
    _require(name, value, _is_whole(value) and value >= at_least, f"a whole number of at least {at_least}")


def _require(name, value, allowed, what):
    if not allowed:
        raise InputError(f"{name}={value!r} is not allowed: give {what}")


def _is_whole(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value):
    return _is_whole(value) or isinstance(value, (float, np.floating))


def _stream(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=key))


def _draw_pose(rng, max_shift, mirror):
    alpha = rng.uniform(0.0, 360.0)
    sx, sy = rng.uniform(-max_shift, max_shift, 2)
    mirrored = rng.integers(2)  # drawn in any case: the rest stays the same without mirrors
    return alpha, sx, sy, mirrored if mirror else 0


def _output_paths(out):
    out = Path(out)
    paths = out, out.with_name(f"{out.stem}_truth.csv"), out.with_name(f"{out.stem}_views.hdf")
    check_new_file(out, ".hdf")
    for path in paths[1:]:
        check_new_file(path)
    return paths


def _parse_truth(path, i, row):
    try:
        index, view, mirrored = (int(row[k]) for k in (0, 1, 5))
        alpha, sx, sy = (float(text) for text in row[2:5])
    except (ValueError, IndexError):
        index = None
    if not (index == i and len(row) == len(TRUTH_COLUMNS) and view >= JUNK and mirrored in (0, 1)
            and np.isfinite([alpha, sx, sy]).all()):
        raise InputError(f"{path}: line {i + 2} is {','.join(row)!r}: give {','.join(TRUTH_COLUMNS)} with "
                         f"index {i}, class >= 0 or {JUNK} for junk, finite numbers and mirror 0 or 1")
    return view, make_poses(alpha, sx, sy, mirrored)
