"""Classes of limited size: the best of all assignments."""

import naive
import numpy as np
import pytest
from conftest import JIT
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mrefali import assignment
from mrefali.assignment import assign_within_limits, size_limits

LIMITED = ("capped", "equal")


def worth(scores, assign):
    """Sum of the scores, exact for those of the tests."""
    return scores[np.arange(len(scores)), assign].astype(float).sum()


def sizes(assign, n_classes):
    return np.bincount(assign, minlength=n_classes)


# --- arrays


@pytest.mark.parametrize(("kind", "n_particles", "n_classes", "limits"), [
    ("equal", 12, 3, (4, 4)), ("equal", 13, 3, (4, 5)), ("capped", 12, 4, (0, 9)), ("capped", 13, 4, (0, 10)),
    ("capped", 5, 1, (0, 15))])
def test_the_limits_of_the_sizes(kind, n_particles, n_classes, limits):
    assert size_limits(kind, n_particles, n_classes) == limits


@pytest.mark.parametrize("kind", LIMITED)
@given(n_particles=st.integers(1, 6), n_classes=st.integers(1, 5), levels=st.sampled_from([1, 3, 1000]),
       favourite=st.integers(0, 2), seed=st.integers(0, 2**16))
def test_no_assignment_of_allowed_sizes_is_worth_more(kind, n_particles, n_classes, levels, favourite, seed):
    """Held against all that there are; few levels make many ties, a favourite class one that all prefer."""
    scores = np.random.default_rng(seed).integers(-levels, levels + 1, (n_particles, n_classes)).astype(np.float32)
    scores[:, 0] += favourite * levels
    found = assign_within_limits(scores, kind)
    fewest, most = size_limits(kind, n_particles, n_classes)
    assert fewest <= sizes(found, n_classes).min()
    assert sizes(found, n_classes).max() <= most
    assert worth(scores, found) == naive.best_worth(scores, fewest, most)


@pytest.mark.parametrize("kind", LIMITED)
@pytest.mark.parametrize("shortest", [1, 2, 8])
def test_as_good_as_the_assignment_of_particles_to_places(monkeypatch, kind, shortest):
    """A place for each particle that a class may have; those that must be filled are worth more than all scores."""
    monkeypatch.setattr(assignment, "SHORTEST_QUEUE", shortest)
    n_particles, n_classes = (203, 6) if JIT else (41, 5)
    scores = np.random.default_rng(3).standard_normal((n_particles, n_classes)).astype(np.float32)
    scores += [2, 1, 0, 0, 0.5, 0][:n_classes]
    fewest, most = size_limits(kind, n_particles, n_classes)
    classes = np.repeat(np.arange(n_classes), most)
    must = np.tile(np.arange(most) < fewest, n_classes)
    _, places = linear_sum_assignment(scores[:, classes] + 1e3 * n_particles * must, maximize=True)
    found = assign_within_limits(scores, kind)
    # each score is rounded by at most half of 2^-30 of 8, and the sums by much less
    assert worth(scores, found) == pytest.approx(worth(scores, classes[places]), abs=n_particles * 2**-27)
    assert (sizes(found, n_classes) >= fewest).all()
    assert (sizes(found, n_classes) <= most).all()


def test_particles_stay_in_their_best_class_while_it_has_room():
    scores = np.random.default_rng(5).random((40, 4)).astype(np.float32)
    best = scores.argmax(axis=1)
    assert sizes(best, 4).max() <= size_limits("capped", 40, 4)[1]
    assert assign_within_limits(scores, "capped").tolist() == best.tolist()


@pytest.mark.parametrize("kind", LIMITED)
def test_where_all_is_equal_sizes_are_as_asked_for(kind):
    found = assign_within_limits(np.ones((25, 4), np.float32), kind)
    expected = {"capped": [0, 0, 6, 19], "equal": [6, 6, 6, 7]}[kind]
    assert sorted(sizes(found, 4)) == expected


def test_the_sizes_and_not_the_height_of_scores_decide_who_goes():
    """A class that all prefer keeps those that lose most elsewhere, here the first half."""
    scores = np.zeros((8, 2), np.float32)
    scores[:, 0] = 100 + np.arange(8, 0, -1)
    assert assign_within_limits(scores, "equal").tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_scores_does_not_matter(scale):
    scores = np.random.default_rng(6).standard_normal((60, 3)).astype(np.float32)
    # multiplied exactly, or another rounding might decide
    power = np.float32(2.0 ** np.round(np.log2(scale)))
    assert assign_within_limits(power * scores, "equal").tolist() == assign_within_limits(scores, "equal").tolist()


def test_scores_are_not_written():
    scores = np.random.default_rng(7).random((30, 3)).astype(np.float32)
    before = scores.copy()
    assign_within_limits(scores, "equal")
    np.testing.assert_array_equal(scores, before)
