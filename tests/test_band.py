"""The band of the alignment: which frequencies pass, in which iteration, and what it is good for."""

import numpy as np
import pytest

from mrefali import align
from mrefali.band import Band
from mrefali.geometry import disc, make_poses
from mrefali.simulation import simulate_particles


def wave(frequency, n=64):
    """Two cosines of whole periods in an image, across and down, (1, n, n) float32."""
    x = 2 * np.pi * round(frequency * n) / n * np.arange(n)
    return (np.cos(x)[None, :] + np.cos(x)[:, None])[None].astype(np.float32)


def passed(band, frequency, number=0):
    return float(band.filtered(wave(frequency), number, disc(64, 30)).std() / wave(frequency).std())


def test_the_low_pass_opens_evenly_and_the_last_iteration_has_none():
    band = Band(lowpass=0.1, n_iterations=5)
    assert [band.lowpass_at(i) for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert band.lowpass_at(4) is None
    assert Band(lowpass=0.1, n_iterations=1).lowpass_at(0) == 0.1
    assert Band().lowpass_at(0) is None


def test_frequencies_inside_the_band_pass_and_others_do_not():
    band = Band(lowpass=0.25, highpass=0.0625, n_iterations=2)
    assert passed(band, 0.03125) < 0.01
    assert passed(band, 0.0625) == pytest.approx(0.5, abs=0.01)
    assert passed(band, 0.125) > 0.99
    assert passed(band, 0.25) == pytest.approx(0.5, abs=0.01)
    assert passed(band, 0.34375) < 0.02
    assert passed(band, 0.34375, number=1) > 0.99
    assert passed(band, 0.03125, number=1) < 0.01


def test_without_a_band_references_are_what_they_are():
    references = wave(0.1)
    assert Band().filtered(references, 0, disc(64, 30)) is references


def test_no_plane_correlates_with_what_a_high_pass_leaves():
    y, x = np.indices((48, 48)) - 24
    made, inside = simulate_particles(2, 2, 48, snr=np.inf, seed=3), disc(48, 20)
    band = Band(highpass=0.06)
    straight = band.filtered(made.views, 0, inside)
    sloping = band.filtered(made.views + (0.5 * x - 2 * y + 3).astype(np.float32), 0, inside)
    for plane in (np.ones((48, 48)), x, y):
        products = (straight * plane)[:, inside]
        # rounding to float32 leaves this, times the root of the number of pixels
        assert np.abs(products.sum(axis=1)).max() < 1e-7 * np.abs(products).sum(axis=1).min()
    # and a gradient of the reference leaves nothing: float32 carries 2 * 24 to 4e-6
    np.testing.assert_allclose(sloping, straight, atol=1e-5)


@pytest.mark.jit_only
@pytest.mark.parametrize("subpixel", [False, True])
def test_a_high_pass_keeps_the_alignment_off_a_slow_gradient(subpixel):
    made = simulate_particles(120, 1, 48, snr=1.0, max_shift=1.0, mirror=False, seed=3)
    y, x = (np.indices((48, 48)) - 24) / 24
    direction = np.random.default_rng(0).uniform(0, 2 * np.pi, 120)[:, None, None]
    # the reference has a gradient too, as the average of a stack of such particles has
    slope = made.views.std() * 8
    images = made.images + (slope * (np.cos(direction) * x + np.sin(direction) * y)).astype(np.float32)
    reference = made.views + (slope * x).astype(np.float32)

    def right(**band):
        found = align(images, reference, ou=20, xr=2, yr=2, center=0, maxit=1, quiet=True, subpixel=subpixel, **band)
        turn = (found.poses["alpha"] - made.poses["alpha"] + 180) % 360 - 180
        return ((np.abs(turn) < 10) & (found.poses["mirror"] == made.poses["mirror"])).mean(), found

    without, _ = right()
    with_band, found = right(highpass=0.06)
    assert without < 0.2
    assert with_band == 1
    spectrum = np.abs(np.fft.fft2(found.averages[0]))
    assert spectrum[0, 1] > 0.1 * spectrum.max()  # the average has its low frequencies


@pytest.mark.jit_only
def test_the_band_reaches_the_refinement_too():
    made = simulate_particles(8, 1, 48, snr=np.inf, max_shift=1.0, seed=3)
    options = {"ou": 20, "maxit": 1, "center": 0, "subpixel": True, "quiet": True}
    poses = make_poses(made.poses["alpha"], made.poses["sx"], made.poses["sy"])
    assert (align(made.images, made.views, poses, **options).peak
            > 2 * align(made.images, made.views, poses, highpass=0.1, **options).peak).all()
