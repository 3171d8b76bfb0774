"""Conventions of pose and ring, stated once (SPEC sections 2 and 3). Imports nothing of ours but errors.

An image is n x n pixels, row-major ``[y, x]``; its centre is pixel ``n // 2`` (counted from 0) in both directions.
A pose (alpha, sx, sy, mirror) stands for the map, in coordinates about the centre,

    p' = F (R p + s),  R = [[cos a, sin a], [-sin a, cos a]],  s = (sx, sy),  F = diag(-1, 1) if mirror else 1,

that carries a point p = (x, y) of the particle onto the reference: rotate, shift, then flip x.
"""

import numpy as np

from mrefali.errors import InputError

#: One pose a particle: alpha in degrees, sx and sy in px, mirror 0 or 1.
POSE = np.dtype([("alpha", "f8"), ("sx", "f8"), ("sy", "f8"), ("mirror", "i4")])

#: Poses to be made matrices of, or of matrices, at a time: a matrix takes four times the memory.
CONVERTED_AT_ONCE = 4096


def make_poses(alpha, sx=0.0, sy=0.0, mirror=0):
    """Poses from their four parameters.

    Parameters
    ----------
    alpha : float or (n,) array, degrees
    sx, sy : float or (n,) array, px
    mirror : int or (n,) array, 0 or 1

    Returns
    -------
    (n,) POSE, or () POSE if all are scalars
    """
    alpha, sx, sy, mirror = np.broadcast_arrays(alpha, sx, sy, mirror)
    poses = np.zeros(alpha.shape, POSE)
    poses["alpha"], poses["sx"], poses["sy"], poses["mirror"] = alpha, sx, sy, mirror
    return poses


def identity_poses(n_particles):
    """``(n_particles,) POSE`` that move nothing."""
    return np.zeros(n_particles, POSE)


def to_matrices(poses):
    """The 3x4 row-major matrices that ``xform.align2d`` stores.

    Parameters
    ----------
    poses : (...) POSE

    Returns
    -------
    (..., 3, 4) float64
        Row 0 is negated as a whole, translation included, for a mirrored pose; row 2 is 0 0 1 0.
    """
    a = np.deg2rad(poses["alpha"])
    sign = np.where(poses["mirror"] != 0, -1.0, 1.0)
    matrices = np.zeros(poses.shape + (3, 4))
    matrices[..., 0, 0], matrices[..., 0, 1], matrices[..., 0, 3] = (
        sign * np.cos(a), sign * np.sin(a), sign * poses["sx"])
    matrices[..., 1, 0], matrices[..., 1, 1], matrices[..., 1, 3] = -np.sin(a), np.cos(a), poses["sy"]
    matrices[..., 2, 2] = 1.0
    return matrices


def from_matrices(matrices):
    """The poses that 3x4 matrices stand for (SPEC section 2): mirror from the determinant, then the angle.

    Parameters
    ----------
    matrices : (..., 3, 4) array_like

    Returns
    -------
    (...) POSE
        alpha in [0, 360).
    """
    m = np.asarray(matrices, np.float64)
    mirror = (m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]) < 0
    sign = np.where(mirror, -1.0, 1.0)
    alpha = np.rad2deg(np.arctan2(sign * m[..., 0, 1], sign * m[..., 0, 0]))
    return make_poses(wrap_degrees(alpha), sign * m[..., 0, 3], m[..., 1, 3], mirror)


def wrap_degrees(alpha):
    """``alpha`` in degrees, carried into [0, 360)."""
    wrapped = np.mod(alpha, 360.0)
    return np.where(wrapped >= 360.0, 0.0, wrapped)  # mod of a tiny negative number rounds up to 360


def compose(first, second):
    """The poses that do ``first``, then ``second``; both (...) POSE, broadcast against each other."""
    a, b = np.broadcast_arrays(first, second)
    rotation = np.where(a["mirror"] != 0, -b["alpha"], b["alpha"])
    theta = np.deg2rad(rotation)
    c, s = np.cos(theta), np.sin(theta)
    # F2(R2 F1(R1 p + s1) + s2), with R(t) F = F R(-t): the first flip is moved to the outside
    flip = np.where(a["mirror"] != 0, -1.0, 1.0)
    return make_poses(
        wrap_degrees(a["alpha"] + rotation),
        c * a["sx"] + s * a["sy"] + flip * b["sx"],
        -s * a["sx"] + c * a["sy"] + b["sy"],
        a["mirror"] ^ b["mirror"],
    )


