"""The CTF: header strings, the functions against their slow twins, the particles, and the golden case."""

import naive_ctf
import numpy as np
import pytest
from golden import load
from hypothesis import given
from hypothesis import strategies as st

from mrefali import average, geometry
from mrefali.ctf import (
    CTF_PARAMETERS,
    LIMITS,
    CtfKernels,
    ctf,
    ctf_sq,
    format_ctf,
    n_radii,
    parse_ctf,
    premultiply,
    wavelength_A,
    wiener_divide,
)
from mrefali.errors import InputError
from mrefali.reference import ref_ali2d
from mrefali.search import Search, align, ring_spectra

STRING = "E1.9 0.2 72 50 10 300 2 4 0 0 0"
ASTIGMATIC = parse_ctf(STRING)


def parameters(n_images):
    """Parameters of so many images, each with its own defocus, (n_images,) CTF_PARAMETERS."""
    all_of_them = np.full(n_images, ASTIGMATIC)
    all_of_them["defocus_um"] += 0.1 * np.arange(n_images)
    return all_of_them


def noise(n_images, n):
    return np.random.default_rng(n).standard_normal((n_images, n, n)).astype(np.float32)


# --- header strings


def test_an_eman2_string_is_eight_numbers_in_the_order_of_the_fields():
    assert ASTIGMATIC.dtype == CTF_PARAMETERS
    assert ASTIGMATIC.item() == (1.9, 0.2, 72, 50, 10, 300, 2, 4, 0)


def test_the_curves_that_may_follow_are_not_used():
    assert parse_ctf("E1.9 0.2 72 50 10 300 2 4 0.01 2,0.5,0.25 3,1,2,3") == ASTIGMATIC
    assert parse_ctf("E1.9 0.2 72 50 10 300 2 4") == ASTIGMATIC


def test_an_eman1_string_is_turned_into_the_units_of_eman2():
    """EMAN1: underfocus negative, amplitudes fall by exp(-B k^2), amplitude contrast a fraction."""
    found = parse_ctf("O-1.9 12.5 1 0.1 0 17.4 9 1.53 300 2 4")
    assert found.tolist() == pytest.approx((1.9, 0, 0, 50, 10, 300, 2, 4, 0))
    assert ctf(found, 32) == pytest.approx(ctf(parse_ctf("E1.9 0 0 50 10 300 2 4 0 0 0"), 32), abs=1e-12)


def with_phase_shift(degrees):
    shifted = ASTIGMATIC.copy()
    shifted["phase_shift_deg"] = degrees
    return shifted


def test_a_phase_shift_adds_to_the_phase():
    """Two CTFs a quarter turn apart are sine and cosine of the same phase."""
    envelope = np.exp(-50 / 4 * np.hypot(np.fft.rfftfreq(32, 4), np.fft.fftfreq(32, 4)[:, None]) ** 2)
    squares = ctf(ASTIGMATIC, 32) ** 2 + ctf(with_phase_shift(90), 32) ** 2
    np.testing.assert_allclose(squares, envelope**2, rtol=1e-9)
    assert ctf(with_phase_shift(90), 32)[0, 0] == pytest.approx(np.cos(np.arcsin(0.1)))
    np.testing.assert_allclose(ctf_sq(with_phase_shift(180), 32), ctf_sq(ASTIGMATIC, 32), rtol=0, atol=1e-12)


@pytest.mark.parametrize("degrees", [-5, 40, 84])
def test_a_string_holds_a_phase_shift_as_amplitude_contrast(degrees):
    shifted = with_phase_shift(degrees)
    np.testing.assert_allclose(ctf(parse_ctf(format_ctf(shifted)), 32), ctf(shifted, 32), rtol=0, atol=1e-8)


@pytest.mark.parametrize("degrees", [-6, 85, 180])
def test_a_phase_shift_that_no_amplitude_contrast_stands_for_is_refused(degrees):
    with pytest.raises(InputError, match=f"^ctf: phase_shift_deg={degrees} with ampcont_percent=10 cannot be held"):
        format_ctf(with_phase_shift(degrees))


def test_an_eman1_contrast_above_1_is_per_cent():
    assert parse_ctf("O-1.9 12.5 1 7 0 17.4 9 1.53 300 2 4")["ampcont_percent"] == 7


