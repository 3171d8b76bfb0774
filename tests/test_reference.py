"""Filter, centring and every reference function, built in or the user's own; against slow twins and analytic blobs."""

import naive
import numpy as np
import pytest
import small
from test_average import BOXES, noise, soft_mask

import mrefali
from mrefali import cli, reference
from mrefali.errors import InputError
from mrefali.geometry import disc

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


# --- centring by correlation


def particle(box, x, y):
    """A blob between two smaller ones: no rotation but a half turn leaves it as it is."""
    return blob(box, x, y, 4) + 0.5 * blob(box, x + 4, y + 2, 2) + 0.5 * blob(box, x - 4, y - 2, 2)


@pytest.mark.parametrize("center", [2, 3])
@pytest.mark.parametrize("box", [48, 49])
@pytest.mark.parametrize("radius", [10, 19])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (2, -1), (-3.5, 2.25), (0.4, -0.3), (5.3, 4.6)])
def test_a_centre_by_correlation_is_within_a_tenth_of_a_pixel(center, box, radius, x, y):
    """Whether the particle fills the mask or is half its size."""
    found = reference.find_center(particle(box, x, y), disc(box, radius).astype(float), center)
    assert np.hypot(*(found - (x, y))) < reference.CENTERED_PX


@pytest.mark.parametrize("center", [2, 3])
@pytest.mark.parametrize("function", ["ref_unfiltered", "ref_ali2d", "ref_lowpass,0.3"])
@pytest.mark.parametrize("box", [48, 49])
def test_the_mask_that_cuts_the_average_does_not_pull_the_centre(center, function, box):
    """Nor does the mean that is taken off within it; and a reference in the middle stays there."""
    table = falling(0.3, n_rings=box // 2 + 1)
    for x, y in ((0, 0), (3.25, -2.5)):
        made, shift, _ = reference.find_function(function)(
            disc(box, 19).astype(float), center, 3 + particle(box, x, y), table)
        assert np.hypot(*(shift + (x, y))) < reference.CENTERED_PX
        assert np.hypot(*reference.correlation_peak(made, particle(box, 0, 0))) < 2 * reference.CENTERED_PX


def test_a_mask_off_the_middle_is_where_the_particle_comes_to_lie():
    mask = np.roll(disc(48, 12), (-4, 6), (0, 1)).astype(float)
    assert reference.find_center(particle(48, 1, 2), mask, 2) == pytest.approx((1 - 6, 2 + 4), abs=0.1)


def test_a_dark_particle_is_centred_by_its_own_rotations_too():
    assert reference.find_center(-particle(48, 2, -3), disc(48, 19), 3) == pytest.approx((2, -3), abs=0.1)


def test_the_depth_of_a_mask_is_the_distance_from_its_edge():
    mask = np.zeros((9, 9))
    mask[2:7, 2:7] = 1
    assert reference.mask_depth(mask)[4].tolist() == [0, 0, 1, 2, 3, 2, 1, 0, 0]
    assert reference.mask_depth(np.ones((5, 5)))[2].tolist() == [1, 2, 3, 2, 1]
    assert reference.mask_depth(mask * 0.6).max() == 3
    assert reference.mask_depth(mask * 0.5).max() == 0


@pytest.mark.parametrize("box", [8, 9])
def test_a_rotational_average_holds_on_each_ring_the_mean_of_it(box):
    image = noise(box, box).astype(float)
    turned = reference.rotational_average(image)
    d = np.arange(box) - box // 2
    ring = np.rint(np.hypot(d[:, None], d))
    for r in np.unique(ring):
        np.testing.assert_allclose(turned[ring == r], image[ring == r].mean(), rtol=0, atol=1e-12)


# --- the other built-in functions


def masked(image, mask):
    return (image - image[mask > 0.5].mean()) * mask


@pytest.mark.parametrize("box", [20, 21])
def test_ref_unfiltered_masks_and_centres_only(box):
    mask, image = soft_mask(box), noise(box, box).astype(float)
    made, shift, *fitted = reference.ref_unfiltered(mask, 1, image, falling(0.2, n_rings=box // 2 + 1))
    assert -shift == pytest.approx(naive.phase_center(masked(image, mask)), abs=1e-9)
    np.testing.assert_allclose(made, naive.fourier_shift(masked(image, mask), *shift), rtol=0, atol=1e-9)
    assert fitted == [None]


@pytest.mark.parametrize(("text", "cutoff", "falloff"), [
    ("ref_lowpass,0.2", 0.2, 0.2), ("ref_lowpass,0.31,0.05", 0.31, 0.05), ("ref_lowpass,.5,2", 0.5, 2)])
def test_ref_lowpass_filters_the_same_whatever_the_frc_is(text, cutoff, falloff):
    mask, image = soft_mask(20), noise(20, 20).astype(float)
    function = reference.find_function(text)
    for table in (falling(0.15, n_rings=11), frc_table(np.ones(11))):
        made, shift, fitted = function(mask, 0, image, table)
        np.testing.assert_allclose(made, naive.low_pass(masked(image, mask), cutoff, falloff), rtol=0, atol=1e-9)
        assert (fitted, shift.tolist()) == (reference.TanhFilter(cutoff, falloff), [0, 0])


def asymmetric(box):
    return blob(box, 5, 1, 2) + 0.7 * blob(box, -2, 4, 2.5) + 0.4 * blob(box, 1, -5, 1.8)


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("order", [2, 3, 4, 7])
def test_ref_symmetry_makes_an_average_that_a_turn_by_the_nth_part_leaves_as_it_is(box, order):
    """Held against a turn about the middle in closed form: the blobs are turned, no pixel is interpolated."""
    mask, table = disc(box, 14).astype(float), falling(0.3, n_rings=box // 2 + 1)
    made, shift, fitted = reference.find_function(f"ref_symmetry,{order}")(mask, 0, asymmetric(box), table)
    angles = 2 * np.pi * np.arange(order) / order
    turned = sum(height * blob(box, x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a), sigma)
                 for height, x, y, sigma in ((1, 5, 1, 2), (0.7, -2, 4, 2.5), (0.4, 1, -5, 1.8)) for a in angles)
    expected, *_ = reference.ref_ali2d(mask, 0, turned / order, table)
    inside = disc(box, 12)
    assert np.abs(made - expected)[inside].max() < 0.02 * np.ptp(expected)
    once, *_ = reference.ref_ali2d(mask, 0, asymmetric(box), table)
    assert np.abs(once - expected)[inside].max() > 0.2 * np.ptp(expected)
    assert (fitted, shift.tolist()) == (reference.fit_filter(table), [0, 0])


def test_a_turn_by_a_quarter_moves_no_pixel_of_an_average_of_fourfold_symmetry():
    made, *_ = reference.find_function("ref_symmetry,4")(
        disc(33, 14).astype(float), 0, asymmetric(33), falling(0.3, n_rings=17))
    np.testing.assert_allclose(np.rot90(made), made, rtol=0, atol=1e-5 * np.ptp(made))


def test_symmetry_is_about_the_centre_that_was_found():
    """A particle of threefold symmetry off the centre stays as sharp as it is."""
    angles = np.deg2rad([10, 130, 250])
    image = sum(blob(48, 2.5 + 6 * np.cos(a), -3 + 6 * np.sin(a), 2.5) for a in angles)
    mask, table = disc(48, 20).astype(float), falling(0.3, n_rings=25)
    made, shift, _ = reference.find_function("ref_symmetry,3")(mask, 3, image, table)
    plain, *_ = reference.ref_ali2d(mask, 3, image, table)
    assert shift == pytest.approx((-2.5, 3), abs=0.1)
    assert np.abs(made - plain)[disc(48, 14)].max() < 0.05 * np.ptp(plain)


def test_symmetry_of_order_1_is_ref_ali2d():
    mask, table = soft_mask(20), falling(0.2, n_rings=11)
    made, *_ = reference.find_function("ref_symmetry,1")(mask, 0, noise(20, 20), table)
    plain, *_ = reference.ref_ali2d(mask, 0, noise(20, 20), table)
    np.testing.assert_allclose(made, plain, rtol=0, atol=1e-6)


# --- what --function may name


def test_a_built_in_function_is_found_by_name():
    assert reference.find_function("ref_ali2d") is reference.ref_ali2d
    assert reference.find_function("ref_unfiltered") is reference.ref_unfiltered
    assert reference.find_function("ref_symmetry,4").__name__ == "ref_symmetry,4"


@pytest.mark.parametrize(("text", "message"), [
    ("ref_ali3d", "function=ref_ali3d is not known: give one of ref_ali2d, ref_unfiltered, ref_lowpass, ref_symmetry, "
                  "or file.py:name or module:name of your own$"),
    ("", "function= is not known"),
    ("ref_ali2d,1", "function=ref_ali2d,1 is not allowed: give ref_ali2d, with numbers$"),
    ("ref_lowpass", r"function=ref_lowpass is not allowed: give ref_lowpass,CUTOFF,\[FALLOFF\], with numbers$"),
    ("ref_lowpass,0.2,0.1,3", "function=ref_lowpass,0.2,0.1,3 is not allowed"),
    ("ref_lowpass,nan", "function=ref_lowpass,nan is not allowed"),
    ("ref_lowpass,0", "function=ref_lowpass,0,0.2 is not allowed: give a cutoff above 0 to 0.5 in 1/px"),
    ("ref_lowpass,0.6", "function=ref_lowpass,0.6,0.2 is not allowed: give a cutoff above 0 to 0.5 in 1/px"),
    ("ref_lowpass,0.2,0", "function=ref_lowpass,0.2,0 is not allowed: .* a relative falloff above 0 to 2$"),
    ("ref_symmetry", "function=ref_symmetry is not allowed: give ref_symmetry,ORDER, with numbers$"),
    ("ref_symmetry,four", "function=ref_symmetry,four is not allowed: give ref_symmetry,ORDER, with numbers$"),
    *[(f"ref_symmetry,{order}", f"function=ref_symmetry,{shown} is not allowed: give a whole number from 1 to 360$")
      for order, shown in (("0", "0"), ("-2", "-2"), ("2.5", "2.5"), ("1e9", r"1e\+09"))],
    ("no_such_module:name", "function=no_such_module:name: No module named 'no_such_module': give module:name or path"),
    ("math:no_such_name", "function=math:no_such_name: math has no function no_such_name: give module:name"),
    ("math:pi", "function=math:pi: math has no function pi"),
    ("math:", "function=math:: math has no function : give"),
    (":name", "function=:name: '' names no module: give module:name or path/to/file.py:name"),
    (".relative:name", "function=.relative:name: '.relative' names no module"),
    ("some/file:name", "function=some/file:name: 'some/file' names no module"),
])
def test_a_name_or_parameter_that_cannot_be_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        reference.find_function(text)


OWN = """
import numpy as np

def flat(mask, center, average, frc):
    return average.mean() * mask, np.zeros(2)
"""


def test_a_function_of_a_file_is_found(tmp_path):
    file = tmp_path / "own functions.py"
    file.write_text(OWN)
    function = reference.find_function(f"{file}:flat")
    assert function.__name__ == f"{file}:flat"
    made, shift = function(np.ones((4, 4)), 1, np.full((4, 4), 3.0), None)
    assert (made.tolist(), shift.tolist()) == ([[3] * 4] * 4, [0, 0])
    with pytest.raises(InputError, match=r"own functions\.py has no function round: give module:name or path/to/file"):
        reference.find_function(f"{file}:round")
    with pytest.raises(FileNotFoundError, match=r"other\.py:flat: there is no file .*other\.py: give path/to/file\.py"):
        reference.find_function(f"{tmp_path}/other.py:flat")


def test_a_function_of_a_module_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/functions.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    made, _ = reference.find_function("own_package.functions:flat")(np.ones((4, 4)), 1, np.full((4, 4), 3.0), None)
    assert made.tolist() == [[3] * 4] * 4


def averages_by(folder, text):
    """Averages and the rows of history.csv of one iteration of the small job at the command line."""
    words = *small.write(folder), str(folder / "out"), *small.WORDS, "--maxit=1", f"--function={text}"
    assert cli.main(["mref_ali2d", *words]) == 0
    return mrefali.open_stack(folder / "out/aqm000.hdf").read(0, 2), small.read_table(folder / "out/history.csv")


@pytest.mark.parametrize(("text", "cutoffs", "falloffs"), [
    ("ref_unfiltered", [None, None], [None, None]), ("ref_lowpass,0.25", [0.25] * 2, [0.2] * 2)])
def test_the_main_job_filters_as_it_is_told(tmp_path, text, cutoffs, falloffs):
    averages, history = averages_by(tmp_path, text)
    assert (history["filter_cutoff"], history["filter_falloff"]) == (cutoffs, falloffs)
    high = np.hypot(np.fft.fftfreq(small.BOX)[:, None], np.fft.fftfreq(small.BOX)) > 0.4
    power = (np.abs(np.fft.fft2(averages)) ** 2)[:, high].mean(axis=1)
    assert (power > 1).all() if text == "ref_unfiltered" else (power < 0.1).all()


def test_the_main_job_imposes_symmetry(tmp_path):
    for average in averages_by(tmp_path, "ref_symmetry,2")[0]:
        turned = average[:0:-1, :0:-1]  # about pixel n//2
        np.testing.assert_allclose(turned, average[1:, 1:], rtol=0, atol=1e-5 * np.ptp(average))


def test_the_main_job_runs_a_function_of_a_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    for average in averages_by(tmp_path, f"{tmp_path / 'own.py'}:flat")[0]:
        assert np.ptp(average[disc(small.BOX, 6)]) == 0
        assert average[~disc(small.BOX, 6)].any() == 0
