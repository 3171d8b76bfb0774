"""RELION's conventions: sentences, numbers, and what a reader of all its angles sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrefali import ctf as ours
from mrefali import geometry
from mrefali.geometry import make_poses, to_matrices
from mrefali.io import relion

POSES = [(30, 2, -1, 0), (30, 2, -1, 1)]


def test_golden_vector_without_mirror():
    found = relion.to_angles(make_poses([30], 2, -1, 0))
    assert [found[name][0] for name in ("rot", "tilt", "psi")] == [0, 0, -30]
    assert [found["origin_x"][0], found["origin_y"][0]] == pytest.approx([2.2321, 0.1340], abs=5e-5)


def test_golden_vector_with_mirror():
    found = relion.to_angles(make_poses([30], 2, -1, 1))
    assert [found[name][0] for name in ("rot", "tilt", "psi")] == [180, 180, 150]
    assert [found["origin_x"][0], found["origin_y"][0]] == pytest.approx([2.2321, 0.1340], abs=5e-5)


def test_golden_vector_of_the_inverse():
    assert geometry.invert(make_poses([30], 2, -1, 1)).tolist()[0] == pytest.approx((30, 2.2321, -0.1340, 1), abs=5e-5)


def euler(rot, tilt, psi):
    """Carries a point of the object into the image, as RELION's three angles do (turns about z, y and z again)."""
    def about_z(angle):
        c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    return about_z(psi) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) @ about_z(rot)


@pytest.mark.parametrize("pose", [*POSES, (200, -3, 0.5, 1), (0, 0, 0, 1), (359, 4, 4, 0)])
def test_a_reader_of_all_angles_sees_the_same_geometry(pose):
    """A point x of the particle with the shift, x + o, is the projection of its place in the reference."""
    poses = make_poses(*([value] for value in pose))
    found = {name: values[0] for name, values in relion.to_angles(poses).items()}
    x = np.array([3.0, -5.0])
    x_ref = to_matrices(poses)[0] @ [*x, 0, 1]
    projected = euler(found["rot"], found["tilt"], found["psi"]) @ [*x_ref[:2], 0]
    np.testing.assert_allclose(projected[:2], x + [found["origin_x"], found["origin_y"]], rtol=0, atol=1e-12)


@given(st.lists(st.tuples(st.floats(0, 359.99), st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 1)), min_size=1,
                max_size=5))
def test_there_and_back_changes_nothing(rows):
    poses = make_poses(*np.array(rows).T)
    found = relion.to_angles(poses)
    back = relion.from_angles(found["psi"], found["origin_x"], found["origin_y"], found["rot"], found["tilt"])
    np.testing.assert_allclose(to_matrices(back), to_matrices(poses), rtol=0, atol=1e-9)


def test_rot_turns_in_the_plane_where_tilt_is_0_or_180():
    found = relion.from_angles(np.array([20.0, 20.0]), np.zeros(2), np.zeros(2), np.array([50.0, 50.0]),
                               np.array([0.0, 180.0]))
    assert found["alpha"] == pytest.approx([290, 30])
    assert found["mirror"].tolist() == [0, 1]
    for pose, tilt in zip(found, (0, 180), strict=True):
        np.testing.assert_allclose(np.linalg.inv(to_matrices(pose)[:2, :2]), euler(50, tilt, 20)[:2, :2], atol=1e-12)


def test_of_a_view_in_space_psi_alone_is_the_pose():
    found = relion.from_angles(np.array([20.0, 30.0]), np.zeros(2), np.zeros(2), np.array([50.0, 0]),
                               np.array([82.0, 0]))
    assert found["alpha"] == pytest.approx([340, 330])
    assert not relion.is_flat(np.array([82.0, 0]))
    assert relion.is_flat(np.array([0.0, 180, -180, 360]))


# ---- CTF

K = np.linspace(0.001, 0.12, 40)


def relion_ctf(u, v, angle, voltage, cs, contrast, phase_shift, azimuth):
    """The CTF by RELION's parameters at frequencies K along an azimuth, the first defocus lying along ``angle``."""
    wavelength = ours.wavelength_A(voltage)
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * np.deg2rad(azimuth - angle))
    phase = np.pi * wavelength * K**2 * (defocus - 0.5e7 * cs * wavelength**2 * K**2)
    return np.sin(phase + np.arcsin(contrast) + np.deg2rad(phase_shift))


def our_ctf(parameters, azimuth):
    """SPEC section 7 along an azimuth."""
    p = parameters
    dz = p["defocus_um"] - p["dfdiff_um"] / 2 * np.sin(2 * np.deg2rad(azimuth + p["dfang_deg"]))
    wavelength = ours.wavelength_A(p["voltage_kV"])
    phase = np.pi * (dz * 1e4 * wavelength * K**2 - p["cs_mm"] * 1e7 * wavelength**3 * K**4 / 2)
    return np.sin(phase + np.arcsin(p["ampcont_percent"] / 100) + np.deg2rad(p["phase_shift_deg"]))


@pytest.mark.parametrize("azimuth", [0, 10, 55, 90, 130])
def test_relions_ctf_is_ours(azimuth):
    given = (21000.0, 19000.0, 35.0, 300.0, 2.7, 0.1)
    parameters, = relion.make_ctf(*(np.array([value]) for value in given), 1.5, phase_shift=np.array([25.0]))
    np.testing.assert_allclose(our_ctf(parameters, azimuth), relion_ctf(*given, 25.0, azimuth), rtol=0, atol=1e-9)


@pytest.mark.parametrize("azimuth", [0, 30, 75, 140])
@pytest.mark.parametrize("dfdiff", [-0.3, 0.0, 0.3])
def test_our_ctf_is_relions(azimuth, dfdiff):
    """Also where dfdiff is above zero, and the larger defocus lies a quarter turn from 45 - dfang."""
    parameters = ours.parse_ctf(f"E2 {dfdiff} 72 0 10 300 2 1.5")
    u, v, angle = relion.to_defoci(parameters)
    assert u >= v
    np.testing.assert_allclose(relion_ctf(u, v, angle, 300, 2, 0.1, 0, azimuth), our_ctf(parameters, azimuth), rtol=0,
                               atol=1e-9)


def test_the_numbers_of_a_ctf():
    """U + V = 20000 dz, U - V = |10000 dfdiff|, angle = 45 - dfang, amplitude contrast = ampcont / 100."""
    found, = relion.make_ctf(*(np.array([value]) for value in (21000.0, 19000.0, 35.0, 300.0, 2.7, 0.1)), 1.5)
    assert found.item() == pytest.approx((2, -0.2, 10, 0, 10, 300, 2.7, 1.5, 0))
    assert relion.to_defoci(found) == pytest.approx((21000, 19000, 35))
