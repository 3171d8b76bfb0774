"""Whether particles of one class differ by more than noise: against numpy, then against known truth."""

import tracemalloc
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from class_particles import BOX, RADIUS, particles

from mrefali.average import normalize_particles, transform
from mrefali.contrast import Contrast
from mrefali.ctf import CtfKernels, premultiply
from mrefali.geometry import disc, invert, make_poses
from mrefali.seeding import search_of
from mrefali.simulation import simulate_particles
from mrefali.structure import (
    FIRST_COPIES,
    SMALLEST_GROUP,
    SURE,
    Structure,
    Structures,
    bytes_needed,
    cut,
    cut_apart,
    gap,
    principal_components,
    turns,
)


def structures(images, half_range=1.0):
    return Structures(images, Contrast(images, RADIUS), search_of(BOX, RADIUS, half_range)[0], np.random.default_rng(1))


def with_amplitudes(made, amplitudes):
    """Normalised particles, of which each shows its view as strongly as is given."""
    clean = transform(made.views[made.classes], invert(made.poses))
    images = made.images + (amplitudes - 1)[:, None, None].astype(np.float32) * clean
    normalize_particles(images, disc(BOX, RADIUS))
    return images


def structure(n=120, half_range=1.0, amplitudes=None, **options):
    images, made = particles(n=n, **options)
    if amplitudes is not None:
        images = with_amplitudes(made, amplitudes)
    mean = transform(images, made.poses).mean(axis=0)
    return structures(images, half_range).of(np.arange(n), n, mean, n), made.classes


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("views", [1, 2])
def test_what_differing_defoci_leave_of_one_view_is_no_structure(views, seed):
    box, radius, n = 64, 28, 120
    made = simulate_particles(n, views, box, 0.1, 1.0, seed=seed, CTF=True)
    images = made.images.copy()
    premultiply(images, made.ctf, np.zeros(n, bool), CtfKernels(box))
    normalize_particles(images, disc(box, radius))
    mean = transform(images, made.poses).mean(axis=0)

    def found(**options):
        known = Structures(images, Contrast(images, radius), search_of(box, radius, 1.0)[0], np.random.default_rng(1),
                           **options)
        return known.of(np.arange(n), n, mean, n)

    regardless, known = found(), found(ctf=made.ctf)
    assert regardless.excess.max() > 3 * SURE
    if views == 1:
        assert known.excess.max() < 1.5 * SURE
    else:
        assert known.excess.max() > 3 * SURE
        assert max((known.parts == made.classes).mean(), (known.parts != made.classes).mean()) > 0.9


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1, 0.3, 0.5, 0.8])
def test_how_far_apart_the_parts_of_one_normal_distribution_lie(share):
    values = scipy.stats.norm.ppf((np.arange(500000) + 0.5) / 500000) * 3 + 7
    low, high = np.split(values, [round(500000 * share)])
    apart = (high.mean() - low.mean()) / np.sqrt((low.var() * len(low) + high.var() * len(high)) / len(values))
    assert cut_apart(share) == pytest.approx(apart, rel=1e-3)
    assert abs(gap(high, low)) < 1


@pytest.mark.parametrize(("n", "m"), [(4, 400), (12, 12), (40, 400), (200, 200)])
def test_the_parts_of_one_normal_sample_are_not_told_apart_and_two_kinds_are(n, m):
    rng = np.random.default_rng(1)
    samples = np.sort(rng.normal(size=(2000, n + m)), axis=1)
    one = np.array([gap(sample[m:], sample[:m]) for sample in samples])
    assert one.max() < SURE
    two = np.array([gap(rng.normal(5, 1, 2 * n), rng.normal(-5, 1, 2 * m)) for _ in range(200)])
    assert two.min() > SURE


def test_the_gap_is_in_standard_errors():
    rng = np.random.default_rng(1)
    gaps = [gap(rng.normal(cut_apart(0.5), 1, 50), rng.normal(size=50)) for _ in range(4000)]
    assert abs(np.mean(gaps)) < 0.1
    assert np.std(gaps) == pytest.approx(1, abs=0.05)


