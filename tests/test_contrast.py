"""What of particles is signal, and averages filtered for it."""

import numpy as np
import pytest
from class_particles import BOX, RADIUS, particles

from mrefali.average import normalize_particles, transform
from mrefali.contrast import Contrast, References
from mrefali.ctf import CtfKernels, ctf_sq, premultiply, wiener_divide
from mrefali.errors import InputError
from mrefali.geometry import disc, identity_poses
from mrefali.reference import TanhFilter, low_pass
from mrefali.search import Alignments, align_each, ring_spectra
from mrefali.seeding import search_of
from mrefali.sharpening import sharpen, splines
from mrefali.simulation import simulate_particles


def test_noise_alone_has_no_contrast():
    images = np.random.default_rng(0).normal(size=(400, BOX, BOX)).astype(np.float32)
    # the power of a ring of at least eight coefficients is known to 1 / sqrt(400 * 8), within and without
    assert Contrast(images, RADIUS).ratio[2:].max() < 6 * np.sqrt(2 / (400 * 8))


def test_contrast_is_that_of_the_particles_whatever_their_scale():
    images, _ = particles()
    ratio = Contrast(images, RADIUS).ratio
    assert ratio[1:5].min() > 1 > ratio[-4:].max()
    np.testing.assert_allclose(Contrast(100 * images, RADIUS).ratio, ratio, rtol=1e-4)


def masked(images):
    return images * Contrast(images, RADIUS).edge


def louder_outside(images):
    return np.where(Contrast(images, RADIUS).edge > 0, images, 4 * images)


@pytest.mark.parametrize("change", [masked, louder_outside])
def test_where_the_corners_tell_nothing_of_the_noise_high_frequencies_do(change):
    images, _ = particles()
    plain, changed = Contrast(images, RADIUS), Contrast(change(images), RADIUS)
    strong = plain.ratio > 1
    # what the particles have at high frequencies counts as noise, here about half as much again as there is
    share = changed.ratio[strong] / plain.ratio[strong]
    assert share.min() > 0.5
    assert share.max() < 1.1
    assert np.isfinite(changed.references(images[:2], np.array([1, 10])).images).all()


def test_particles_with_less_within_the_disc_than_outside_are_refused():
    noise = np.random.default_rng(0).normal(size=(400, BOX, BOX)).astype(np.float32)
    weaker = np.where(Contrast(noise, RADIUS).edge > 0, 0.8 * noise, noise)
    with pytest.raises(InputError, match="they seem to be noise alone"):
        Contrast(weaker, RADIUS)


def own_parts(images, contrast, search, mean):
    """What particles of one class add to their scores themselves, what is left of it in fair ones, in units.

    Both after a whole search, as a particle's scores with other classes are.
    """
    everyone, parts, left = np.arange(len(images)), [], []
    with_it = contrast.references(mean(everyone)[None], np.array([len(images)]))

    def peak(i, references):
        spectra, image = ring_spectra(references.images, search), images[i:i + 1]
        each = align_each(image, identity_poses(1), spectra, search)
        found = Alignments(np.zeros(1, np.int32), each.poses[0], each.peak[0])
        return sharpen(image, found, splines(references.images), search).peak[0]

    for i in everyone:
        without = contrast.references(mean(np.delete(everyone, i))[None], np.array([len(images) - 1]))
        x, y = peak(i, with_it), peak(i, without)
        parts.append(x - y)
        left.append(with_it.fair(np.array([x]), np.zeros((1, 1), int), np.array([0]))[0, 0] - y)
    return np.mean(parts) / with_it.unit, np.mean(left) / with_it.unit


@pytest.mark.jit_only
@pytest.mark.parametrize(("n", "snr", "cutoff", "masked"), [
    (12, 0.3, None, None), (40, 0.3, None, None), (40, 0.1, None, None), (40, 0.3, 0.3, None), (40, 0.1, 0.3, None),
    (40, 0.3, 0.2, None), (40, 0.3, None, 9), (40, 0.3, None, 7)])
def test_the_part_of_a_particle_is_taken_out_of_its_score(n, snr, cutoff, masked):
    """Also where averages were filtered, of which the contrast is not told, and where they are masked."""
    images, made = particles(n=n, views=1, snr=snr)
    moved = transform(images, made.poses).astype(np.float64)
    mask = np.ones((BOX, BOX)) if masked is None else disc(BOX, masked)

    def mean(members):
        average = moved[members].mean(axis=0)
        return mask * (average if cutoff is None else low_pass(average, TanhFilter(cutoff, 0.2)))

    part, left = own_parts(images, Contrast(images, RADIUS, mask), search_of(BOX, RADIUS, 1)[0], mean)
    assert abs(left) < 1.5 + 0.1 * part


