"""Images as band-limited functions: the convention, how exact, at what cost; and averages made of them."""

import tracemalloc

import naive
import numpy as np
import pytest
import small
from conftest import JIT

from mrefali import align, average, checks, fourier, memory
from mrefali.errors import InputError
from mrefali.fourier import INTERPOLATIONS
from mrefali.geometry import identity_poses, make_poses
from mrefali.io import ArrayStack
from mrefali.parallel import SERIAL
from mrefali.reference import fourier_shift
from mrefali.simulation import Views, render, simulate_particles

# at the highest frequency the narrowest blob has 3e-6 of its spectrum left, and all lie 6 sigmas within the border
BLOBS = Views(40, np.array([[(-3.0, 1.0), (2.5, 3.5), (4.0, -2.0)]]), np.array([1.7, 1.6, 1.8]),
              np.array([1, 0.8, 0.6]))


def random_poses(n, seed=5):
    rng = np.random.default_rng(seed)
    return make_poses(rng.uniform(0, 360, n), *rng.uniform(-2, 2, (2, n)), np.arange(n) % 2)


# ---- images ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("box", [40, 41])
def test_fourier_carries_blobs_onto_their_view(box):
    views = Views(box, BLOBS.centres, BLOBS.sigmas, BLOBS.heights)
    poses = random_poses(6)
    kind = np.zeros(6, int)
    moved = fourier.transform(render(views, kind, poses), poses)
    expected = render(views, kind, identity_poses(6))
    assert np.abs(moved - expected).max() < 1e-5


def test_fourier_errs_much_less_than_quadratic():
    poses, kind = random_poses(4 if JIT else 1), np.zeros(4 if JIT else 1, int)
    images, expected = render(BLOBS, kind, poses), render(BLOBS, kind, identity_poses(len(kind)))
    quadratic, exact = (np.abs(transform(images, poses) - expected).max()
                        for transform in (average.transform, fourier.transform))
    assert quadratic < 0.05  # the two agree on where to
    assert exact < quadratic / 1000