def test_of_infinite_numbers_and_of_equal_ones_no_gap_is_known():
    assert gap(np.array([1.0, np.inf]), np.zeros(3)) == gap(np.array([1.0, 2]), np.array([0, -np.inf])) == -np.inf
    assert gap(np.ones(4), np.zeros(4)) == -np.inf


@pytest.mark.jit_only
@pytest.mark.parametrize(("sizes", "surely"), [([9, 1], True), ([1, 0], False)])
def test_classes_of_two_views_are_told_by_how_well_particles_fit_and_halves_of_one_are_not(sizes, surely):
    views = sum(size > 0 for size in sizes)
    images, made = particles(n=150, views=views, sizes=sizes[:views], snr=0.5, seed=2)
    part = made.classes if surely else (np.arange(150) % 10 == 0).astype(int)
    groups = [np.flatnonzero(part == k) for k in (0, 1)]
    moved = transform(images, made.poses)
    averages = np.stack([moved[group].mean(axis=0) for group in groups])
    one = structures(images)
    assert (one.told_by_fit(groups, averages, np.bincount(part), part) > SURE) == surely


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_leaves_the_least_variance_within(seed):
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.concatenate([rng.normal(size=9), rng.normal(4, 2, size=7)]))
    found, order = cut(values), np.argsort(values)

    def within(n):
        return sum(part.size * part.var() for part in (values[order[:n]], values[order[n:]]))

    best = min(range(1, len(values)), key=within)
    assert sorted(np.flatnonzero(found)) == sorted(order[best:])


@pytest.mark.parametrize("n", [30, 90])  # fewer particles than pixels, and more
def test_principal_components_are_those_of_the_singular_values(n):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(n, 50)) + 5 * np.outer(rng.normal(size=n), rng.normal(size=50))
    common = np.linalg.qr(rng.normal(size=(50, 2)))[0]
    values, along = principal_components(pixels, common)
    rest = pixels - pixels.mean(axis=0)
    u, s, _ = np.linalg.svd(rest - rest @ common @ common.T, full_matrices=False)
    np.testing.assert_allclose(values, s[:3]**2 / (s**2).sum() * min(n, 50))
    for mine, theirs in zip(along.T, (u * s).T[:3], strict=True):
        np.testing.assert_allclose(mine * np.sign(mine @ theirs), theirs, atol=1e-9 * s[0])


def test_particles_that_stand_alone_make_no_component():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(60, 200))
    pixels[:20, 0] += 8
    none = np.zeros((200, 1))
    values, along = principal_components(pixels, none)
    astray = np.concatenate([pixels, [100 * np.eye(200)[1], 80 * np.eye(200)[2]]])
    of_all, along_all = principal_components(astray, none)
    np.testing.assert_allclose(of_all, values)
    np.testing.assert_allclose(along_all[:60], along)
    assert (along_all[60:] <= along.max(axis=0)).all()
    assert (along_all[60:] >= along.min(axis=0)).all()
    assert len(set(cut(along_all[:, 0])[:20])) == 1
    assert cut(along[:, 0]).sum() in (20, 40)


def excesses(**options):
    """Of four groups of particles of one view, (4, COMPONENTS)."""
    return np.array([structure(n=80, views=1, seed=seed, **options)[0].excess for seed in range(4)])


@pytest.mark.jit_only
@pytest.mark.parametrize("snr", [0.3, 0.05])
def test_particles_of_one_view_differ_by_no_more_than_noise(snr):
    excess = excesses(snr=snr)
    # in standard errors: 12 of mean 0 and deviation 1 have a mean of 0 to within 4 / sqrt(12), and none above 4
    assert excess.mean() < 4 / np.sqrt(excess.size)
    assert excess.max() < SURE


