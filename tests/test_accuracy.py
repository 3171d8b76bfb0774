"""Comparing with the truth: exact answers for exact inputs, known errors found again."""

import math

import numpy as np
import pytest

from mrefali.accuracy import adjusted_rand, common_transform, compare, match_classes
from mrefali.errors import InputError
from mrefali.geometry import compose, identity_poses, make_poses


def random_poses(n, rng):
    sx, sy = rng.uniform(-3, 3, (2, n))
    return make_poses(rng.uniform(0, 360, n), sx, sy, rng.integers(2, size=n))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture
def truth(rng):
    """Classes and poses of 600 particles of 3 views."""
    return rng.permutation(np.repeat(np.arange(3), [300, 200, 100])), random_poses(600, rng)


#: How each of three averages stands against its view: rotated over 0, mirrored, shifted.
STANDS = make_poses([359.5, 120.0, 0.5], [2.0, -1.0, 0.0], [-0.5, 3.0, 0.25], [0, 1, 1])


def test_the_truth_itself_has_no_error(truth):
    classes, poses = truth
    result = compare(classes, poses, classes, poses, 3, 3)
    assert (result.matching, result.class_share, result.mirror_share) == ("one-to-one", 1.0, 1.0)
    np.testing.assert_array_equal(result.view_of_class, [0, 1, 2])
    assert result.right_class.all()
    assert max(result.angle_error_rms, result.shift_error_rms) < 1e-9


def test_a_common_rigid_transform_of_a_class_is_no_error(truth):
    classes, poses = truth
    result = compare(classes, compose(poses, STANDS[classes]), classes, poses, 3, 3)
    assert (result.class_share, result.mirror_share) == (1.0, 1.0)
    for error in (result.angle_error_median, result.angle_error_rms,
                  result.shift_error_median, result.shift_error_rms):
        assert error < 1e-9
    for name in ("alpha", "sx", "sy", "mirror"):
        np.testing.assert_allclose(result.common[name], STANDS[name], atol=1e-9)


def test_permuted_classes_are_matched(truth):
    classes, poses = truth
    class_of_view = np.array([2, 0, 1])
    result = compare(class_of_view[classes], compose(poses, STANDS[classes]), classes, poses, 3, 3)
    np.testing.assert_array_equal(result.view_of_class, [1, 2, 0])
    assert result.class_share == 1.0
    assert result.angle_error_rms < 1e-9
    np.testing.assert_allclose(result.common["alpha"], STANDS["alpha"][[1, 2, 0]], atol=1e-9)


def test_the_matching_is_one_to_one_where_majorities_would_share_a_view():
    # both classes are mostly of view 0: 6 + 3 particles by the best matching, not 6 + 4
    assign = np.repeat([0, 0, 1, 1], [6, 1, 4, 3])
    classes = np.repeat([0, 1, 0, 1], [6, 1, 4, 3])
    result = compare(assign, identity_poses(14), classes, identity_poses(14), 2, 2)
    np.testing.assert_array_equal(result.view_of_class, [0, 1])
    assert result.class_share == pytest.approx(9 / 14)


def test_the_best_matching_is_not_the_greedy_one():
    # greedy: 5 of class 0 for view 0, then 0; best: 4 + 4
    assign = np.repeat([0, 0, 1], [5, 4, 4])
    classes = np.repeat([0, 1, 0], [5, 4, 4])
    view_of_class, matching = match_classes(assign, classes, 2, 2)
    np.testing.assert_array_equal(view_of_class, [1, 0])
    assert matching == "one-to-one"


def test_more_classes_than_views_go_by_majority_and_an_empty_class_has_no_view():
    assign = np.repeat([0, 1, 1, 3], [3, 2, 1, 4])
    classes = np.repeat([0, 0, 1, 1], [3, 2, 1, 4])
    result = compare(assign, identity_poses(10), classes, identity_poses(10), 4, 2)
    assert result.matching == "majority"
    np.testing.assert_array_equal(result.view_of_class, [0, 0, -1, 1])
    assert result.class_share == pytest.approx(0.9)
    np.testing.assert_array_equal(result.common, identity_poses(4))


def test_fewer_classes_than_views_leave_views_out():
    classes = np.repeat([0, 1, 2], [2, 3, 5])
    result = compare(np.zeros(10, int), identity_poses(10), classes, identity_poses(10), 1, 3)
    assert result.matching == "one-to-one"
    np.testing.assert_array_equal(result.view_of_class, [2])
    assert result.class_share == 0.5