@given(st.tuples(*(st.floats(low, high) for name, (low, high) in LIMITS.items() if name != "phase_shift_deg"),
                 st.just(0.0)))
def test_format_and_parse_are_inverse_to_nine_digits(values):
    text = format_ctf(np.array(values, CTF_PARAMETERS))
    assert parse_ctf(text).tolist() == pytest.approx(values, rel=1e-9)
    assert format_ctf(parse_ctf(text)) == text


@pytest.mark.parametrize(("text", "message"), [
    ("", r"^ctf='' is not understood: give E and at least 8 numbers \(EMAN2\), or O and 11 \(EMAN1\)$"),
    ("1.9 0.2 72 50 10 300 2 4", "^ctf='1.9 .* is not understood: give E"),
    ("E1.9 0.2 72 50 10 300 2", "is not understood: give E and at least 8 numbers"),
    ("O-1.9 12.5 1 0.1 0 17.4 9 1.53 300 2", r"is not understood: .* O and 11 \(EMAN1\)"),
    ("E1.9 0.2 72 fifty 10 300 2 4", "is not understood: all that follows the letter must be numbers$"),
    ("E1.9 0.2 72 50 10 0 2 4 0 0 0",
     "^ctf: voltage_kV=0 makes no sense: 10 to 3000 is allowed; correct the header, or leave --CTF out$"),
    ("E1.9 0.2 72 50 10 300000 2 4 0 0 0", "voltage_kV=300000 makes no sense"),
    ("E1.9 0.2 72 50 10 300 2 0 0 0 0", "pixel_size_A=0 makes no sense: 0.01 to 1000 is allowed"),
    ("E1.9 0.2 72 50 10 300 2 -4 0 0 0", "pixel_size_A=-4 makes no sense"),
    ("E19000 0.2 72 50 10 300 2 4 0 0 0", "defocus_um=19000 makes no sense: -100 to 100"),
    ("Enan 0.2 72 50 10 300 2 4 0 0 0", "defocus_um=nan makes no sense"),
    ("E1.9 inf 72 50 10 300 2 4 0 0 0", "dfdiff_um=inf makes no sense"),
    ("E1.9 0.2 -inf 50 10 300 2 4 0 0 0", "dfang_deg=-inf makes no sense"),
    ("E1.9 0.2 72 -50 10 300 2 4 0 0 0", "bfactor_A2=-50 makes no sense: 0 to 100000"),
    ("E1.9 0.2 72 50 101 300 2 4 0 0 0", "ampcont_percent=101 makes no sense: 0 to 100"),
    ("E1.9 0.2 72 50 10 300 2e7 4 0 0 0", r"cs_mm=2e\+07 makes no sense"),
    ("O-1.9 12.5 1 0.1 0 17.4 9 1.53 0 2 4", "voltage_kV=0 makes no sense"),
])
def test_nonsense_is_refused_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as refusal:
        parse_ctf(text)
    assert "\n" not in str(refusal.value)


def test_a_long_string_is_cut_in_the_message():
    with pytest.raises(InputError, match=r"\.\.\.' is not understood") as refusal:
        parse_ctf("X" + "1 " * 1000)
    assert len(str(refusal.value)) < 250


# --- the functions


def test_the_wavelength_at_300_kV_is_0_0197_A():
    assert wavelength_A(300.0) == pytest.approx(0.01969, abs=1e-5)


@pytest.mark.parametrize("n", [32, 33])
@pytest.mark.parametrize("text", [STRING, "E-0.7 -0.3 10 0 0 120 -0.01 1.1", "E3 0 0 200 99 200 2.7 2"])
def test_ctf_equals_the_naive_twin(n, text):
    p = parse_ctf(text)
    assert ctf(p, n) == pytest.approx(naive_ctf.ctf_grid(n, *p.item()), abs=1e-10)


def test_the_ctf_at_zero_frequency_is_the_amplitude_contrast():
    assert ctf(ASTIGMATIC, 32)[0, 0] == pytest.approx(0.1)
    assert ctf(parse_ctf("E1.9 0.2 72 50 100 300 2 4"), 32)[0, 0] == pytest.approx(1)