@pytest.mark.jit_only
def test_particles_beyond_the_search_are_no_structure(monkeypatch):
    # by 2.5 px in each direction, where 1 px is searched; some that are askew remain in some groups
    wide = excesses(max_shift=2.5, half_range=1.0).max(axis=1)
    monkeypatch.setattr("mrefali.structure.BEYOND", 0.0)
    narrow = excesses(max_shift=2.5, half_range=1.0).max(axis=1)
    assert np.median(wide) < 2.5
    assert (narrow > 3 * wide).all()
    assert narrow.min() > 10


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", range(4))
def test_two_views_are_told_apart(seed):
    found, view = structure(views=2, seed=seed)
    agreement = (found.parts == view).mean()
    assert found.excess.max() > 20
    assert max(agreement, 1 - agreement) > 0.8
    assert found.tells(view == 1) > 8  # at most sqrt(120) = 11
    assert found.tells(np.random.default_rng(seed).random(120) < 0.5) < 4


def test_parts_are_told_by_components_that_are_more_than_noise_alone():
    rng = np.random.default_rng(0)
    along = rng.normal(size=(100, 3)) * [3, 2, 1]
    first, second = along[:, 0] > 0, along[:, 1] > 0

    def tells(excess, part):
        return Structure(np.arange(100), None, np.array(excess), along).tells(part)

    assert tells([9.0, 0.0, 0.0], first) > 7  # a normal variable and its sign correlate by 0.8; sqrt(100) = 10
    assert tells([9.0, 0.0, 0.0], second) < 3
    assert tells([9.0, 9.0, 0.0], second) > 7
    assert tells([5.0, 0.0, 0.0], first) == 5.0
    assert tells([1.5, 1.9, 0.0], first) == 1.9
    assert tells([9.0, 0.0, 0.0], np.ones(100, bool)) == tells([9.0, 0.0, 0.0], np.zeros(100, bool)) == 0.0


def test_the_parts_of_the_smallest_group_can_be_told_surely_and_of_a_smaller_one_never():
    def most(n):
        part = np.arange(n) < n // 2
        along = np.zeros((n, 3))
        along[:, 0] = part
        return Structure(np.arange(n), None, np.array([99.0, 0.0, 0.0]), along).tells(part)

    assert most(SMALLEST_GROUP) > SURE
    assert most(SMALLEST_GROUP - 1) <= SURE


@pytest.mark.jit_only
def test_how_strongly_particles_show_their_view_is_no_structure():
    # by 30 %, as ice of uneven thickness makes it
    amplitudes = np.random.default_rng(0).normal(1, 0.3, 200).clip(0.2, None)
    one, _ = structure(n=200, views=1, snr=0.3, amplitudes=amplitudes)
    assert one.excess.max() < SURE
    two, view = structure(n=200, views=2, snr=0.3, amplitudes=amplitudes)
    assert two.tells(view == 1) > 2 * SURE  # at most sqrt(200) = 14


@pytest.mark.jit_only
def test_views_of_aligned_particles_are_told_apart():
    # all poses are near the identity then: what stands still in the particles must not in the copies
    images, made = particles(n=120, views=2, snr=0.3, seed=1)  # the two views of seed 0 are alike
    aligned = transform(images, made.poses)
    normalize_particles(aligned, disc(BOX, RADIUS))
    found = structures(aligned).of(np.arange(120), 120, aligned.mean(axis=0), 120)
    assert found.tells(made.classes == 1) > SURE


@pytest.mark.parametrize("box", [15, 16])
def test_pixels_are_turned_about_the_centre(box):
    image, mask = np.random.default_rng(0).normal(size=(box, box)), disc(box, 6)
    angles, mirrored = np.arange(8) % 4 * 90.0, np.arange(8) // 4
    moved = transform(np.repeat(image[None], 8, axis=0).astype(np.float32), make_poses(angles, 0.0, 0.0, mirrored))
    found = {tuple(image[mask][order].astype(np.float32).round(4)) for order in turns(mask)}
    assert found == {tuple(one[mask].round(4)) for one in moved}
    assert len(found) == 8