def test_a_known_perturbation_is_found_again(truth, rng):
    classes, poses = truth
    angle, shift = rng.normal(0, 2.0, 600), rng.normal(0, 0.3, (2, 600))
    found = compose(compose(poses, make_poses(angle, *shift)), STANDS[classes])
    result = compare(classes, found, classes, poses, 3, 3)
    # A class's median is off by d = 1.25 sigma / sqrt(n), its mean by m = sigma / sqrt(n); to take the median
    # out changes the mean square by d^2 - 2 d m. At 3.5 times each, that is 50 sigma^2 / n in a class, over
    # three classes of 600 particles 0.25 sigma^2: 12 % of the rms.
    tolerance = 0.12
    assert result.angle_error_rms == pytest.approx(np.sqrt(np.mean(angle**2)), rel=tolerance)
    assert result.angle_error_median == pytest.approx(np.median(np.abs(angle)), rel=tolerance)
    assert result.shift_error_rms == pytest.approx(np.sqrt(np.mean((shift**2).sum(axis=0))), rel=tolerance)
    assert result.shift_error_median == pytest.approx(np.median(np.hypot(*shift)), rel=tolerance)


def test_the_shift_error_is_taken_at_the_centre_of_the_view(truth, rng):
    classes, poses = truth
    found = compose(compose(poses, make_poses(rng.normal(0, 5.0, 600))), STANDS[classes])
    result = compare(classes, found, classes, poses, 3, 3)
    assert result.angle_error_rms > 4
    assert result.shift_error_rms < 1e-9  # turned about its own centre, however far off the average stands


def test_errors_of_one_size_come_back_as_that_size(truth):
    classes, poses = truth
    sign = np.where(np.arange(600) % 2, 1.0, -1.0)
    # half of each class one way, half the other, and two in the middle that fix the medians
    classes = np.sort(classes)
    sign[[0, 1, 300, 301, 500, 501]] = 0.0
    found = compose(poses, make_poses(3.0 * sign, 0.0, 0.4 * sign))
    result = compare(classes, found, classes, poses, 3, 3)
    assert result.angle_error_median == pytest.approx(3.0, abs=1e-9)
    assert result.shift_error_median == pytest.approx(0.4, abs=1e-9)
    assert result.angle_error_rms == pytest.approx(3.0 * math.sqrt(594 / 600), abs=1e-9)
    assert result.shift_error_rms == pytest.approx(0.4 * math.sqrt(594 / 600), abs=1e-9)


def test_a_wrong_mirror_counts_in_its_share_alone(truth):
    classes, poses = truth
    wrong = np.arange(600) % 5 == 0
    found = compose(poses, STANDS[classes])
    found[wrong] = compose(found[wrong], make_poses(50.0, 1.0, 1.0, 1))
    result = compare(classes, found, classes, poses, 3, 3)
    assert result.class_share == 1.0
    assert result.mirror_share == pytest.approx(0.8)
    assert result.angle_error_rms < 1e-9
    assert result.shift_error_rms < 1e-9


def test_a_wrong_class_counts_in_its_share_alone(truth, rng):
    classes, poses = truth
    wrong = np.arange(600) % 4 == 0
    assign, found = np.where(wrong, (classes + 1) % 3, classes), compose(poses, STANDS[classes])
    found[wrong] = random_poses(150, rng)
    result = compare(assign, found, classes, poses, 3, 3)
    assert result.class_share == pytest.approx(0.75)
    np.testing.assert_array_equal(result.right_class, ~wrong)
    assert result.mirror_share == 1.0
    assert result.angle_error_rms < 1e-9


def test_gross_errors_do_not_move_the_common_transform(truth, rng):
    classes, poses = truth
    found = compose(poses, STANDS[classes])
    gross = rng.permutation(600)[:180]
    found[gross] = random_poses(180, rng)
    result = compare(classes, found, classes, poses, 3, 3)
    assert result.angle_error_median < 1e-9
    assert result.shift_error_median < 1e-9
    np.testing.assert_allclose(result.common["sx"], STANDS["sx"], atol=1e-9)
    np.testing.assert_array_equal(result.common["mirror"], STANDS["mirror"])
    is_gross = np.isin(np.arange(600), gross)
    assert not result.gross[~is_gross].any()
    # a random mirror is wrong half the time; an angle is within 20 of 180 degrees one time in nine
    assert np.isnan(result.angle_error[is_gross]).sum() == pytest.approx(90, abs=4 * math.sqrt(45))
    assert result.gross.sum() == pytest.approx(80, abs=4 * math.sqrt(45))
    assert result.gross_share == result.gross.sum() / np.isfinite(result.angle_error).sum()
    assert result.angle_error_rms < 20


