"""Normalisation, class sums, FRC and the criterion, against numpy or their slow twins."""

import naive
import numpy as np
import pytest
from conftest import JIT

from mrefali import average
from mrefali.average import ClassSums, criterion, frc, normalize_particles, normalize_references, transform
from mrefali.compiled import kernels
from mrefali.geometry import disc, identity_poses, make_poses

BOXES = [16, 17, 20, 21]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def soft_mask(box):
    """1 inside, falling to 0 over three pixels, with values on both sides of one half."""
    d = np.arange(box) - box // 2
    return np.clip((box / 2 - 2 - np.hypot(d[:, None], d)) / 3, 0, 1).astype(np.float32)


# --- normalisation


def test_particles_are_normalised_where_the_mask_is_not_0_however_small_it_is():
    inside = soft_mask(20) != 0
    images = 7 + 3 * noise(4, 20, 20)
    exact = images.astype(float)
    mean, deviation = exact[:, inside].mean(axis=1), exact[:, inside].std(axis=1)
    normalize_particles(images, inside)
    np.testing.assert_allclose(images, (exact - mean[:, None, None]) / deviation[:, None, None], rtol=0, atol=1e-6)
    np.testing.assert_allclose(images[:, inside].mean(axis=1, dtype=float), 0, atol=1e-6)
    np.testing.assert_allclose(images[:, inside].std(axis=1, dtype=float), 1, rtol=1e-6)