@pytest.mark.jit_only
@pytest.mark.parametrize(("snr", "cutoff"), [(0.1, None), (0.3, None), (0.1, 0.2), (0.3, 0.2)])
def test_the_part_of_a_particle_multiplied_by_its_ctf_is_taken_out_of_its_score(snr, cutoff):
    n, box, radius = 40, 64, 26
    made = simulate_particles(n, 1, box, snr, 1.0, CTF=True)
    images, weights = made.images.copy(), ctf_sq(made.ctf, box)
    premultiply(images, made.ctf, np.zeros(n, bool), CtfKernels(box))
    normalize_particles(images, disc(box, radius))
    moved = transform(images, made.poses).astype(np.float64)

    def mean(members):
        average = wiener_divide(moved[members].sum(axis=0), weights[members].sum(axis=0), 1.0)
        return average if cutoff is None else low_pass(average, TanhFilter(cutoff, 0.2))

    contrast = Contrast(images, radius, ctf_sq=weights, snr=1.0)
    part, left = own_parts(images, contrast, search_of(box, radius, 1)[0], mean)
    # less is known here: up to 30 % of the part of whole averages, and 4 units of strongly filtered ones
    assert abs(left) < 5 + 0.2 * part


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_prior_is_that_of_the_likeliest_class(seed):
    # of two known views, ten times as many particles of the one, in known poses
    images, made = particles(n=1100, views=2, sizes=[10, 1], snr=0.02, seed=seed)
    contrast, (search, _) = Contrast(images, RADIUS), search_of(BOX, RADIUS, 1)
    references, i = contrast.references(made.views, np.array([1000, 100])), np.arange(len(images))
    prior = references.prior(np.arange(2), np.full(2, -1))
    scores = np.stack([sharpen(images, Alignments(np.full(len(i), k, np.int32), made.poses, np.zeros(len(i))),
                               splines(references.images), search).peak for k in (0, 1)])
    second = scores[1] - scores[0]

    def wrong(threshold):
        return ((second > threshold) != made.classes).mean()

    best, n = min(map(wrong, second)), len(second)
    assert wrong(0) > best + 5 * np.sqrt(best / n)
    assert wrong(prior[0] - prior[1]) < best + 3 * np.sqrt(best / n)


def references_of(counts):
    return References(np.zeros((4, 4, 4)), np.array(counts), np.array([40.0, 60.0, 5.0, 1.0]),
                      np.array([1.0, 2.0, 1.0, 1.0]), 2.0)


def test_scores_are_fair_to_the_classes_that_a_particle_is_no_part_of():
    references, every = references_of([10, 20, 1, 0]), np.arange(4)[:, None]
    # the particles are in class 1, 0, 2, and in none; a likelihood e times as high is worth 2, a fitted pose 3
    fair = references.fair(np.full((4, 4), 10.0), every, np.array([1, 0, 2, -1]))
    np.testing.assert_allclose(fair, [[10, (100 - 40) / 9 + 3, 10, 10], [(200 - 60) / 19 / 2 + 3, 10, 10, 10],
                                      [10, 10, -np.inf, 10], [-np.inf] * 4])
    some = references.fair(np.full((2, 2), 10.0), np.array([[1, 1], [2, 0]]), np.array([1, 0]))
    np.testing.assert_allclose(some, [[fair[1, 0], 10], [10, fair[0, 1]]])


def test_the_prior_tells_the_ratio_of_other_particles_and_not_how_many_there_are():
    every, none = np.arange(2)[:, None], np.array([-1])
    prior = references_of([300, 30, 1, 0]).prior(every, none)
    twice = references_of([600, 60, 1, 0]).prior(every, none)
    np.testing.assert_allclose(prior[0] - prior[1], 2 * np.log(10))
    np.testing.assert_allclose(twice[0] - twice[1], prior[0] - prior[1])
    np.testing.assert_allclose(references_of([300, 31, 1, 0]).prior(every, np.array([1])), prior)


@pytest.mark.parametrize("change", [lambda s: np.where(s > 0.3, 0, 1), lambda s: np.where(s < 0.05, 0, 1)])
def test_particles_without_some_frequencies_have_a_contrast(change):
    images, _ = particles()
    spectra = np.fft.rfft2(images)
    frequency = np.hypot(np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX))
    filtered = np.fft.irfft2(spectra * change(frequency), s=(BOX, BOX)).astype(np.float32)
    contrast = Contrast(filtered, RADIUS)
    references = contrast.references(filtered[:3], np.array([1, 10, 0]))
    assert np.isfinite(contrast.ratio).all()
    assert np.isfinite(references.images).all()
    assert np.isfinite(references.unit)


def test_particles_with_nothing_but_the_corners_of_fourier_space_are_refused():
    checkers = (-1.0) ** np.add.outer(np.arange(BOX), np.arange(BOX)) * Contrast(particles()[0], RADIUS).edge
    images = np.random.default_rng(0).normal(size=(60, BOX, BOX)) + checkers
    with pytest.raises(InputError, match="at high frequencies: they seem to be noise alone"):
        Contrast(images.astype(np.float32), RADIUS)