@pytest.mark.jit_only
@pytest.mark.parametrize("box", [64, 96])
def test_the_fast_search_finds_what_the_full_one_does(box):
    radius = 3 * box // 8
    made = simulate_particles(60, 1, box, 0.3, 2.0, seed=0)
    images = made.images.copy()
    normalize_particles(images, disc(box, radius))
    known = Structures(images, Contrast(images, radius), search_of(box, radius, 3)[0], np.random.default_rng(1))
    fast, full = (known._aligned(images, made.views[0], 60, searches) for searches in (known.fast, [known.search]))
    off = np.hypot(fast["sx"] - full["sx"], fast["sy"] - full["sy"])
    assert (off < 0.05).mean() > 0.9


@pytest.mark.jit_only
def test_copies_are_turned_by_any_angle_and_keep_their_power(monkeypatch):
    images, made = particles(n=60, views=1)
    known, given = structures(images), []

    def remember(pixels, common):
        given.append(pixels)
        return principal_components(pixels, common)

    monkeypatch.setattr("mrefali.structure.principal_components", remember)
    known.of(np.arange(60), 60, transform(images, made.poses).mean(axis=0), 60)
    moved, *copies = given
    assert len(copies) == FIRST_COPIES
    residual = moved - moved.mean(axis=0)
    for copy in copies:
        np.testing.assert_allclose((copy**2).sum(), (residual**2).sum(), rtol=0.02)
    # no two copies stand alike, nor does any stand as the particles do
    alike = [abs((a * b).sum()) / (a * a).sum() for a, b in combinations([residual, *copies], 2)]
    assert np.median(alike) < 0.2
    assert max(alike) < 0.5


@pytest.mark.jit_only
def test_of_blank_particles_nothing_is_known():
    images, made = particles(n=60, views=1)
    known = structures(images)
    known.images = np.zeros_like(images)
    with np.errstate(all="ignore"):
        assert known.of(np.arange(30), 30, np.zeros((BOX, BOX), np.float32), 30) is None
    known.images = images
    found = known.of(np.arange(60), 60, transform(images, made.poses).mean(axis=0), 60)
    assert np.isfinite(found.excess).all()


@pytest.mark.parametrize(("box", "radius", "half_range"), [(16, 6, 1), (32, 12, 1), (32, 7, 8), (64, 28, 3)])
def test_the_wider_search_leaves_enough_of_the_radius(box, radius, half_range):
    search = search_of(box, radius, half_range)[0]
    contrast = SimpleNamespace(disc=disc(box, radius))
    wide = Structures(np.empty((0, box, box)), contrast, search, None).search
    assert search.xr <= wide.xr <= search.xr + 2
    assert wide.outer_radius >= 0.75 * search.outer_radius
    assert wide.outer_radius + wide.xr <= box / 2 - 1


@pytest.mark.jit_only
def test_what_is_known_of_a_group_holds_for_nearly_the_same():
    images, made = particles(n=60, views=1)
    known, mean = structures(images), transform(images, made.poses).mean(axis=0)
    whole = known.of(np.arange(60), 60, mean, 60)
    assert known.of(np.arange(3, 60), 60, mean, 57) is whole
    # a small class in it makes it another group
    assert known.of(np.arange(3, 60), 20, mean, 57) is not whole
    other = known.of(np.arange(30), 30, mean, 30)
    assert other is not whole
    np.testing.assert_array_equal(other.members, np.arange(30))
    assert known.of(np.arange(SMALLEST_GROUP - 1), 15, mean, 15) is None


@pytest.mark.jit_only
def test_of_a_large_group_evenly_spaced_members_are_asked(monkeypatch):
    monkeypatch.setattr("mrefali.structure.LARGEST_GROUP", 20)
    images, made = particles(n=50, views=1)
    found = structures(images).of(np.arange(50), 50, transform(images, made.poses).mean(axis=0), 50)
    np.testing.assert_array_equal(found.members, np.arange(0, 50, 3))


@pytest.mark.jit_only
@pytest.mark.parametrize("n", [60, 150])
def test_the_memory_that_a_group_takes_is_what_is_said(n):
    images, made = particles(n=n, views=1)
    known, mean = structures(images), transform(images, made.poses).mean(axis=0)
    tracemalloc.start()
    known.of(np.arange(n), n, mean, n)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 * bytes_needed(n, BOX) < peak < bytes_needed(n, BOX)
