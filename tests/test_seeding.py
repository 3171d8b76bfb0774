"""Classes of unaligned particles: the parts by themselves, then whole against known truth."""

from dataclasses import replace

import numpy as np
import pytest

from mrefali import seeding
from mrefali.accuracy import adjusted_rand
from mrefali.average import normalize_particles, transform
from mrefali.errors import InputError
from mrefali.geometry import disc, identity_poses
from mrefali.search import Alignments
from mrefali.seeding import (
    SMALLEST_PART,
    Contrast,
    State,
    _align_each,
    _choose,
    _components,
    _cut,
    _fit,
    _needed,
    _of_different_views,
    _settle,
    _split,
    _worth,
    find_seeds,
    search_of,
)
from mrefali.sharpening import sharpen, splines
from mrefali.simulation import simulate_particles

BOX, RADIUS = 32, 12


def particles(n=120, views=3, snr=1.0, seed=0, **options):
    made = simulate_particles(n, views, BOX, snr, 1.0, seed=seed, **options)
    images = made.images.copy()
    normalize_particles(images, disc(BOX, RADIUS))
    return images, made


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


def test_principal_components_are_the_same_by_members_and_by_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(30, 50)) + 5 * np.outer(rng.normal(size=30), rng.normal(size=50))
    pixels -= pixels.mean(axis=0)
    few, many = _components(pixels), _components(np.repeat(pixels, 3, axis=0))
    assert len(few) == len(many) == 3
    for a, b in zip(few, many[:, ::3], strict=True):
        assert abs(np.corrcoef(a, b)[0, 1]) > 1 - 1e-6


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


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_leaves_the_least_variance_within(seed):
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.concatenate([rng.normal(size=9), rng.normal(4, 2, size=7)]))
    found, order = _cut(values), np.argsort(values)

    def within(n):
        return sum(part.size * part.var() for part in (values[order[:n]], values[order[n:]]))

    best = min(range(SMALLEST_PART, len(values) - SMALLEST_PART + 1), key=within)
    assert sorted(np.flatnonzero(found)) == sorted(order[best:])


def test_averages_are_chosen_for_what_the_others_fit_badly():
    # two that fit the first particles, one that fits the last, and one that fits none well
    scores = np.array([[9, 8.9, 1, 3]] * 5 + [[1, 1, 9, 3]] * 3, float)
    assert _choose(scores, 2) == [0, 2]


def test_of_two_classes_of_one_view_one_can_be_done_without():
    rng = np.random.default_rng(0)
    view = np.repeat([0, 1], 200)
    fit = np.where(view[:, None] == [0, 0, 1], 10.0, 0.0)
    scores = fit + rng.normal(size=(2, 400, 3))  # noise of its own in each half
    worth = _worth(scores, np.arange(3))
    # chosen by one half, judged by the other: classes 0 and 1 differ by noise of deviation sqrt(2), half of 200 in
    # each, of mean 0; two standard errors are taken off
    noise = np.sqrt(2 * 100)
    assert np.abs(worth[:2] + 2 * noise).max() < 4 * noise
    # 200 times the difference of 10, less two errors of sqrt(200 * 102), and the noise of that sum
    assert abs(worth[2] - (2000 - 2 * np.sqrt(200 * 102))) < 4 * noise
    assert set(_needed(scores, 2)) in ({0, 2}, {1, 2})


def test_the_fit_is_that_of_the_half_that_did_not_choose():
    scores = np.array([[[3.0, 1.0]], [[2.0, 7.0]]])  # one particle: chosen by one half, judged by the other
    assert _fit(scores) == (2 + 1) / 2


