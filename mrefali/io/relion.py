"""RELION's conventions of pose and CTF beside ours, on arrays. Imports ctf and geometry of ours only.

RELION shifts first and turns then, x_ref = Q(psi) (x + o) with Q = [[cos, -sin], [sin, cos]]; so psi = -alpha and
o = R(alpha)^T (sx, sy). It has no mirror: rot = 180, tilt = 180, psi = 180 - alpha with the same o is the same geometry
for readers of all three angles.
"""

import numpy as np

from mrefali.ctf import CTF_PARAMETERS
from mrefali.geometry import make_poses, wrap_degrees

#: Angles that differ by less, in degrees, are the same.
SAME_ANGLE_DEG = 1e-3


def from_angles(psi, origin_x, origin_y, rot=0.0, tilt=0.0):
    """Poses from RELION's angles and origins.

    Parameters
    ----------
    psi, rot, tilt : (n,) array or float, degrees
        Where every tilt is 0 or 180, ``rot`` turns in the plane, and 180 mirrors. Any other tilt is the view of a
        three-dimensional object, of which ``psi`` alone is the pose in its plane.
    origin_x, origin_y : (n,) array, px

    Returns
    -------
    (n,) POSE
    """
    if is_flat(tilt):
        mirror = np.abs(_signed(tilt)) > 90
        alpha = np.where(mirror, rot - psi, -psi - rot)
    else:
        mirror, alpha = 0, -psi
    a = np.deg2rad(alpha)
    c, s = np.cos(a), np.sin(a)
    return make_poses(wrap_degrees(alpha), c * origin_x + s * origin_y, c * origin_y - s * origin_x, mirror)


def is_flat(tilt):
    """Whether all of ``tilt``, in degrees, are 0 or 180: poses in the plane."""
    off = np.abs(_signed(tilt))
    return bool((np.minimum(off, 180 - off) < SAME_ANGLE_DEG).all())


def to_angles(poses):
    """RELION's angles and origins of poses.

    Parameters
    ----------
    poses : (n,) POSE

    Returns
    -------
    dict of str to (n,) float64
        rot, tilt, psi in degrees, psi within -180 to 180; origin_x, origin_y in px.
    """
    mirrored = poses["mirror"] != 0
    a = np.deg2rad(poses["alpha"])
    c, s = np.cos(a), np.sin(a)
    half_turn = np.where(mirrored, 180.0, 0.0)
    return {"rot": half_turn, "tilt": half_turn, "psi": _signed(half_turn - poses["alpha"]),
            "origin_x": c * poses["sx"] - s * poses["sy"], "origin_y": s * poses["sx"] + c * poses["sy"]}


def from_defoci(u, v, angle):
    """``defocus_um, dfdiff_um, dfang_deg`` of RELION's two defoci in Angstrom and the first's azimuth in degrees."""
    return (u + v) / 2e4, (v - u) / 1e4, 45.0 - angle


def to_defoci(parameters):
    """RELION's ``u, v, angle`` of ``(n,) CTF_PARAMETERS``: larger and smaller defocus in Angstrom, azimuth in degrees.

    EMAN2's dfdiff may have either sign, and what is the larger defocus for one is the smaller for the other; so the
    azimuth is 45 - dfang below zero, and a quarter turn from there above.
    """
    mean, difference = 1e4 * parameters["defocus_um"], 1e4 * np.abs(parameters["dfdiff_um"])
    angle = 45.0 - parameters["dfang_deg"] + np.where(parameters["dfdiff_um"] > 0, 90.0, 0.0)
    return mean + difference / 2, mean - difference / 2, np.mod(angle, 180.0)


def make_ctf(u, v, angle, voltage, cs, contrast, pixel_size_A, phase_shift=0.0, bfactor=0.0):
    """``(n,) CTF_PARAMETERS`` in the words of RELION: defoci in Angstrom, contrast a fraction, angles in degrees."""
    parameters = np.zeros(len(u), CTF_PARAMETERS)
    parameters["defocus_um"], parameters["dfdiff_um"], parameters["dfang_deg"] = from_defoci(u, v, angle)
    parameters["voltage_kV"], parameters["cs_mm"], parameters["ampcont_percent"] = voltage, cs, 100 * contrast
    parameters["pixel_size_A"], parameters["phase_shift_deg"] = pixel_size_A, phase_shift
    parameters["bfactor_A2"] = bfactor
    return parameters


def _signed(degrees):
    """``degrees`` carried into (-180, 180]."""
    return 180.0 - np.mod(180.0 - degrees, 360.0)
