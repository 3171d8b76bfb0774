"""Conventions of pose and ring: sentences and numbers first, then properties."""

import hypothesis.strategies as st
import naive
import numpy as np
import pytest
from hypothesis import given

from mrefali.average import transform
from mrefali.errors import InputError
from mrefali.geometry import (
    check_rings,
    compose,
    default_outer_radius,
    disc,
    from_matrices,
    identity_poses,
    inverse_shift,
    invert,
    largest_outer_radius,
    make_poses,
    ring_lengths,
    ring_radii,
    search_range,
    shifted,
    to_matrices,
    wrap_degrees,
)

# px and degrees: a few ulp of numbers up to 360 and 100, times the handful of products behind each
EXACT = dict(rtol=0, atol=1e-10)


@pytest.fixture(params=[32, 33])
def box(request):
    return request.param


def spot(box, x, y):
    """An image with one bright pixel at (x, y) about the centre, as a stack of one."""
    image = np.zeros((1, box, box), np.float32)
    image[0, box // 2 + y, box // 2 + x] = 1
    return image


def where_it_goes(box, pose, x, y):
    """Place about the centre, in px, of the brightest pixel after a spot at (x, y) has been moved by ``pose``."""
    row, column = np.unravel_index(transform(spot(box, x, y), make_poses(*pose)[None])[0].argmax(), (box, box))
    return column - box // 2, row - box // 2


# --- what a pose does to an image


def test_alpha_90_carries_plus_y_to_plus_x(box):
    assert where_it_goes(box, (90, 0, 0, 0), 0, 5) == (5, 0)


def test_alpha_90_carries_plus_x_to_minus_y(box):
    assert where_it_goes(box, (90, 0, 0, 0), 5, 0) == (0, -5)


def test_sx_carries_to_plus_x_and_sy_to_plus_y(box):
    assert where_it_goes(box, (0, 3, 0, 0), 0, 0) == (3, 0)
    assert where_it_goes(box, (0, 0, 2, 0), 0, 0) == (0, 2)


def test_mirror_flips_x_about_the_centre_pixel(box):
    assert where_it_goes(box, (0, 0, 0, 1), 4, 7) == (-4, 7)
    assert where_it_goes(box, (0, 0, 0, 1), 0, 7) == (0, 7)


def test_a_pose_rotates_then_shifts_then_mirrors(box):
    # (0, 5) is rotated to (5, 0), shifted to (7, 1), mirrored to (-7, 1)
    assert where_it_goes(box, (90, 2, 1, 1), 0, 5) == (-7, 1)


def test_the_centre_pixel_stays_when_an_image_is_rotated(box):
    for alpha in (0, 30, 90, 180, 270, 301):
        assert where_it_goes(box, (alpha, 0, 0, 0), 0, 0) == (0, 0)


def test_the_identity_moves_nothing(box):
    images = np.random.default_rng(1).normal(size=(2, box, box)).astype(np.float32)
    np.testing.assert_array_equal(transform(images, identity_poses(2)), images)


# --- numbers


def test_golden_vector_of_the_inverse():
    inverse = invert(make_poses(30, 2, -1, 1))
    assert inverse["alpha"] == pytest.approx(30)
    assert (inverse["sx"], inverse["sy"]) == pytest.approx((2.2321, -0.1340), abs=5e-5)
    assert inverse["mirror"] == 1


@pytest.mark.parametrize("mirror", [0, 1])
def test_golden_vector_of_the_inverse_shift_ignores_the_mirror(mirror):
    # the origin shift of other programs, o = R(alpha)^T t, is its negative
    assert -inverse_shift(make_poses(30, 2, -1, mirror)) == pytest.approx((2.2321, 0.1340), abs=5e-5)


def test_golden_vector_of_the_stored_matrix():
    # alpha=33, t=(3,-5), mirror=1, as dumped from a file that EMAN2 wrote
    expected = [[-0.8387, -0.5446, 0, -3], [-0.5446, 0.8387, 0, -5], [0, 0, 1, 0]]
    np.testing.assert_allclose(to_matrices(make_poses(33, 3, -5, 1)), expected, rtol=0, atol=5e-5)


def test_composition_with_an_unmirrored_first_adds_the_angles():
    # alpha1 + alpha2, R(alpha2) t1 + t2, mirror of the second
    done = compose(make_poses(20, 1, 0, 0), make_poses(90, 5, 7, 1))
    assert done.tolist() == pytest.approx((110, 5, 6, 1))


def test_composition_with_a_mirrored_first_subtracts_the_angles():
    # alpha1 - alpha2, R(-alpha2) t1 + M t2, the other mirror
    done = compose(make_poses(20, 1, 0, 1), make_poses(90, 5, 7, 1))
    assert done.tolist() == pytest.approx((290, -5, 8, 0))


def test_a_shift_after_a_pose_is_a_composition():
    poses, shifts = make_poses([30.0, 30, 75], 1, 2, [0, 1, 0]), np.array([[0.5, -2], [0.5, -2], [0, 0]])
    moved = shifted(poses, shifts)
    assert moved.tolist() == compose(poses, make_poses(0, *shifts.T)).tolist()
    assert moved[1]["sx"] == 0.5  # a mirrored particle shifts the other way
    assert moved[2].tolist() == poses[2].tolist()


def test_make_poses_broadcasts():
    assert make_poses([10, 20], 1.0, 2.0, 1).tolist() == [(10, 1, 2, 1), (20, 1, 2, 1)]
    assert make_poses(10).shape == ()
    assert identity_poses(2).tolist() == [(0, 0, 0, 0)] * 2


# --- properties

lengths_px = st.floats(-100, 100)
poses = st.builds(make_poses, st.floats(-720, 720), lengths_px, lengths_px, st.integers(0, 1))


def homogeneous(pose):
    """The 3x3 matrix of the plane inside the stored 3x4 one."""
    matrix = to_matrices(pose)
    return np.vstack([matrix[:2][:, [0, 1, 3]], [0, 0, 1]])


@given(poses)
def test_the_matrix_is_that_of_the_slow_twin(pose):
    np.testing.assert_allclose(homogeneous(pose), naive.pose_matrix(pose), **EXACT)


@given(poses, poses)
def test_compose_is_the_product_of_the_matrices(first, second):
    np.testing.assert_allclose(
        homogeneous(compose(first, second)), homogeneous(second) @ homogeneous(first), **EXACT)


@given(poses)
def test_a_pose_and_its_inverse_are_the_identity_both_ways(pose):
    for done in (compose(pose, invert(pose)), compose(invert(pose), pose)):
        np.testing.assert_allclose(homogeneous(done), np.eye(3), **EXACT)
        assert done["mirror"] == 0


@given(poses)
def test_a_pose_survives_its_matrix(pose):
    back = from_matrices(to_matrices(pose))
    assert back["mirror"] == pose["mirror"]
    assert 0 <= back["alpha"] < 360
    np.testing.assert_allclose(to_matrices(back), to_matrices(pose), **EXACT)


@given(poses)
def test_the_inverse_shift_is_the_shift_of_the_inverse_without_the_mirror(pose):
    _, sx, sy, _ = invert(make_poses(pose["alpha"], pose["sx"], pose["sy"], 0)).tolist()
    assert inverse_shift(pose) == pytest.approx((sx, sy), abs=1e-10)


@given(st.lists(st.tuples(poses, poses), min_size=1, max_size=4))
def test_arrays_are_composed_and_inverted_pose_by_pose(pairs):
    first, second = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assert compose(first, second).tolist() == [compose(a, b).tolist() for a, b in pairs]
    assert invert(first).tolist() == [invert(a).tolist() for a, _ in pairs]
    assert from_matrices(to_matrices(first)).tolist() == [from_matrices(to_matrices(a)).tolist() for a, _ in pairs]


@given(st.floats(-1e6, 1e6))
def test_wrapped_angles_lie_in_one_turn(alpha):
    assert 0 <= wrap_degrees(alpha) < 360
    turns = (alpha - wrap_degrees(alpha)) / 360
    assert turns == pytest.approx(np.rint(turns), abs=1e-9)


def test_a_tiny_negative_angle_wraps_to_0_not_to_360():
    assert wrap_degrees(-1e-20) == 0


# --- rings


def test_ring_radii_go_from_the_first_in_steps_and_stop_at_the_last():
    assert ring_radii(1, 5, 1).tolist() == [1, 2, 3, 4, 5]
    assert ring_radii(2, 24, 2).tolist() == list(range(2, 25, 2))
    assert ring_radii(2, 7, 2).tolist() == [2, 4, 6]
    assert ring_radii(3, 3, 4).tolist() == [3]


@pytest.mark.parametrize(("radius", "length"), [(1, 8), (2, 16), (3, 32), (5, 32), (6, 64), (27, 256), (41, 512)])
def test_ring_lengths_in_numbers(radius, length):
    # radius 5: int(2 pi 5 + 0.5) = 31, below 32; radius 41: int(2 pi 41 + 0.5) = 258, above 256
    assert ring_lengths([radius]).tolist() == [length]


def test_ring_lengths_are_those_of_the_slow_twin_and_never_fewer_than_the_pixels():
    radii, lengths = naive.rings(1, 2000, 1)
    assert ring_lengths(radii).tolist() == lengths
    assert (lengths >= 2 * np.pi * np.array(radii)).all()


@pytest.mark.parametrize("box", range(5, 70))
def test_the_largest_radius_is_the_last_below_half_the_box_less_1(box):
    largest = largest_outer_radius(box)
    assert largest < box / 2 - 1 <= largest + 1
    assert default_outer_radius(box) <= largest


def test_the_disc_holds_the_pixels_at_most_its_radius_from_the_centre():
    for box in (16, 17):
        inside = disc(box, 3)
        assert inside.sum() == 29  # lattice points with x^2 + y^2 <= 9
        assert inside[box // 2, box // 2 + 3]
        assert not inside[box // 2 + 1, box // 2 + 3]


@pytest.mark.parametrize(("rings", "message"), [
    ((64, 1, 31, 1), r"ou=31 does not fit a 64-pixel image: give 1 to 30 "),
    ((65, 1, 32, 1), r"ou=32 does not fit a 65-pixel image: give 1 to 31 "),
    ((64, 1, 0, 1), r"ou=0 does not fit a 64-pixel image"),
    ((64, 28, 27, 1), r"ir=28 is not allowed: give 1 to ou=27"),
    ((64, 0, 27, 1), r"ir=0 is not allowed: give 1 to ou=27"),
    ((64, 1, 27, 0), r"rs=0 is not allowed: give a whole number of at least 1"),
])
def test_rings_that_do_not_fit_are_refused(rings, message):
    with pytest.raises(InputError, match=message):
        check_rings(*rings)


@pytest.mark.parametrize("box", [64, 65])
def test_the_largest_rings_are_accepted(box):
    assert check_rings(box, 1, largest_outer_radius(box), 1) is None


# --- how far the search may go


@pytest.mark.parametrize(("box", "outer_radius", "expected"), [
    (64, 27, (3, 3)),
    (64, 30, (1, 1)),  # the original's default: +-1 whatever is asked for
    (65, 30, (1, 2)),  # an odd box has one pixel more on the right
    (65, 31, (0, 1)),
])
def test_search_ranges_in_numbers(box, outer_radius, expected):
    assert search_range(3, 0.0, box, outer_radius) == expected


def test_a_particle_off_centre_has_less_room_on_that_side_and_never_more_than_asked_for():
    assert search_range(3, 2.5, 64, 27) == (3, 1.5)
    assert search_range(3, -2.5, 64, 27) == (1.5, 3)
    left, right = search_range(3, np.array([2.5, -2.5, 9]), 64, 27)
    assert (left.tolist(), right.tolist()) == ([3, 1.5, 3], [1.5, 3, 0])


@given(st.integers(16, 80), st.integers(0, 30), st.floats(-1, 1), st.floats(0, 50))
def test_within_the_range_the_rings_never_leave_the_image(box, margin, place, half_range):
    outer_radius = max(1, largest_outer_radius(box) - margin)
    h = place * (box // 2 + 1 - outer_radius - 2)  # beyond that the particle is reset
    left, right = search_range(half_range, h, box, outer_radius)
    assert 0 <= left <= half_range
    assert 0 <= right <= half_range
    assert box // 2 + h - left - outer_radius >= 1 - 1e-9
    assert box // 2 + h + right + outer_radius <= box - 1 + 1e-9