@pytest.mark.parametrize("box", [32, 64, 65, 200, 256])
def test_small_images_have_a_search_that_fits(box):
    search, factor = search_of(box, 10, 3.0)
    assert search.box == box // factor <= 96
    assert search.xr == 3.0 / factor
    assert search.outer_radius + search.xr <= search.box / 2 - 1


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", range(3))
def test_views_are_found_and_no_more(seed):
    images, made = particles(n=150, seed=seed)
    found = find_seeds(images, 5, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    counts = np.zeros((found.n_classes, 3), int)
    np.add.at(counts, (found.assign, made.classes), 1)
    assert found.n_classes == 3
    assert adjusted_rand(counts) > 0.95
    assert (np.diff(np.bincount(found.assign)) <= 0).all()


@pytest.mark.jit_only
def test_a_class_of_two_views_is_cut_once_whatever_is_asked_of_its_parts(monkeypatch):
    images, made = particles(n=80, views=2)
    search = search_of(BOX, RADIUS, 1)[0]
    contrast, mean = Contrast(images, RADIUS), transform(images, made.poses).mean(axis=0)
    state, cuts = _settle(images, mean[None], np.array([80]), contrast, search), []
    averages, counts = _split(images, state, 1, contrast, search, cuts)
    assert min(counts) >= 38  # of 40
    monkeypatch.setattr(seeding, "_cut_in_two", None)
    again, _ = _split(images, state, 1, contrast, search, cuts, sure=0.0)
    np.testing.assert_array_equal(again, averages)


@pytest.mark.jit_only
def test_of_two_classes_of_one_view_the_larger_is_kept():
    images, made = particles(n=150, snr=0.3)
    assign = made.classes.astype(np.int32)
    state = State(np.empty((3, BOX, BOX)), np.bincount(assign), Alignments(assign, made.poses, np.zeros(150)), None)
    search = search_of(BOX, RADIUS, 1)[0]
    np.testing.assert_array_equal(_of_different_views(images, state, np.arange(3), search), [0, 1, 2])
    assign[np.flatnonzero(assign == 0)[::3]] = 3
    twice = replace(state, counts=np.bincount(assign))
    np.testing.assert_array_equal(_of_different_views(images, twice, np.arange(4), search), [0, 1, 2])
    np.testing.assert_array_equal(_of_different_views(images, twice, np.arange(1, 4), search), [1, 2, 3])


@pytest.mark.jit_only
@pytest.mark.parametrize("offered", ["noise", "views"])
def test_classes_are_filled_up_where_none_can_be_dropped_then(monkeypatch, offered):
    images, made = particles(n=150)
    moved = transform(images, made.poses)
    averages = np.stack([moved[made.classes == k].mean(axis=0) for k in range(3)])
    kinds = {"noise": np.random.default_rng(0).normal(size=averages.shape).astype(np.float32), "views": averages}

    def split(images, state, most, contrast, search, cuts, sure=None):
        return (None, None) if sure is None else (kinds[offered], np.full(3, 50))

    monkeypatch.setattr(seeding, "_split", split)
    needed = seeding._needed
    monkeypatch.setattr(seeding, "_needed", lambda scores, most, sure=None: (
        np.arange(2) if sure is None else needed(scores, most, sure)))  # a view is missing till the end
    found = find_seeds(images, 3, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    assert found.n_classes == {"noise": 2, "views": 3}[offered]


@pytest.mark.jit_only
def test_a_small_class_beside_a_large_one_is_found():
    images, made = particles(n=200, views=2, sizes=[4, 1])
    found = find_seeds(images, 2, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1))
    counts = np.zeros((found.n_classes, 2), int)
    np.add.at(counts, (found.assign, made.classes), 1)
    assert counts[1, 1] >= 36  # of 40
    assert counts[1, 1] > counts[1, 0]


@pytest.mark.jit_only
def test_the_same_bits_whatever_the_number_of_threads(set_threads):
    images, _ = particles(n=60)
    found = []
    for n in (1, 2):
        set_threads(n)
        found.append(find_seeds(images, 3, search_of(BOX, RADIUS, 1)[0], np.random.default_rng(1)))
    np.testing.assert_array_equal(found[0].assign, found[1].assign)
    assert found[0].poses.tobytes() == found[1].poses.tobytes()


def test_every_particle_meets_every_reference():
    images, made = particles(n=30)
    contrast, (search, _) = Contrast(images, RADIUS), search_of(BOX, RADIUS, 1)
    references = contrast.references(made.views, np.full(3, 100)).images
    found = _align_each(images, references, search)
    assert found.peak.shape == (3, 30)
    assert (found.peak.argmax(axis=0) == made.classes).mean() > 0.9
    assert identity_poses(30).dtype == found.poses.dtype
