"""The likeliest class: how it is chosen, on arrays, in a run, and for any number of ranks."""

import tracemalloc

import numpy as np
import pytest
from class_particles import BOX, RADIUS, particles
from conftest import JIT

import mrefali
from mrefali import average, likelihood
from mrefali.contrast import Contrast
from mrefali.errors import InputError
from mrefali.geometry import identity_poses
from mrefali.io import ArrayStack
from mrefali.likelihood import Likeliest
from mrefali.parallel import SERIAL
from mrefali.particles import Particles
from mrefali.refine import Settings, first_state, refine
from mrefali.search import align_each, ring_spectra
from mrefali.seeding import search_of
from mrefali.sharpening import sharpen, splines

VIEWS = 3
SEARCH = search_of(BOX, RADIUS, 1)[0]


@pytest.fixture(scope="module")
def known():
    """Particles, where they are, and averages of them by their true classes and poses."""
    images, made = particles(n=60 if JIT else 24, snr=0.3)
    moved = average.transform(images, made.poses)
    averages = np.stack([moved[made.classes == k].mean(axis=0) for k in range(VIEWS)])
    references = Contrast(images, RADIUS).references(averages, np.bincount(made.classes))
    return images, made.classes.astype(np.int32), references


def test_the_class_is_the_likeliest_of_the_best_by_a_coarser_look(known):
    """One particle at a time, with all classes refined, of which there are no more than are looked at."""
    images, classes, references = known
    found, scores = Likeliest(references, SEARCH).with_scores(images, identity_poses(len(images)), classes)
    coefficients = splines(references.images)
    for i, image in enumerate(images[:12]):
        each = align_each(image[None], identity_poses(1), ring_spectra(references.images, SEARCH), SEARCH)
        values, poses = [], []
        for k, m in enumerate(references.counts):
            one = type(found)(np.array([k], np.int32), each.poses[k], each.peak[k])
            fine = sharpen(image[None], one, coefficients, SEARCH)
            score, coarse, others = fine.peak[0], each.peak[k, 0], m
            if k == classes[i]:
                score, coarse = ((m * s - references.own[k]) / (m - 1) / references.growth[k] + 1.5 * references.unit
                                 for s in (score, coarse))
                others = m - 1
            values.append(score + references.unit * np.log(others))
            poses.append(fine.poses[0])
            assert scores[i, k] == pytest.approx(coarse, rel=1e-12)
        assert found.assign[i] == np.argmax(values)
        assert found.poses[i] == poses[found.assign[i]]


@pytest.mark.jit_only
def test_particles_are_of_the_views_that_they_show(known):
    images, classes, references = known
    found = Likeliest(references, SEARCH)(images, identity_poses(len(images)), classes)
    assert (found.assign == classes).mean() > 0.9


@pytest.mark.jit_only
@pytest.mark.parametrize("at_once", [1, 40, 1 << 16])
def test_how_many_are_looked_at_at_a_time_changes_no_bit(monkeypatch, known, at_once):
    images, classes, references = known
    likeliest = Likeliest(references, SEARCH)
    expected, _ = likeliest.with_scores(images, identity_poses(len(images)), classes)
    monkeypatch.setattr(likelihood, "PAIRS_AT_ONCE", at_once)
    found = likeliest(images, identity_poses(len(images)), classes)
    for name in ("assign", "poses", "peak"):
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes()


def test_unrefined_poses_are_those_of_the_search(known):
    images, classes, references = known
    found = Likeliest(references, SEARCH, refine=False)(images, identity_poses(len(images)), classes)
    each = align_each(images, identity_poses(len(images)), ring_spectra(references.images, SEARCH), SEARCH)
    i = np.arange(len(images))
    assert found.poses.tobytes() == each.poses[found.assign, i].tobytes()
    assert found.peak.tobytes() == each.peak[found.assign, i].tobytes()


@pytest.mark.jit_only
def test_the_memory_that_it_takes_is_the_estimate(monkeypatch):
    images, made = particles(n=600, views=8, snr=0.3)
    contrast, counts = Contrast(images, RADIUS), np.bincount(made.classes)
    monkeypatch.setattr(likelihood, "PAIRS_AT_ONCE", 8 * len(images))
    tracemalloc.start()
    try:
        likeliest = Likeliest(contrast.references(made.views, counts), SEARCH)
        likeliest(images, identity_poses(len(images)), made.classes.astype(np.int32))
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.6 < taken / likelihood.bytes_needed(8, BOX) < 1


