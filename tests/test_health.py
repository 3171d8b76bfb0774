"""Which classes are the same view, and which are junk: averages of simulated particles whose view is known."""

import numpy as np
import pytest

from mrefali import average, geometry, health
from mrefali.parallel import SERIAL
from mrefali.search import Search
from mrefali.simulation import JUNK, simulate_particles

BOX, RADIUS = 64, 27
SEARCH = Search(BOX, 1, RADIUS, 1, 3.0, 3.0, 1.0)

jit_only = pytest.mark.jit_only  # thousands of poses; test_classes has small ones for plain Python


def simulated(seed, snr=0.3, n_particles=960, junk=0.0):
    """Particles of eight views, normalised, their views, and poses as a search leaves them: off by a step or so."""
    particles = simulate_particles(n_particles, 8, BOX, snr, 3.0, seed=seed, outer_radius=RADIUS, junk=junk)
    average.normalize_particles(particles.images, geometry.disc(BOX, RADIUS))
    rng = np.random.default_rng(seed)
    slips = geometry.make_poses(rng.normal(0, 2, n_particles), *rng.normal(0, 0.4, (2, n_particles)))
    return particles.images, particles.classes, geometry.compose(particles.poses, slips)


def halves_of(images, poses, members, pose=None):
    """Means of the two halves of a class, (2, BOX, BOX); the average stands in ``pose``, the identity if not given."""
    poses = poses[members] if pose is None else geometry.compose(poses[members], pose)
    moved = average.transform(images[members], poses)
    return np.stack([moved[half::2].mean(axis=0, dtype=np.float64) for half in (0, 1)])


def examined(halves, search=SEARCH):
    return health.examine(np.stack([health.shrunk(pair, search) for pair in halves]), search, SERIAL)


def turned(k, mirror):
    """A pose for the average of class ``k`` that is no other's."""
    return geometry.make_poses(37.0 * k, 1.5 * (-1) ** k, -1.0, mirror)


def split(seed, views, snr=0.3, mirror=0):
    """Halves of eight classes, one a view, and of those that follow, which take every second particle of ``views``."""
    images, classes, poses = simulated(seed, snr)
    members = [np.flatnonzero(classes == view) for view in range(8)]
    members += [members[view][1::2] for view in views]
    for view in views:
        members[view] = members[view][::2]
    return [halves_of(images, poses, these, turned(k, mirror if k >= 8 else 0)) for k, these in enumerate(members)]


#: Of whose eight views no two are less than ten degrees apart.
SEEDS = (0, 1, 3, 5)


@jit_only
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("snr", [0.3, 0.1])
def test_a_view_split_in_two_is_named_and_views_that_differ_are_not(seed, snr):
    found = examined(split(seed, [2, 5], snr))
    assert health.same_views(found.like, found.likeness) == [[2, 8], [5, 9]]
    assert np.median(np.delete(found.likeness, [2, 5, 8, 9])) < 0.7
    assert health.junk(found.detail, found.detail_error).size == 0


@jit_only
@pytest.mark.parametrize("seed", SEEDS)
def test_eight_views_are_eight(seed):
    found = examined(split(seed, []))
    assert health.same_views(found.like, found.likeness) == []
    assert (found.like != np.arange(8)).all()


@jit_only
def test_a_mirrored_average_is_the_same_view_unless_mirrors_are_not_searched():
    halves = split(1, [4], mirror=1)
    assert health.same_views(*list(vars(examined(halves)).values())[:2]) == [[4, 8]]
    unmirrored = examined(halves, Search(BOX, 1, RADIUS, 1, 3.0, 3.0, 1.0, mirror=False))
    assert health.same_views(unmirrored.like, unmirrored.likeness) == []


@jit_only
def test_likeness_is_about_one_whatever_the_noise_of_the_averages():
    """The plain correlation of the same averages falls with the noise."""
    images, classes, poses = simulated(1, 0.3)
    members = np.flatnonzero(classes == 3)
    for n in (120, 40, 24):
        halves = [halves_of(images, poses, members[part:n:2], turned(part, 0)) for part in (0, 1)]
        found = examined([*halves, halves_of(images, poses, np.flatnonzero(classes == 0))])
        assert found.like[:2].tolist() == [1, 0]
        assert found.likeness[:2] == pytest.approx(1.0, abs=0.1)