def test_dfang_0_lowers_the_defocus_most_between_plus_x_and_plus_y():
    p, higher, lower = (parse_ctf(f"E{dz} {d} 0 0 0 300 0 4") for dz, d in ((2, 0.5), (2.25, 0), (1.75, 0)))
    found = ctf(p, 32)
    assert found[5, 5] == pytest.approx(ctf(lower, 32)[5, 5])
    assert found[-5, 5] == pytest.approx(ctf(higher, 32)[5, 5])
    assert found[0, 5] == pytest.approx(ctf(parse_ctf("E2 0 0 0 0 300 0 4"), 32)[0, 5])


def test_ctf_sq_ignores_astigmatism_and_reaches_the_corner():
    table = ctf_sq(parameters(3), 33)
    assert table.shape == (3, n_radii(33))
    assert n_radii(33) - 1 >= np.hypot(16, 16)
    for row, p in zip(table, parameters(3), strict=True):
        assert row == pytest.approx(naive_ctf.ctf_sq(33, *p)[:n_radii(33)], abs=1e-12)
    assert table[0] == pytest.approx(ctf_sq(parse_ctf("E1.9 0 0 50 10 300 2 4"), 33))


@pytest.mark.parametrize("n", [32, 33])
def test_wiener_divide_equals_the_naive_twin(n):
    sums, weights = noise(1, n)[0].astype(np.float64), ctf_sq(parameters(5), n).sum(axis=0)
    expected = naive_ctf.wiener_divide(sums, np.pad(weights, (0, n - n_radii(n))), 0.3)
    assert wiener_divide(sums, weights, 0.3) == pytest.approx(expected, abs=1e-10)


def test_wiener_divide_without_ctf_multiplies_by_the_snr():
    sums = noise(1, 16)[0].astype(np.float64)
    assert wiener_divide(sums, np.zeros(n_radii(16)), 0.25) == pytest.approx(sums / 4)


# --- the particles