# --- the contrast of a stack


@pytest.mark.parametrize("sampled", [7, 500])
def test_the_contrast_of_a_stack_is_that_of_some_of_it_in_blocks_of_any_size(monkeypatch, sampled):
    monkeypatch.setattr("mrefali.particles.CONTRAST_PARTICLES", sampled)
    images, _ = particles(n=20)
    inside = np.ones((BOX, BOX), bool)
    some = images[np.linspace(0, 19, 7).astype(int)] if sampled == 7 else images
    some = some.copy()
    average.normalize_particles(some, inside)
    expected = Contrast(some, RADIUS).ratio
    for block in (1, 3, 100):
        stack = Particles(ArrayStack(images.copy(), "images"), inside, block_bytes=4 * BOX**2 * block)
        np.testing.assert_array_equal(stack.contrast(RADIUS).ratio, expected)


# --- runs


def aligned(images, references, **options):
    return mrefali.align(images, references, ou=RADIUS, xr=1, yr=1, quiet=True, assignment="likeliest", **options)


def test_a_run_finds_the_classes_of_given_references(known):
    images, made = particles(n=60 if JIT else 24, snr=0.3)
    found = aligned(images, made.views, maxit=1 + 2 * JIT, subpixel=True)
    assert (found.assign == made.classes).mean() > 0.9


def test_noise_alone_is_refused():
    images = np.random.default_rng(0).standard_normal((100, BOX, BOX))
    weaker = np.where(np.hypot(*np.indices((BOX, BOX)) - BOX // 2) < RADIUS + 3, 0.8, 1) * images
    with pytest.raises(InputError, match="they seem to be noise alone"):
        aligned(weaker, images[:2])


def settings_of(images, **options):
    inside = np.hypot(*(np.indices((BOX, BOX)) - BOX // 2)) <= RADIUS
    of_all = Particles(ArrayStack(images.copy(), "images"), inside)
    return of_all, Settings(SEARCH, inside.astype(np.float32), -1, function=average_alone, rand_seed=1, largest=1e3,
                            quiet=True, assignment="likeliest", contrast=of_all.contrast(RADIUS), **options)


def average_alone(mask, center, mean, frc):
    return mean, np.zeros(2)


@pytest.mark.jit_only
def test_a_particle_that_the_reference_is_made_of_does_not_vote_for_it():
    """Two classes of two views, and a third one of a few particles of both: only their own parts hold those."""
    images, made = particles(n=60, views=2, snr=0.1, seed=1)
    stray = np.arange(6)
    classes = made.classes.astype(np.int32)
    classes[stray] = 2
    moved = average.transform(images, made.poses)
    references = np.stack([moved[classes == k].mean(axis=0) for k in range(3)])
    of_all, settings = settings_of(images, maxit=1)

    def kept(classes):
        state = first_state(references, made.poses, settings, classes)
        found = list(refine(of_all, references, made.poses, settings, SERIAL, state))[-1]
        return (found.assign[stray] == 2).sum()

    assert kept(classes) == 0
    assert kept(None) > 3  # where the run does not know what the references are made of


@pytest.mark.jit_only
def test_a_reference_of_unknown_particles_counts_as_one_of_mean_size(monkeypatch):
    """Given ones, and those in place of classes of fewer than four."""
    images, made = particles(n=24, views=3)
    of_all, settings = settings_of(images, maxit=1)
    asked = []
    references_of = Contrast.references

    def references(self, averages, counts):
        asked.append(counts.tolist())
        return references_of(self, averages, counts)

    monkeypatch.setattr(Contrast, "references", references)
    for classes in (None, np.repeat([0, 1, 2], [12, 10, 2]), np.repeat([0, 1, -1], [12, 5, 7])):
        state = first_state(made.views, made.poses, settings, classes)
        list(refine(of_all, made.views, made.poses, settings, SERIAL, state))
    assert asked == [[8, 8, 8], [12, 10, 8], [12, 5, 8]]


def test_a_stage_that_ends_when_classes_settle_has_two_iterations_at_least():
    images, made = particles(n=24, views=2)
    of_all, settings = settings_of(images, maxit=0, settled=1.0)
    state = first_state(made.views, made.poses, settings, made.classes)
    assert len(list(refine(of_all, made.views, made.poses, settings, SERIAL, state))) == 2