@jit_only
def test_large_boxes_are_compared_as_small_ones():
    """Truth: twice as many pixels each way, of the same averages, say the same."""
    small = split(0, [2])
    large = [np.kron(pair, np.ones((2, 2))) for pair in small]  # its centre is half a pixel off, as of all alike
    found = examined(large, Search(2 * BOX, 1, 2 * RADIUS, 1, 3.0, 3.0, 1.0))
    assert health.same_views(found.like, found.likeness) == [[2, 8]]


# ---- junk


@jit_only
@pytest.mark.parametrize("seed", range(3))
def test_classes_of_junk_and_of_several_views_are_named_and_no_others(seed):
    images, classes, poses = simulated(seed, junk=0.1)
    members = [np.flatnonzero(classes == view) for view in range(8)]
    everything = np.concatenate([m[:15] for m in members])
    members += [np.flatnonzero(classes == JUNK), everything]
    found = examined([halves_of(images, poses, these) for these in members])
    assert health.junk(found.detail, found.detail_error).tolist() == [8, 9]
    assert np.abs(found.detail[:8] - 1).max() < 0.3


@jit_only
def test_a_small_class_is_no_junk_but_a_large_one_of_noise_is_and_is_like_nothing():
    images, classes, poses = simulated(0)
    members = [np.flatnonzero(classes == view) for view in range(8)]
    members[3] = members[3][:6]
    noise = np.random.default_rng(0).standard_normal((100, BOX, BOX)).astype(np.float32)
    halves = [halves_of(images, poses, these) for these in members]
    halves.append(halves_of(noise, geometry.identity_poses(100), np.arange(100)))
    found = examined(halves)
    assert health.junk(found.detail, found.detail_error).tolist() == [8]
    assert found.detail_error[3] > 2 * np.median(found.detail_error[:3])
    assert (found.like[8], 8 in found.like) == (-1, False)
    assert np.isnan(found.likeness[8])


@jit_only
def test_the_error_of_detail_is_the_spread_that_other_particles_give():
    """Twelve classes of 20 particles of one view: all differences are noise."""
    images, classes, poses = simulated(2, 0.1, 8 * 240)
    members = np.flatnonzero(classes == 1)
    found = examined([halves_of(images, poses, members[k::12]) for k in range(12)])
    assert 0.5 < found.detail.std() / np.median(found.detail_error) < 2


# ---- where there is nothing to say


def test_nothing_is_said_of_what_has_no_power():
    flat = np.zeros((2, 20, 20))
    one = np.random.default_rng(0).standard_normal((20, 20))
    search = Search(20, 1, 6, 1, 1.0, 1.0, 1.0)
    for halves in ([flat], [flat, flat], [np.stack([one, 0 * one])]):
        found = examined(halves, search)
        assert found.like.tolist() == [-1] * len(halves)
        assert np.isnan([found.likeness, found.detail, found.detail_error]).all()
        assert health.same_views(found.like, found.likeness) == []
        assert health.junk(found.detail, found.detail_error).size == 0


def test_halves_that_contradict_each_other_are_no_signal():
    one = np.random.default_rng(0).standard_normal((20, 20))
    found = examined([np.stack([one, -one]), np.stack([one, one])], Search(20, 1, 6, 1, 1.0, 1.0, 1.0))
    assert found.like.tolist() == [-1, -1]


def test_a_class_alone_is_like_no_other():
    one = np.random.default_rng(0).standard_normal((20, 20))
    found = examined([np.stack([one, one])], Search(20, 1, 6, 1, 1.0, 1.0, 1.0))
    assert found.like.tolist() == [-1]
    assert found.detail.tolist() == [1.0]


def test_views_that_are_the_same_as_a_third_are_one_group():
    like = np.array([3, 2, 1, 0, 3, -1, 0])
    likeness = np.array([0.95, 0.89, 0.5, 0.95, 0.9, np.nan, 0.899])
    assert health.same_views(like, likeness) == [[0, 3, 4]]


def test_junk_is_what_is_surely_below_the_limit():
    detail, error = np.array([1.0, 0.5, 0.5, np.nan, 0.69, 0.1]), np.array([0.0, 0.05, 0.15, np.nan, 0.0, 0.2])
    assert health.junk(detail, error).tolist() == [1, 4, 5]