def shifted(poses, shifts):
    """The poses that do ``poses``, (n,) POSE, then move by ``shifts``, (n, 2) px: :func:`compose` in less memory."""
    moved = poses.copy()
    moved["sx"] += np.where(poses["mirror"] != 0, -shifts[:, 0], shifts[:, 0])
    moved["sy"] += shifts[:, 1]
    return moved


def invert(poses):
    """The poses that undo ``poses``, (...) POSE."""
    a = np.deg2rad(poses["alpha"])
    c, s = np.cos(a), np.sin(a)
    mirrored = poses["mirror"] != 0
    x = c * poses["sx"] - s * poses["sy"]  # R^T s
    y = s * poses["sx"] + c * poses["sy"]
    return make_poses(
        wrap_degrees(np.where(mirrored, poses["alpha"], -poses["alpha"])),
        np.where(mirrored, x, -x), -y, poses["mirror"])


def ring_radii(inner_radius, outer_radius, ring_step):
    """Radii in px of the rings: ``inner_radius``, then every ``ring_step``, up to ``outer_radius``."""
    return np.arange(inner_radius, outer_radius + 1, ring_step)


def ring_lengths(radii):
    """Number of samples on each ring: the power of two above ``int(2 pi r + 0.5)`` (SPEC section 3).

    The doubling that the SPEC names for a ring too long for its power of two never applies: the power is already
    the next one above 2 pi r.

    Parameters
    ----------
    radii : (n_rings,) int array, px

    Returns
    -------
    (n_rings,) int64
    """
    return np.array([1 << int(2 * np.pi * r + 0.5).bit_length() for r in radii], np.int64)


def largest_outer_radius(box):
    """The largest ``ou`` in px with ``ou < n/2 - 1``."""
    return (box - 3) // 2


def default_outer_radius(box):
    """The last ring where ``ou=-1`` is given: ``n//2 - 2`` px."""
    return box // 2 - 2


def disc(box, radius):
    """``(box, box)`` bool: the pixels at most ``radius`` px from the centre."""
    d = np.arange(box) - box // 2
    return d[:, None] ** 2 + d[None, :] ** 2 <= radius**2


def mean_shift(poses):
    """Mean (sx, sy) of a class, (2,) px, sx negated for its mirrored members (SPEC section 5, ``center=-1``)."""
    sign = np.where(poses["mirror"] != 0, -1.0, 1.0)
    return np.array([(sign * poses["sx"]).mean(), poses["sy"].mean()])


def inverse_shift(poses):
    """``h = -R(alpha)^T (sx, sy)`` in px, about which the particle's rings are sampled (SPEC section 4).

    Parameters
    ----------
    poses : (n,) POSE
        Their mirror is ignored.

    Returns
    -------
    (n, 2) float64
        x, y.
    """
    a = np.deg2rad(poses["alpha"])
    c, s = np.cos(a), np.sin(a)
    return np.stack([-(c * poses["sx"] - s * poses["sy"]), -(s * poses["sx"] + c * poses["sy"])], axis=-1)


def search_range(half_range, centre_shift, box, outer_radius):
    """How far the translation search may go each way before the disc leaves the image (SPEC section 4).

    Parameters
    ----------
    half_range : float, px
        xr or yr as asked for.
    centre_shift : float or (n,) array, px
        One component of :func:`inverse_shift`.
    box, outer_radius : int, px

    Returns
    -------
    left, right : float or (n,) arrays, px
        Distances, never negative.
    """
    cn = box // 2 + 1
    left = np.minimum(half_range, np.maximum(0.0, cn + centre_shift - outer_radius - 2))
    right = np.minimum(half_range, np.maximum(0.0, box - cn - centre_shift - outer_radius))
    return left, right


def check_rings(box, inner_radius, outer_radius, ring_step):
    """Raise InputError unless the rings lie inside the image: 0 < ir <= ou < n/2 - 1, rs >= 1."""
    largest = largest_outer_radius(box)
    if not 0 < outer_radius <= largest:
        raise InputError(f"ou={outer_radius} does not fit a {box}-pixel image: give 1 to {largest} "
                         f"(below n/2 - 1), or -1 for n//2 - 2")
    if not 0 < inner_radius <= outer_radius:
        raise InputError(f"ir={inner_radius} is not allowed: give 1 to ou={outer_radius}")
    if ring_step < 1:
        raise InputError(f"rs={ring_step} is not allowed: give a whole number of at least 1")