@pytest.mark.parametrize("box", [16, 17])
def test_a_shift_alone_is_a_fourier_shift(box):
    images = np.random.default_rng(1).standard_normal((2, box, box)).astype(np.float32)
    moved = fourier.transform(images, make_poses([0, 0], [1.5, 3], [-0.25, -2]))
    np.testing.assert_allclose(moved[0], fourier_shift(images[0], (1.5, -0.25)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved[1], np.roll(images[1], (-2, 3), (0, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("box", [16, 17])
def test_quarter_turns_and_flips_only_move_pixels(box):
    images = np.random.default_rng(2).standard_normal((3, box, box)).astype(np.float32)
    moved = fourier.transform(images, make_poses([0, 90, 180], 0, 0, [1, 0, 0]))
    c, i = box // 2, np.arange(box)
    flipped = (2 * c - i) % box
    np.testing.assert_array_equal(moved[0], images[0][:, flipped])
    # alpha=90 carries +y to +x: out(x, y) = in(-y, x)
    np.testing.assert_allclose(moved[1], images[1].T[flipped], rtol=0, atol=1e-5)
    np.testing.assert_allclose(moved[2], images[2][flipped][:, flipped], rtol=0, atol=1e-5)


def test_a_turn_there_and_back_loses_nothing():
    image = render(BLOBS, np.zeros(1, int), identity_poses(1))
    turned = image
    for alpha in (37, 113, 210):
        turned = fourier.transform(turned, make_poses([alpha]))
    assert np.abs(turned - image).max() < 1e-5


# Potts and Steidl: 8 samples of a grid twice as fine take a wave for its aliases to 1.3e-6 an axis; the rest is float32
ERROR = 3e-6


@pytest.mark.parametrize("box", [12, 13])
def test_every_wave_of_the_box_is_carried_as_the_direct_sum_says(box):
    half = box // 2
    frequencies = [(kx, ky) for kx in range(half + 1) for ky in range(-half, half + 1)]
    y, x = np.indices((box, box))
    images = np.array([np.cos(2 * np.pi * (kx * x + ky * y) / box + kx) for kx, ky in frequencies], np.float32)
    rng = np.random.default_rng(3)
    poses = make_poses(rng.uniform(1, 359, len(images)), *rng.uniform(-3 * box, 3 * box, (2, len(images))),
                       np.arange(len(images)) % 2)
    for image, pose, moved in zip(images, poses, fourier.transform(images, poses), strict=True):
        np.testing.assert_allclose(moved, naive.fourier_transform(image, pose), rtol=0, atol=ERROR)


def test_a_shift_of_many_boxes_and_a_turn_end_within_the_image():
    image = np.random.default_rng(4).standard_normal((1, 12, 12)).astype(np.float32)
    # boxes along x are, before a turn by 90 degrees, boxes along y: whole periods, which float64 knows to 1e-6 px
    near, far = (fourier.transform(image, make_poses([90.0], 12.0 * boxes + 0.25, 0.5)) for boxes in (0, 10**9))
    np.testing.assert_allclose(far, near, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pose", [(np.nan, 0), (30, np.nan), (30, np.inf)])
def test_a_pose_that_is_no_number_is_an_error_and_no_crash(pose):
    images, poses = np.zeros((2, 8, 8), np.float32), make_poses([30.0, pose[0]], [0.0, pose[1]])
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="pose .* leads nowhere: give finite numbers"):
        fourier.transform(images, poses)


def test_neither_blocks_nor_threads_change_a_bit(monkeypatch, set_threads):
    n, box = 7, 20 if JIT else 12
    images = np.random.default_rng(5).standard_normal((n, box, box)).astype(np.float32)
    poses = random_poses(n)
    poses["alpha"][2] = 0
    whole = fourier.transform(images, poses)
    for threads in (1, 2):
        set_threads(threads)
        for per_block in (1, 2, 3, n):
            monkeypatch.setattr(fourier, "BLOCK_BYTES", per_block * fourier.PIXEL_BYTES * box**2)
            np.testing.assert_array_equal(fourier.transform(images, poses), whole)


@pytest.mark.parametrize("box", [32, 33])
def test_no_pixel_becomes_larger_than_the_sums_have_room_for(box):
    """The worst image for a place between pixels: each pixel has the sign of what it counts there."""
    def counts(n):
        k = np.arange(-(n // 2), n // 2 + 1)
        ends = np.where(2 * np.abs(k) == n, 0.5, 1.0)
        return (ends * np.cos(2 * np.pi * np.outer(np.arange(n) - n // 2 - 0.5, k) / n)).sum(axis=1) / n

    signs = np.sign(counts(box))
    image = np.outer(signs, signs).astype(np.float32)[None]
    largest = np.abs(fourier.transform(image, make_poses([180.0], 0.5, 0.5))).max()
    assert largest == pytest.approx(np.abs(counts(box)).sum() ** 2, abs=ERROR * box**2)
    assert np.abs(counts(2048)).sum() ** 2 < average.LARGEST_GAIN * fourier.EXTRA_GAIN / 4


@pytest.mark.jit_only
def test_memory_is_what_was_said_of_it_however_many_images():
    fourier.transform(np.zeros((1, 8, 8), np.float32), make_poses([1.0]))
    for n, box in ((200, 64), (2, 512)):
        images = np.zeros((n, box, box), np.float32)
        tracemalloc.start()
        try:
            fourier.transform(images, random_poses(n))
            peak = tracemalloc.get_traced_memory()[1] - images.nbytes
        finally:
            tracemalloc.stop()
        assert 0.5 < peak / fourier.work_bytes(box) < 1.02


def test_a_run_says_what_memory_it_takes_more(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    taken = {}
    for name in INTERPOLATIONS:
        options = checks.Options(mask=None, ir=1, ou=6, rs=1, xr=0, yr=0, ts=1, center=0, maxit=1,
                                 function="ref_ali2d", rand_seed=1, vanished="keep", center_limit=None, quiet=True,
                                 interpolation=name)
        taken[name] = checks.prepare(ArrayStack(small.particles(), "particles"),
                                     ArrayStack(small.references(), "references"), options, SERIAL).n_bytes
    assert taken["fourier"] - taken["quadratic"] == fourier.work_bytes(small.BOX)


# ---- averages ----------------------------------------------------------------------------------------

@pytest.mark.jit_only
def test_fourier_interpolation_loses_less_of_the_view_near_nyquist():
    particles = simulate_particles(200, 1, 64, snr=1.0, seed=1)
    kept = {}
    for name, move in INTERPOLATIONS.items():
        sums = move(particles.images, particles.poses).sum(axis=0, dtype=np.float64)
        kept[name] = average.frc(sums, particles.views[0].astype(np.float64))[24:, 1].mean()
    # the same noise in both, so that the difference is known better than either
    assert kept["fourier"] > kept["quadratic"] + 0.02


def test_the_averages_are_those_of_the_interpolation_named():
    options = {"ou": 6, "xr": 1, "yr": 1, "maxit": 1, "function": "ref_unfiltered", "center": 0}
    results = {name: align(small.particles(), small.references(), interpolation=name, **options)
               for name in INTERPOLATIONS}
    one, other = results["quadratic"], results["fourier"]
    np.testing.assert_array_equal(one.poses, other.poses)
    assert not np.array_equal(one.averages, other.averages)
    images = small.particles()
    inside = np.hypot(*np.indices((small.BOX, small.BOX)) - small.BOX // 2) <= 6
    average.normalize_particles(images, inside)
    mean = INTERPOLATIONS["fourier"](images, other.poses)[other.assign == 0].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(other.averages[0], (mean - mean[inside].mean()) * inside, atol=1e-5)


def test_another_name_is_refused():
    with pytest.raises(InputError, match="interpolation=cubic is not known: give quadratic or fourier"):
        align(small.particles(), small.references(), ou=6, interpolation="cubic")