@pytest.mark.parametrize("n", [32, 33])
def test_premultiply_equals_the_naive_twin_but_for_a_constant(n):
    images, outside = noise(20, n) + 100, ~geometry.disc(n, n // 2 - 3)
    found = images.copy()
    premultiply(found, parameters(20), np.zeros(20, bool), CtfKernels(n))
    for image, before, p in zip(found, images, parameters(20), strict=True):
        difference = image - naive_ctf.premultiply(before.astype(np.float64), outside, p)
        assert np.ptp(difference) < 1e-4
    assert found.dtype == np.float32


def test_particles_multiplied_already_are_left_alone():
    images, applied = noise(40, 32), np.arange(40) % 3 == 0
    found, everywhere = images.copy(), images.copy()
    premultiply(found, parameters(40), applied, CtfKernels(32))
    premultiply(everywhere, parameters(40), np.zeros(40, bool), CtfKernels(32))
    assert np.array_equal(found[applied], images[applied])
    assert np.array_equal(found[~applied], everywhere[~applied])
    assert not np.array_equal(found[~applied], images[~applied])


@pytest.mark.parametrize("n", [32, 33, 64])
def test_a_particle_gives_the_same_bits_alone_and_in_any_block(n):
    images, p, kernels = noise(23, n), parameters(23), CtfKernels(n)
    together, alone = images.copy(), images.copy()
    premultiply(together, p, np.zeros(23, bool), kernels)
    for i in range(23):
        premultiply(alone[i:i + 1], p[i:i + 1], np.zeros(1, bool), kernels)
        assert np.array_equal(ctf_sq(p, n)[i], ctf_sq(p[i], n))
    assert np.array_equal(together, alone)


def test_a_kernel_is_the_ctf_of_the_doubled_box_and_read_only():
    kernel = CtfKernels(32)(ASTIGMATIC)
    assert kernel.dtype == np.float32
    assert kernel == pytest.approx(ctf(ASTIGMATIC, 64), abs=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        kernel[0, 0] = 1


class CountingKernels(CtfKernels):
    computed = 0

    def _compute(self, values):
        self.computed += 1
        return super()._compute(values)


def test_a_kernel_is_computed_once_per_distinct_set_of_parameters():
    kernels, p = CountingKernels(16), parameters(4)[np.arange(40) % 4]
    for _ in range(3):  # as many iterations
        premultiply(noise(40, 16), p, np.zeros(40, bool), kernels)
    assert kernels.computed == 4


def test_kernels_are_held_within_the_bytes_given():
    size = CtfKernels(16)(ASTIGMATIC).nbytes
    kernels, p = CountingKernels(16, n_bytes=3 * size), parameters(4)
    for i in (0, 1, 2, 3, 3):
        kernels(p[i])
    assert kernels.computed == 4
    kernels(p[0])  # had to go
    assert kernels.computed == 5


def test_a_box_too_large_for_the_bytes_given_still_holds_one_kernel():
    kernels = CountingKernels(16, n_bytes=1)
    assert np.array_equal(kernels(ASTIGMATIC), kernels(ASTIGMATIC))
    assert kernels.computed == 1


# --- the golden case


@pytest.mark.jit_only
def test_two_iterations_of_the_golden_case_agree_with_the_original():
    """To its tolerances: premultiplied once, then normalised; Wiener division in place of that by the count."""
    case = load("ctf")
    inside, snr = geometry.disc(64, case.call["ou"]), case.call["snr"]
    search = Search(64, 1, case.call["ou"], 1, case.call["xrng"], case.call["yrng"], 1)
    p = np.array([parse_ctf(h["ctf"]) for h in case.headers])
    images, references = case.images.copy(), case.references
    premultiply(images, p, np.array([h["ctf_applied"] == 1 for h in case.headers]), CtfKernels(64))
    average.normalize_particles(images, inside)
    poses, weights, odd = geometry.identity_poses(len(images)), ctf_sq(p, 64), np.arange(len(images)) % 2 == 1
    for iteration, tight in enumerate((True, False)):
        spectra = ring_spectra(average.normalize_references(references, inside), search)
        found = align(images, poses, spectra, search)
        poses, references = found.poses.copy(), np.empty_like(references)
        for k in range(3):
            mine = found.assign == k
            moved, w = average.transform(images, poses).astype(np.float64), weights
            sums = [(moved[half].sum(axis=0), w[half].sum(axis=0)) for half in (mine & ~odd, mine & odd, mine)]
            even_half, odd_half, both = (wiener_divide(*pair, snr) for pair in sums)
            frc = average.frc(even_half, odd_half)
            references[k], shift, _ = ref_ali2d(inside.astype(float), 1, both, frc)
            poses[mine] = geometry.compose(poses[mine], geometry.make_poses(0.0, *shift))
            expected = case.expected[f"aqm{iteration:03d}"][k]
            assert frc == pytest.approx(case.expected[f"drm_{iteration:03d}_{k:04d}"], abs=0.002)
            assert np.abs(references[k] - expected).max() < 0.01 * expected.std()
            assert np.corrcoef(references[k].ravel(), expected.ravel())[0, 1] > (0.99999 if tight else 0.999)
        assign, alpha, sx, sy, mirror = case.expected[f"params_{iteration + 1}"].T
        assert np.array_equal(found.assign, assign)
        assert np.array_equal(poses["mirror"], mirror)
        assert np.abs((poses["alpha"] - alpha + 180) % 360 - 180).max() < (0.02 if tight else 0.1)
        assert np.hypot(poses["sx"] - sx, poses["sy"] - sy).max() < (0.002 if tight else 0.05)
        assert average.criterion(references, inside) == pytest.approx(case.expected["criterion"][iteration], rel=1e-4)


@pytest.mark.slow
def test_the_naive_run_agrees_with_the_original():
    case = load("ctf")
    p = [parse_ctf(h["ctf"]).item() for h in case.headers]
    history = naive_ctf.run(
        case.images, p, [h["ctf_applied"] for h in case.headers], case.call["snr"], list(case.references),
        geometry.identity_poses(len(p)), geometry.disc(64, 26).astype(float), 1, 26, 1, 2, 2, 1, 1, iterations=2)
    for iteration, found in enumerate(history):
        expected = case.expected[f"aqm{iteration:03d}"]
        assert np.array_equal(found["assign"], case.expected[f"params_{iteration + 1}"][:, 0])
        assert np.abs(found["averages"] - expected).max() < 0.01 * expected.std()
        assert found["criterion"] == pytest.approx(case.expected["criterion"][iteration], rel=1e-4)