def test_an_angle_error_is_the_short_way_round():
    poses = make_poses(np.array([0.0, 0.0, 0.0]))
    result = compare(np.zeros(3, int), make_poses(np.array([359.0, 0.0, 1.0])), np.zeros(3, int), poses, 1, 1)
    assert result.angle_error_rms == pytest.approx(math.sqrt(2 / 3), abs=1e-9)


def test_equal_mirrors_are_taken_as_none():
    assert common_transform(make_poses(10.0, 1.0, 2.0, np.array([0, 1]))) == make_poses(10.0, 1.0, 2.0, 0)


def test_a_single_particle_is_right_in_the_class_that_has_it():
    found = make_poses(np.array([40.0]), 1.0, 2.0, 1)
    result = compare(np.array([0]), found, np.array([1]), identity_poses(1), 2, 2)
    np.testing.assert_array_equal(result.view_of_class, [1, 0])
    assert (result.class_share, result.mirror_share) == (1.0, 1.0)
    assert result.angle_error_rms == pytest.approx(0.0, abs=1e-9)


def test_junk_counts_nowhere(truth, rng):
    classes, poses = truth
    assign, found = classes.copy(), compose(poses, STANDS[classes])
    junk = np.arange(600) % 3 == 0
    assign[junk], found[junk] = rng.integers(3, size=200), random_poses(200, rng)
    result = compare(assign, found, np.where(junk, -1, classes), poses, 3, 3)
    assert (result.class_share, result.mirror_share, result.gross_share, result.adjusted_rand) == (1, 1, 0, 1)
    np.testing.assert_array_equal(result.right_class, ~junk)
    assert result.angle_error_rms < 1e-9


def test_only_junk_is_refused():
    with pytest.raises(InputError, match="give at least one particle that shows a view"):
        compare(np.array([0]), identity_poses(1), np.array([-1]), identity_poses(1), 1, 1)


@pytest.mark.parametrize(("counts", "expected"), [
    ([[5, 0], [0, 4]], 1.0),
    ([[0, 5], [4, 0]], 1.0),
    ([[7]], 1.0),
    # 4 pairs together; 6 and 7 pairs in rows and columns of 15: (4 - 2.8) / (6.5 - 2.8)
    ([[3, 0], [1, 2]], 1.2 / 3.7),
    # both of two equal parts, met evenly: 2 pairs of 6 - (2 * 2 / 6), below chance
    ([[1, 1], [1, 1]], -0.5),
])
def test_the_adjusted_rand_index(counts, expected):
    assert adjusted_rand(np.array(counts)) == pytest.approx(expected)


def test_the_adjusted_rand_index_of_chance_is_zero(rng):
    values = []
    for _ in range(200):
        counts = np.zeros((4, 3), int)
        np.add.at(counts, (rng.integers(4, size=300), rng.integers(3, size=300)), 1)
        values.append(adjusted_rand(counts))
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(200))


def test_nothing_to_compare_is_refused():
    nobody = np.empty(0, int)
    with pytest.raises(InputError, match="assign is empty: give at least one particle"):
        compare(nobody, identity_poses(0), nobody, identity_poses(0), 2, 2)


def test_inputs_are_left_as_they_are(truth):
    classes, poses = truth
    before = classes.copy(), poses.copy()
    compare(classes, poses, classes, poses, 3, 3)
    np.testing.assert_array_equal(classes, before[0])
    np.testing.assert_array_equal(poses, before[1])


@pytest.mark.parametrize(("changes", "message"), [
    ({"assign": [0, 1]}, "have 2, 3, 3 and 3 entries: give one a particle in each"),
    ({"truth_poses": identity_poses(4)}, "have 3, 3, 3 and 4 entries"),
    ({"assign": [0, 1, 2]}, r"assign\[2\]=2 is not allowed: give 0 to 1"),
    ({"assign": [0, -1, 1]}, r"assign\[1\]=-1 is not allowed: give 0 to 1"),
    ({"classes": [5, 0, 0]}, r"classes\[0\]=5 is not allowed: give -1 to 2"),
    ({"assign": [0.0, 1.0, 1.0]}, "assign has the type float64: give whole numbers"),
    ({"poses": np.zeros(3)}, "poses has the type float64: give geometry.POSE"),
    ({"truth_poses": np.zeros(3)}, "truth_poses has the type float64: give geometry.POSE"),
])
def test_a_bad_argument_is_named(changes, message):
    good = {"assign": [0, 1, 1], "poses": identity_poses(3), "classes": [0, 1, 2],
            "truth_poses": identity_poses(3), "n_classes": 2, "n_views": 3}
    with pytest.raises(InputError, match=message):
        compare(**(good | changes))
