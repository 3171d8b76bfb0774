"""An aligned stack against the truth about it (the command ``evaluate``): a stack and a truth file in, numbers out.

May import everything below the commands; knows nothing of the search.
"""

import os
from dataclasses import dataclass

import numpy as np

from mrefali import average, fourier
from mrefali.accuracy import Comparison, compare
from mrefali.checks import read_classes, read_ctf, scan_pixels, whole_number
from mrefali.errors import InputError
from mrefali.geometry import default_outer_radius, disc
from mrefali.io import open_stack
from mrefali.limits import cramer_rao, information
from mrefali.outdir import resolution_px
from mrefali.particles import Particles
from mrefali.simulation import JUNK, read_truth


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes
    ----------
    comparison : mrefali.accuracy.Comparison
    n_junk : int
        Particles that show no view.
    counts : (n_classes,) int64
        Particles of each class.
    angle_bound, shift_bound : float, degrees and px
        Cramer-Rao bound of the rms errors, over the particles that the rms errors of ``comparison`` are over.
    frc : (n_classes, n_rings) float64
        Fourier ring correlation of each class average with its true view; NaN for a class that has no particle of
        its view.
    resolution : (n_classes,) float64, px
        Period at which that falls below 0.5.
    """

    comparison: Comparison
    n_junk: int
    counts: np.ndarray
    angle_bound: float
    shift_bound: float
    frc: np.ndarray
    resolution: np.ndarray

    def as_dict(self):
        """Everything but what is there for each particle, as JSON has it; None for NaN."""
        found = self.comparison
        numbers = {name: getattr(found, name) for name in (
            "matching", "class_share", "adjusted_rand", "mirror_share", "gross_share", "angle_error_median",
            "angle_error_rms", "shift_error_median", "shift_error_rms")}
        numbers |= {"angle_bound": self.angle_bound, "shift_bound": self.shift_bound,
                    "angle_multiple_of_bound": found.angle_error_rms / self.angle_bound,
                    "shift_multiple_of_bound": found.shift_error_rms / self.shift_bound,
                    "particles": len(found.gross), "junk": self.n_junk, "empty_classes": int((self.counts == 0).sum())}
        classes = [{"class": k, "particles": int(self.counts[k]), "view": int(found.view_of_class[k]),
                    "resolution_px": _plain(self.resolution[k]), "frc": [_plain(value) for value in self.frc[k]]}
                   for k in range(len(self.counts))]
        return {name: _plain(value) for name, value in numbers.items()} | {"classes": classes}


def evaluate(stack, truth, *, classes=None, CTF=False):
    """How close the classes and poses in the headers of a stack come to the truth.

    Parameters
    ----------
    stack : str
        Particles with ``xform.align2d`` and ``assign``; only read.
    truth : str
        ``OUT_truth.csv`` of :func:`mrefali.simulate`; ``OUT_views.hdf`` is beside it.
    classes : int, optional
        Classes of the run; without it as many as views, or as the largest ``assign`` asks for.
    CTF : bool
        Take the CTF in the headers into the averages and the bound.

    Returns
    -------
    Evaluation

    Raises
    ------
    InputError, FileNotFoundError
    """
    true_classes, true_poses = read_truth(truth)
    particles, views = open_stack(stack), open_stack(_views_path(truth))
    assign, n_classes = _check(particles, views, true_classes, truth, classes)
    poses, views = particles.poses(), views.read(0, views.n_images)
    inside = disc(particles.box, default_outer_radius(particles.box))
    ready = Particles(particles, inside, read_ctf(particles, 1.0) if CTF else None)
    scan_pixels(ready, 0, ready.n_images)
    found = compare(assign, poses, true_classes, true_poses, n_classes, len(views))
    sums, noise = _sums_and_noise(ready, assign, poses, n_classes, inside)
    frc, resolution = _frc_with_views(sums, views, found)
    angle_bound, shift_bound = _bounds(found, views, true_classes, noise, ready)
    return Evaluation(found, int((true_classes == JUNK).sum()), np.bincount(assign, minlength=n_classes),
                      angle_bound, shift_bound, frc, resolution)


def _views_path(truth):
    truth = os.fspath(truth)
    if not truth.endswith("_truth.csv"):
        raise InputError(f"{truth}: give OUT_truth.csv as `mrefali simulate OUT.hdf` writes it, with OUT_views.hdf "
                         "beside it")
    return truth.removesuffix("_truth.csv") + "_views.hdf"


def _check(stack, views, true_classes, truth, classes):
    """The ``assign`` of every particle, and the number of classes."""
    if stack.n_images != len(true_classes):
        raise InputError(f"{truth}: {len(true_classes)} particles, but {stack.path} has {stack.n_images}: give the "
                         "truth about this stack")
    if views.box != stack.box or true_classes.max() >= views.n_images:
        raise InputError(f"{views.path}: {views.n_images} views of {views.box} px, but {truth} names view "
                         f"{true_classes.max()} and {stack.path} has {stack.box} px: give files that were made "
                         "together")
    assign = read_classes(stack)
    if assign is None:
        raise InputError(f"{stack.path}: not every image has the header assign: align the stack first")
    if assign.min() < 0:
        raise InputError(f"{stack.path}: image {assign.argmin()} has assign={assign.min()}: classes count from 0")
    needed = max(views.n_images, int(assign.max()) + 1)
    if classes is None:
        return assign, needed
    if not assign.max() < whole_number("classes", classes):
        raise InputError(f"classes={classes} is not allowed: {stack.path} has assign={assign.max()}, so give at least "
                         f"{assign.max() + 1}")
    return assign, classes


def _sums_and_noise(particles, assign, poses, n_classes, inside):
    """Sums of the moved particles, (n_classes, n, n) float64, and the variance of the noise in each, (n,) float64.

    The noise is measured in the corners of the raw image, outside the disc of the normalisation.
    """
    sums = np.zeros((n_classes, particles.box, particles.box))
    noise = np.empty(particles.n_images)
    for first in range(0, particles.n_images, particles.block_size):
        block = slice(first, min(first + particles.block_size, particles.n_images))
        noise[block] = particles.stack.read(block.start, block.stop)[:, ~inside].var(axis=1, dtype=np.float64)
        np.add.at(sums, assign[block], average.transform(particles.read(block), poses[block]))
    return sums, noise


def _frc_with_views(sums, views, found):
    """FRC of each average with its view, moved to where the average stands, and the period at which it is 0.5.

    The sum serves as the average: FRC does not ask for the scale of a ring, nor then for the Wiener division.
    """
    n_classes, n = sums.shape[:2]
    frc, resolution = np.full((n_classes, n // 2 + 1), np.nan), np.full(n_classes, np.nan)
    for k in np.flatnonzero((found.view_of_class >= 0) & sums.any(axis=(1, 2))):
        view = views[found.view_of_class[k]][None]
        curve = average.frc(sums[k], fourier.transform(view, found.common[k][None])[0].astype(np.float64))
        frc[k], resolution[k] = curve[:, 1], resolution_px(curve, 0.5)
    return frc, resolution


def _bounds(found, views, true_classes, noise, particles):
    """The bound of the rms angle and shift error, over the particles without gross error."""
    fine = np.flatnonzero(np.isfinite(found.angle_error) & ~found.gross)
    informations = np.stack([information(view) for view in views])
    total = np.zeros((3, 3))
    for first in range(0, len(fine), 1000):
        some = fine[first:first + 1000]
        ctf_sq = particles.ctf_sq(some)
        total += cramer_rao(informations[true_classes[some]], noise[some], ctf_sq).sum(axis=0)
    shift, angle = total[0, 0] + total[1, 1], total[2, 2]
    return tuple(float(np.sqrt(square / len(fine))) if len(fine) else np.nan for square in (angle, shift))


def _plain(value):
    if isinstance(value, str | int):
        return value
    return float(value) if np.isfinite(value) else None
