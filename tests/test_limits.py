"""The Cramer-Rao bound: against the formula in real space, and against estimates that reach it."""

import numpy as np
import pytest

from mrefali import ctf, geometry
from mrefali.limits import cramer_rao, information
from mrefali.simulation import Views, make_views, render

BOX = 48


def view_of(seed=2):
    views = make_views(1, BOX, seed=seed)
    return views, render(views, np.zeros(1, int), geometry.identity_poses(1))[0].astype(float)


def test_a_round_gaussian_has_the_bound_of_the_formula():
    # f = exp(-r^2 / (2 s^2)): the integral of (df/dx)^2 is pi / 2, whatever s
    blob = Views(BOX, np.zeros((1, 1, 2)), np.array([2.0]), np.array([1.0]))
    image = render(blob, np.zeros(1, int), geometry.identity_poses(1))[0]
    total = information(image).sum(axis=0)
    np.testing.assert_allclose(total[:2, :2], np.pi / 2 * np.eye(2), atol=1e-5)
    np.testing.assert_allclose(total[2], 0, atol=1e-5)  # it looks the same however it is turned


def test_a_blob_off_the_centre_tells_its_angle_by_its_distance():
    blob = Views(BOX, np.array([[[6.0, 0.0]]]), np.array([2.0]), np.array([1.0]))
    total = information(render(blob, np.zeros(1, int), geometry.identity_poses(1))[0]).sum(axis=0)
    # turned by one degree it moves 6 px pi/180 along y; p' = R p carries +x to -y
    arm = 6 * np.pi / 180
    np.testing.assert_allclose(total, np.pi / 2 * np.array([[1, 0, 0], [0, 1, -arm], [0, -arm, arm**2]]), atol=1e-5)


@pytest.mark.parametrize("box", [64, 65])
def test_the_rings_add_up_to_the_sum_over_pixels(box):
    views, only = make_views(1, box, seed=3), np.zeros(1, int)

    def moved(pose):
        return render(views, only, geometry.invert(geometry.make_poses(*pose[:, None])))[0].astype(float)

    steps = 0.05 * np.eye(3)[[1, 2, 0]]  # sx, sy, alpha of (alpha, sx, sy)
    differences = [(moved(step) - moved(-step)) / 0.1 for step in steps]
    expected = np.einsum("iyx,jyx->ij", differences, differences)
    total = information(render(views, only, geometry.identity_poses(1))[0]).sum(axis=0)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # the narrowest blobs, of sigma 0.8 px, have (2 pi 0.5)^2 exp(-(2 pi 0.5 0.8)^2) = 0.02 of their steepest slope at
    # the highest frequency, where pixels alias
    np.testing.assert_allclose(total / scale, expected / scale, atol=0.02)


def estimates(views, truth, images, filtered, rounds=3):
    """Poses by maximum likelihood: least squares from the truth, derivatives by differences of rendered images."""
    found, step = truth.copy(), {"alpha": 0.1, "sx": 0.01, "sy": 0.01}

    def model(poses):
        return filtered(render(views, np.zeros(len(poses), int), poses).astype(float)).reshape(len(poses), -1)

    for _ in range(rounds):
        jacobian = []
        for name, size in step.items():
            ahead, behind = found.copy(), found.copy()
            ahead[name] += size
            behind[name] -= size
            jacobian.append((model(ahead) - model(behind)) / (2 * size))
        jacobian = np.stack(jacobian, axis=-1)
        residual = images.reshape(len(images), -1) - model(found)
        normal = np.einsum("pij,pik->pjk", jacobian, jacobian)
        change = np.linalg.solve(normal, np.einsum("pij,pi->pj", jacobian, residual)[..., None])[..., 0]
        for name, values in zip(step, change.T, strict=True):
            found[name] += values
    return found


def check_that_the_bound_is_reached(filtered, ctf_sq, snr=10.0, n=2000):
    views, view = view_of()
    rng = np.random.default_rng(8)
    truth = geometry.make_poses(rng.uniform(0, 360, n), *rng.uniform(-2, 2, (2, n)), rng.integers(2, size=n))
    clean = filtered(render(views, np.zeros(n, int), truth).astype(float))
    variance = clean.var() / snr
    images = clean + np.sqrt(variance) * rng.standard_normal(clean.shape)
    error = geometry.compose(geometry.invert(truth), estimates(views, truth, images, filtered))
    assert not error["mirror"].any()
    alpha = (error["alpha"] + 180) % 360 - 180
    errors = np.stack([error["sx"], error["sy"], alpha], axis=-1)
    # in units of the bound: the identity. A variance of n numbers is known to sqrt(2/n), a covariance to sqrt(1/n);
    # both at four times that
    root = np.linalg.cholesky(np.linalg.inv(cramer_rao(information(view), variance, ctf_sq)))
    measured = root.T @ (errors.T @ errors / n) @ root
    np.testing.assert_allclose(np.diag(measured), 1.0, atol=4 * np.sqrt(2 / n))
    np.testing.assert_allclose(measured - np.diag(np.diag(measured)), 0.0, atol=4 * np.sqrt(1 / n))


def test_maximum_likelihood_reaches_the_bound_at_high_snr():
    check_that_the_bound_is_reached(lambda images: images, None)


def test_maximum_likelihood_reaches_the_bound_under_a_ctf():
    # round, and of little enough defocus that its rings are wider than a Fourier pixel
    parameters = np.array((0.3, 0, 0, 0, 10, 300, 2.7, 2.0, 0), ctf.CTF_PARAMETERS)
    transfer = ctf.ctf(parameters, BOX)

    def filtered(images):
        return np.fft.irfft2(np.fft.rfft2(images) * transfer, s=(BOX, BOX))

    check_that_the_bound_is_reached(filtered, ctf.ctf_sq(parameters, BOX))


def test_the_bound_goes_with_the_noise():
    _, view = view_of()
    one, four = cramer_rao(information(view), np.array([1.0, 4.0]))
    np.testing.assert_allclose(four, 4 * one)
