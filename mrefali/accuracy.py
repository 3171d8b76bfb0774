"""Found classes and poses against the truth. Arrays in, numbers out; must never import io or the search.

A class average may stand rotated, shifted or mirrored against the view it shows. The particles of a class
share that one rigid transform, so it is measured and taken out before the errors are.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from mrefali.errors import InputError
from mrefali.geometry import POSE, compose, identity_poses, invert, make_poses, wrap_degrees

#: An error beyond one of these is gross: another peak of the correlation, not noise about the right one.
GROSS_DEGREES, GROSS_PX = 20.0, 4.0


@dataclass(frozen=True)
class Comparison:
    """How close an alignment came to the truth.

    Attributes
    ----------
    matching : str
        "one-to-one": each class has a view of its own, chosen so that the most particles are right;
        "majority": there are more classes than views, each class has the view most of its particles show.
    view_of_class : (n_classes,) int64
        The view each class is matched with, -1 for an empty class under "majority".
    right_class : (n_particles,) bool
        False for a particle that shows no view.
    class_share : float
        Share of the particles in the right class; here and below, of those that show a view.
    adjusted_rand : float
        Adjusted Rand index of classes and views: 1 if they are the same partition, 0 on average by chance.
    mirror_share : float
        Of the particles in the right class, the share with the right mirror.
    common : (n_classes,) POSE
        Carries the view of a class onto its average; the identity where no particle is right.
    angle_error, shift_error : (n_particles,) float64, degrees and px
        Size of the angle error, and length of the shift error at the centre of the view; NaN without the right class
        and mirror.
    gross : (n_particles,) bool
        Whether one of them is beyond ``GROSS_DEGREES`` or ``GROSS_PX``.
    gross_share : float
        Of the particles with the right class and mirror.
    angle_error_median, angle_error_rms : float, degrees
        Over the particles with the right class and mirror and no gross error; NaN if there are none.
    shift_error_median, shift_error_rms : float, px
        Over the same particles.

    The errors of small classes come out too small, as the common transform is fitted to the same particles.
    """

    matching: str
    view_of_class: np.ndarray
    right_class: np.ndarray
    class_share: float
    adjusted_rand: float
    mirror_share: float
    common: np.ndarray
    angle_error: np.ndarray
    shift_error: np.ndarray
    gross: np.ndarray
    gross_share: float
    angle_error_median: float
    angle_error_rms: float
    shift_error_median: float
    shift_error_rms: float


def compare(assign, poses, classes, truth_poses, n_classes, n_views):
    """How close found classes and poses came to the truth.

    Parameters
    ----------
    assign : (n_particles,) int array
        The class found, 0 to ``n_classes`` - 1.
    poses : (n_particles,) POSE
        Found; carry each particle onto the average of its class.
    classes : (n_particles,) int array
        The view in truth, 0 to ``n_views`` - 1; -1 for a particle that shows none.
    truth_poses : (n_particles,) POSE
        True; carry each particle onto its view.
    n_classes, n_views : int

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
    """
    assign, classes = np.asarray(assign), np.asarray(classes)
    _check_comparison(assign, poses, classes, truth_poses, n_classes, n_views)
    shows = classes >= 0
    counts = _counts(assign[shows], classes[shows], n_classes, n_views)
    view_of_class, matching = match_classes(assign[shows], classes[shows], n_classes, n_views)
    right = shows & (view_of_class[assign] == classes)
    view_to_average = compose(invert(truth_poses), poses)
    common = identity_poses(n_classes)
    for k in np.unique(assign[right]):
        common[k] = common_transform(view_to_average[right & (assign == k)])

    # from the view to the average and back by the common transform: the identity, were the pose perfect
    error = compose(view_to_average, invert(common[assign]))
    with_mirror = right & (error["mirror"] == 0)  # never empty: there is a right particle, of the majority's mirror
    angle = np.where(with_mirror, np.abs(_signed_degrees(error["alpha"])), np.nan)
    shift = np.where(with_mirror, np.hypot(error["sx"], error["sy"]), np.nan)
    gross = (angle > GROSS_DEGREES) | (shift > GROSS_PX)
    fine = with_mirror & ~gross
    return Comparison(matching, view_of_class, right, right.sum() / shows.sum(), adjusted_rand(counts),
                      with_mirror.sum() / right.sum(), common, angle, shift, gross, gross.sum() / with_mirror.sum(),
                      *_median_and_rms(angle[fine]), *_median_and_rms(shift[fine]))


def _counts(assign, classes, n_classes, n_views):
    """Particles of each class and view, (n_classes, n_views) int64."""
    counts = np.zeros((n_classes, n_views), np.int64)
    np.add.at(counts, (assign, classes), 1)
    return counts


def adjusted_rand(counts):
    """Adjusted Rand index of two partitions (Hubert and Arabie 1985, equation 5).

    Parameters
    ----------
    counts : (n_classes, n_views) int64
        Particles of each class and view.

    Returns
    -------
    float
        1 where both put all particles, or each alone, into one part.
    """
    def pairs(n):
        return float((n * (n - 1) / 2).sum())

    together = pairs(counts)
    in_class, in_view = pairs(counts.sum(axis=1)), pairs(counts.sum(axis=0))
    total = pairs(counts.sum())
    by_chance = in_class * in_view / total if total else 0.0
    largest = (in_class + in_view) / 2
    return 1.0 if largest == by_chance else (together - by_chance) / (largest - by_chance)


def match_classes(assign, classes, n_classes, n_views):
    """The view that each class is matched with.

    Parameters
    ----------
    assign, classes : (n_particles,) int arrays
        The class found and the view in truth.
    n_classes, n_views : int

    Returns
    -------
    view_of_class : (n_classes,) int64
        -1 for an empty class under "majority", where the first of equally frequent views is taken.
    matching : str
        "one-to-one" or "majority", see :class:`Comparison`.
    """
    counts = _counts(assign, classes, n_classes, n_views)
    if n_classes > n_views:
        return np.where(counts.any(axis=1), counts.argmax(axis=1), -1), "majority"
    return linear_sum_assignment(counts, maximize=True)[1], "one-to-one"


def common_transform(transforms):
    """The rigid transform that most of ``transforms`` are close to, robust against gross errors.

    The mirror is that of the majority (none, if equal). Over those that have it, the angle is the median
    about their circular mean, and sx and sy are medians.

    Parameters
    ----------
    transforms : (n,) POSE, n > 0

    Returns
    -------
    () POSE
    """
    mirror = int(2 * np.count_nonzero(transforms["mirror"]) > len(transforms))
    agreeing = transforms[(transforms["mirror"] != 0) == mirror]
    alpha = np.rad2deg(np.angle(np.exp(1j * np.deg2rad(agreeing["alpha"])).mean()))
    alpha += np.median(_signed_degrees(agreeing["alpha"] - alpha))
    return make_poses(wrap_degrees(alpha), np.median(agreeing["sx"]), np.median(agreeing["sy"]), mirror)


def _signed_degrees(alpha):
    return wrap_degrees(alpha + 180.0) - 180.0


def _median_and_rms(sizes):
    if not sizes.size:
        return np.nan, np.nan
    return float(np.median(sizes)), float(np.sqrt(np.mean(sizes**2)))


def _check_comparison(assign, poses, classes, truth_poses, n_classes, n_views):
    lengths = {len(assign), len(poses), len(classes), len(truth_poses)}
    if len(lengths) > 1:
        raise InputError(f"assign, poses, classes and truth_poses have {len(assign)}, {len(poses)}, "
                         f"{len(classes)} and {len(truth_poses)} entries: give one a particle in each")
    if len(assign) == 0:
        raise InputError("assign is empty: give at least one particle")
    for name, values, least, limit in (("assign", assign, 0, n_classes), ("classes", classes, -1, n_views)):
        if values.dtype.kind not in "iu":
            raise InputError(f"{name} has the type {values.dtype}: give whole numbers")
        outside = np.flatnonzero((values < least) | (values >= limit))
        if outside.size:
            i = outside[0]
            raise InputError(f"{name}[{i}]={values[i]} is not allowed: give {least} to {limit - 1}")
    if (classes < 0).all():
        raise InputError("classes are all -1: give at least one particle that shows a view")
    for name, values in (("poses", poses), ("truth_poses", truth_poses)):
        if values.dtype != POSE:
            raise InputError(f"{name} has the type {values.dtype}: give geometry.POSE")
