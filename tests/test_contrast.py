"""What of particles is signal, and averages filtered for it."""

import numpy as np
import pytest
from class_particles import BOX, RADIUS, particles

from mrefali.average import transform
from mrefali.contrast import Contrast
from mrefali.errors import InputError
from mrefali.search import Alignments
from mrefali.seeding import search_of
from mrefali.sharpening import sharpen, splines


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


@pytest.mark.parametrize("n", [12, 40])
def test_more_than_the_part_of_a_particle_is_taken_out_of_its_score(n):
    images, made = particles(n=n, views=1, snr=0.3)
    contrast, (search, _) = Contrast(images, RADIUS), search_of(BOX, RADIUS, 1)
    moved = transform(images, made.poses)
    errors, parts = [], []
    for i in range(n):
        one = Alignments(np.zeros(1, np.int32), made.poses[i:i + 1], np.zeros(1))
        with_it = contrast.references(moved.mean(axis=0)[None], np.array([n]))
        without = contrast.references(np.delete(moved, i, axis=0).mean(axis=0)[None], np.array([n - 1]))
        x, y = (sharpen(images[i:i + 1], one, splines(r.images), search).peak[0] for r in (with_it, without))
        errors.append(with_it.without_own(np.array([x]), np.array([0]))[0] - y)
        parts.append(x - y)
    # what is taken out is all of the particle's part, and as much again at most, see OWN_SHARE
    assert -1.2 < np.mean(errors) / np.mean(parts) < -0.3
    assert np.std(errors) < 0.3 * np.mean(parts)
