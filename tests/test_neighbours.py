"""Averages of particles that are alike, against known truth."""

import numpy as np
import pytest
from class_particles import BOX, RADIUS, particles

from mrefali.average import transform
from mrefali.contrast import Contrast
from mrefali.neighbours import NEIGHBOURS, choose, neighbourhoods
from mrefali.seeding import search_of


def found_in(images, drawn):
    return neighbourhoods(images, drawn, Contrast(images, RADIUS), search_of(BOX, RADIUS, 1)[0])


def test_averages_are_chosen_for_what_the_others_fit_badly():
    # two that fit the first particles, one that fits the last, and one that fits none well
    scores = np.array([[9, 8.9, 1, 3]] * 5 + [[1, 1, 9, 3]] * 3, float)
    assert choose(scores, scores.mean(axis=1), 2) == [0, 2]


def test_averages_are_chosen_for_what_there_is_no_class_for():
    scores = np.array([[9, 1, 4]] * 5 + [[1, 8, 4]] * 3, float)
    assert choose(scores, np.array([9.0] * 5 + [2] * 3), 1) == [1]
    assert choose(scores, np.array([2.0] * 5 + [8] * 3), 1) == [0]


@pytest.mark.jit_only
def test_neighbours_show_the_view_of_the_particle_they_are_found_about():
    images, made = particles(n=90, snr=0.5, seed=2)  # two views of seed 0 are alike
    drawn = np.arange(0, 90, 9)
    near = found_in(images, drawn)
    assert near.members.shape == (10, NEIGHBOURS[-1])
    assert (made.classes[near.members] == made.classes[drawn, None]).mean() > 0.9
    for k, members in enumerate(near.members):
        moved = transform(images[members], near.member_poses[k]).mean(axis=0)
        assert np.corrcoef(moved.ravel(), near.averages[k].ravel())[0, 1] > 0.8  # but for the centring


def test_every_particle_meets_every_average_without_its_own_part():
    images, made = particles(n=24, views=2)
    near = found_in(images, np.array([0, 5]))
    scores, peak = near.scores(), near.found.peak.T
    assert scores.shape == peak.shape == (24, 2)
    for k, members in enumerate(near.members):
        others = np.setdiff1d(np.arange(24), members)
        np.testing.assert_array_equal(scores[others, k], peak[others, k])
        mine = np.full(12, k)
        np.testing.assert_array_equal(scores[members, k], near.references.fair(peak[members, k], mine, mine))
        assert (scores[members, k] < peak[members, k]).all()