def test_references_lose_their_mean_and_keep_their_height():
    inside = disc(20, 7)
    references = 7 + 3 * noise(2, 20, 20)
    before = references.copy()
    normalised = normalize_references(references, inside)
    exact = before.astype(float)
    np.testing.assert_allclose(normalised, exact - exact[:, inside].mean(axis=1)[:, None, None], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(references, before)
    assert normalised.dtype == np.float32


def test_the_largest_pixel_is_that_of_the_normalised_images():
    images, inside = 7 + 3 * noise(3, 20, 20), disc(20, 7)
    images[1, 0, 0] = -50  # outside the mask, and it counts
    largest = average.pixel_statistics(images, inside).largest
    normalize_particles(images, inside)
    assert largest == pytest.approx(np.abs(images).max(), rel=1e-6)
    assert largest == pytest.approx(-images[1, 0, 0], rel=1e-6)


# --- sums


def test_particles_of_even_index_go_to_the_first_half_and_odd_ones_to_the_second():
    images = noise(5, 16, 16)
    sums = ClassSums(2, 16, 100, largest=10.0)
    sums.add(images, identity_poses(5), np.array([0, 0, 1, 0, 0], np.int32), 7 + np.arange(5))
    exact = images.astype(float)
    np.testing.assert_allclose(sums.halves(0), [exact[1] + exact[3], exact[0] + exact[4]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(sums.halves(1), [np.zeros((16, 16)), exact[2]], rtol=0, atol=1e-12)


def test_sums_are_of_the_moved_particles():
    images, poses = noise(4, 16, 16), make_poses([30.0, 200, 0, 90], [1.5, 0, -2, 0], 0.5, [0, 1, 1, 0])
    sums = ClassSums(1, 16, 4, largest=10.0)
    sums.add(images, poses, np.zeros(4, np.int32), np.arange(4))
    moved = [naive.transform(image, pose) for image, pose in zip(images.astype(float), poses, strict=True)]
    np.testing.assert_allclose(sums.halves(0), [moved[0] + moved[2], moved[1] + moved[3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_particles", [1, 1000, 10**7])
@pytest.mark.parametrize("largest", [0.5, 8.0, 300.0])
def test_each_particle_adds_at_most_half_a_unit_of_error(n_particles, largest):
    n = 50 if JIT else 8
    images = noise(n, 16, 16, seed=3)
    images *= np.float32(largest) / np.abs(images).max()
    poses = make_poses(np.linspace(0, 300, n), 0.3, -0.7)
    sums = ClassSums(1, 16, n_particles, largest)
    sums.add(images, poses, np.zeros(n, np.int32), np.arange(n))
    moved = transform(images, poses).astype(float)
    exact = np.array([moved[0::2].sum(axis=0), moved[1::2].sum(axis=0)])
    float64_rounding = n * np.finfo(float).eps * np.abs(exact).max()
    np.testing.assert_allclose(sums.halves(0), exact, rtol=0, atol=n / 2 * sums.unit / 2 + float64_rounding)


@pytest.mark.parametrize("n_particles", [1, 1000, 10**7])
@pytest.mark.parametrize("largest", [0.5, 8.0, 300.0])
def test_the_unit_is_as_fine_as_the_largest_sum_allows(n_particles, largest):
    unit = ClassSums(1, 16, n_particles, largest).unit
    worst = n_particles * average.LARGEST_GAIN * max(largest, 1) / unit
    assert 2**61 < worst <= 2**62
    # two million particles at 8 deviations: finer than float32 has it for the smallest of them
    assert ClassSums(1, 16, 2_000_000, 8.0).unit <= 2.0**-36


def test_the_six_point_formula_never_amplifies_more_than_the_largest_gain():
    places = np.linspace(0, 1, 21 if JIT else 5)[:-1]
    gain = 0
    for u in places:
        for v in places:
            weights = []
            for i in range(25):
                image = np.zeros((5, 5), np.float32)
                image.flat[i] = 1
                weights.append(kernels.quadratic(image, 2 + u, 2 + v))
            assert sum(weights) == pytest.approx(1)
            gain = max(gain, np.abs(weights).sum())
    assert 1 <= gain < average.LARGEST_GAIN


def test_sums_are_equal_to_the_bit_however_the_stack_is_cut():
    images, assign = noise(12, 16, 16), np.arange(12, dtype=np.int32) % 3
    poses = make_poses(np.arange(12) * 20.0, 0.25, 1.5, np.arange(12) % 2)
    whole = ClassSums(3, 16, 12, 6.0)
    whole.add(images, poses, assign, np.arange(12))
    parts = ClassSums(3, 16, 12, 6.0)
    for start, stop in ((5, 12), (0, 1), (1, 5)):
        parts.add(images[start:stop], poses[start:stop], assign[start:stop], np.arange(start, stop))
    np.testing.assert_array_equal(parts.sums, whole.sums)


# --- FRC


@pytest.mark.parametrize("box", BOXES)
def test_frc_is_that_of_the_slow_twin_with_its_count(box):
    first, second = noise(2, box, box, seed=box).astype(float)
    second += 0.5 * first
    table = frc(first, second)
    expected = naive.frc(first, second)
    np.testing.assert_allclose(table[:, :2], expected[:, :2], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(table[:, 2], expected[:, 2])


@pytest.mark.parametrize("box", BOXES)
def test_every_ring_of_frc_counts_its_coefficients_twice_over(box):
    table = frc(*noise(2, box, box).astype(float))
    k = np.fft.fftfreq(box, 1 / box)
    ring = np.floor(np.hypot(k[:, None], k) + 0.5)
    half = box // 2
    # the whole plane holds each coefficient and its conjugate; ring 0 and, in an even box, n/2 stand apart
    whole = np.array([(ring == i).sum() for i in range(half + 1)])
    np.testing.assert_array_equal(table[1:half, 2], whole[1:half])
    assert table[0, 2] == 2
    assert table.shape == (half + 1, 3)


@pytest.mark.parametrize("box", BOXES)
def test_frc_frequencies_end_at_one_half(box):
    frequency = frc(*noise(2, box, box).astype(float))[:, 0]
    np.testing.assert_allclose(frequency, np.linspace(0, 0.5, box // 2 + 1))


def test_frc_of_an_image_with_itself_is_1_and_with_its_negative_minus_1():
    image = noise(20, 20).astype(float)
    np.testing.assert_allclose(frc(image, 3 * image)[:, 1], 1, rtol=1e-12)
    np.testing.assert_allclose(frc(image, -image)[:, 1], -1, rtol=1e-12)


def test_frc_is_0_where_a_ring_has_no_power():
    image = noise(20, 20).astype(float)
    assert not frc(image, np.zeros((20, 20)))[:, 1].any()


def test_the_criterion_is_the_mean_square_under_the_mask_summed_over_the_averages():
    averages, core = noise(3, 20, 20), disc(20, 5)
    expected = sum((a.astype(float)[core] ** 2).mean() for a in averages)
    assert criterion(averages, core) == pytest.approx(expected, rel=1e-12)
