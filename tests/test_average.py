"""Normalisation, class sums, FRC, and the reference function, against numpy or their slow twins."""

import naive
import numpy as np
import pytest
from conftest import JIT

from mrefali import average, kernels, reference
from mrefali.average import ClassSums, criterion, frc, normalize_particles, normalize_references, transform
from mrefali.errors import InputError
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


# --- the filter


def frc_table(value):
    value = np.asarray(value, float)
    n_rings = len(value)
    return np.stack([np.arange(n_rings) / (2 * (n_rings - 1)), value, np.ones(n_rings)], axis=1)


def falling(cutoff, width=0.03, n_rings=33, noise=0.0, seed=0):
    """A FRC that falls through one half of the halves' correlation at ``cutoff``, in 1/px."""
    f = np.arange(n_rings) / (2 * (n_rings - 1))
    wiggle = noise * np.random.default_rng(seed).normal(size=n_rings)
    return frc_table(np.clip(1 / (1 + np.exp((f - cutoff) / width)) + wiggle, -0.9, 1))


@pytest.mark.parametrize("seed", range(12))
def test_the_filter_is_that_of_the_slow_twin(seed):
    table = falling(0.08 + 0.03 * seed, noise=0.05, seed=seed)
    fitted = reference.fit_filter(table)
    assert (fitted.cutoff, fitted.falloff) == pytest.approx(naive.fit_filter(table), abs=1e-6)


def test_a_filter_is_recovered_from_its_own_curve():
    f = np.arange(65) / 128
    whole = reference.TanhFilter(0.25, 0.15)(f)
    whole[np.flatnonzero(whole < 0.1)[0]:] = 0
    fitted = reference.fit_filter(frc_table(whole / (2 - whole)))  # of the halves: f -> 2f/(1+f) undone
    assert fitted.cutoff == pytest.approx(0.25, abs=0.002)  # what was cut off below 0.1 pulls a little
    assert fitted.falloff == pytest.approx(0.15, abs=0.03)


def test_a_frc_that_never_falls_has_the_widest_filter():
    assert reference.fit_filter(frc_table(np.ones(33))) == reference.TanhFilter(0.4, 0.2)


@pytest.mark.parametrize(("cutoff", "expected"), [(0.05, 0.12), (0.46, 0.4)])
def test_cutoffs_stay_within_0_12_and_0_4(cutoff, expected):
    assert reference.fit_filter(falling(cutoff)).cutoff == expected


def test_falloffs_stay_at_most_0_2():
    assert reference.fit_filter(falling(0.25, width=0.1)).falloff == 0.2


def test_what_comes_after_the_first_ring_below_a_tenth_counts_as_0():
    table = falling(0.2)
    lost = np.flatnonzero(2 * table[:, 1] / (1 + table[:, 1]) < 0.1)[0]
    rising = table.copy()
    rising[lost + 3:, 1] = 0.8
    assert reference.fit_filter(rising) == reference.fit_filter(table)


def test_ring_0_counts_by_its_absolute_value():
    # halves whose means differ in sign correlate with -1 there, and 2f/(1+f) has no value for it
    table = falling(0.2)
    table[0, 1] = 1
    negative = table.copy()
    negative[0, 1] = -1
    assert reference.fit_filter(negative) == reference.fit_filter(table)


def test_a_ring_of_minus_1_counts_as_0():
    table = falling(0.2)
    table[25, 1] = -1
    assert reference.fit_filter(table) == reference.fit_filter(falling(0.2))


def test_the_table_is_not_written():
    table = falling(0.2)
    before = table.copy()
    reference.fit_filter(table)
    np.testing.assert_array_equal(table, before)


def test_the_tanh_filter_is_1_at_0_and_one_half_at_its_cutoff():
    h = reference.TanhFilter(0.2, 0.1)
    assert h(np.array([0.0, 0.2, 0.5])) == pytest.approx([1, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize("box", BOXES)
def test_the_filtered_image_is_that_of_the_slow_twin(box):
    image = noise(box, box).astype(float)
    filtered = reference.low_pass(image, reference.TanhFilter(0.22, 0.13))
    np.testing.assert_allclose(filtered, naive.low_pass(image, 0.22, 0.13), rtol=0, atol=1e-12)
    assert filtered.mean() == pytest.approx(image.mean(), rel=1e-3)


# --- centring


def blob(box, x, y, sigma=1.8):
    d = np.arange(box) - box // 2
    return np.exp(-((d[None, :] - x) ** 2 + (d[:, None] - y) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("x", "y"), [(0, 0), (2, -1), (-3, 2.5), (0.25, -0.75)])
def test_the_phase_centre_of_a_blob_is_its_middle(box, x, y):
    assert reference.phase_center(blob(box, x, y, sigma=1.2)) == pytest.approx((x, y), abs=1e-3)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("seed", range(4))
def test_the_phase_centre_is_that_of_the_slow_twin(box, seed):
    image = noise(box, box, seed=seed).astype(float)
    assert reference.phase_center(image) == pytest.approx(naive.phase_center(image), abs=1e-9)


@pytest.mark.parametrize("box", BOXES)
def test_a_shift_of_whole_pixels_in_fourier_space_is_a_roll(box):
    image = noise(box, box).astype(float)
    np.testing.assert_allclose(reference.fourier_shift(image, (3, -2)), np.roll(image, (-2, 3), (0, 1)),
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
def test_a_shift_of_parts_of_a_pixel_carries_a_blob_and_is_that_of_the_slow_twin(box):
    shifted = reference.fourier_shift(blob(box, 0, 0), (1.25, -0.5))
    np.testing.assert_allclose(shifted, blob(box, 1.25, -0.5), rtol=0, atol=1e-2)
    image = noise(box, box).astype(float)
    np.testing.assert_allclose(reference.fourier_shift(image, (1.25, -0.5)), naive.fourier_shift(image, 1.25, -0.5),
                               rtol=0, atol=1e-12)


# --- the reference function


@pytest.mark.parametrize("box", [20, 21])
@pytest.mark.parametrize("center", [0, 1, (0.75, -1.5)])
def test_ref_ali2d_masks_filters_and_centres(box, center):
    mask, table = soft_mask(box), falling(0.2, n_rings=box // 2 + 1)
    image = 5 + blob(box, 1, -2) + 0.1 * noise(box, box)
    made, shift, fitted = reference.ref_ali2d(mask, center, image, table)
    masked = (image - image[mask > 0.5].mean()) * mask
    expected = naive.low_pass(masked, *naive.fit_filter(table))
    place = {0: (0, 0), 1: naive.phase_center(expected)}[center] if np.isscalar(center) else center
    assert -shift == pytest.approx(np.array(place), abs=1e-9)
    np.testing.assert_allclose(made, naive.fourier_shift(expected, *shift), rtol=0, atol=1e-9)
    assert fitted == reference.fit_filter(table)


def test_after_centring_the_phase_centre_is_the_centre_pixel():
    made, _, _ = reference.ref_ali2d(soft_mask(20), 1, blob(20, 2, -1), falling(0.2, n_rings=11))
    assert reference.phase_center(made) == pytest.approx((0, 0), abs=1e-9)


def test_without_centring_the_reference_is_not_moved():
    _, shift, _ = reference.ref_ali2d(soft_mask(20), 0, blob(20, 2, -1), falling(0.2, n_rings=11))
    assert not shift.any()


def test_the_reference_function_is_found_by_name():
    assert reference.find_function("ref_ali2d") is reference.ref_ali2d
    with pytest.raises(InputError, match="function=ref_ali3d is not known: give one of ref_ali2d"):
        reference.find_function("ref_ali3d")
