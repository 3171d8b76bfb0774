"""The search against its slow twin, its ties, its independence of all that must not matter, and known truth."""

import naive
import numba
import numpy as np
import pytest
from conftest import JIT

from mrefali import geometry
from mrefali.average import normalize_particles, normalize_references
from mrefali.compiled import kernels
from mrefali.errors import InputError
from mrefali.geometry import compose, disc, identity_poses, inverse_shift, invert, make_poses
from mrefali.kernels import LANES
from mrefali.search import Search, align, align_each, only, ring_spectra, start_centres, whole_steps
from mrefali.simulation import make_views, render, simulate_particles

#: Relative error of a peak: a sum of some thousand float32 products, seldom as much as a hundred roundings.
PEAK = 100 * float(np.finfo(np.float32).eps)

#: Such errors in the seven samples of the parabola move its vertex by less than a thousandth of a sample.
VERTEX = 1e-3


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_poses(n, reach, seed=1):
    """Poses with shifts up to ``reach`` px in x and y, half of them mirrored."""
    rng = np.random.default_rng(seed)
    return make_poses(rng.uniform(0, 360, n), *rng.uniform(-reach, reach, (2, n)), rng.integers(0, 2, n))


def assert_agrees(images, poses, references, search):
    """The search finds what the slow twin finds, particle by particle; returns what it found."""
    found = align(images, poses, ring_spectra(references, search), search)
    options = search.inner_radius, search.outer_radius, search.ring_step
    spectra = [naive.reference_spectra(reference.astype(float), *options) for reference in references]
    expected = [naive.search(image.astype(float), spectra, pose, *options, search.xr, search.yr, search.shift_step)
                for image, pose in zip(images, poses, strict=True)]
    expected_poses = np.array([pose for _, _, pose in expected])
    assert found.assign.tolist() == [assign for _, assign, _ in expected]
    assert found.poses["mirror"].tolist() == expected_poses["mirror"].tolist()
    np.testing.assert_allclose(found.peak, [peak for peak, _, _ in expected], rtol=PEAK)
    sample_degrees = 360 / search.rings.lengths[0]
    turn = (found.poses["alpha"] - expected_poses["alpha"] + 180) % 360 - 180
    assert np.abs(turn).max() < VERTEX * sample_degrees
    for axis in ("sx", "sy"):  # an angle that is off moves the shift along its arc
        np.testing.assert_allclose(found.poses[axis], expected_poses[axis], rtol=0,
                                   atol=np.deg2rad(VERTEX * sample_degrees) * search.box)
    return found


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(found.assign, expected.assign)
    np.testing.assert_array_equal(found.peak.view(np.int64), expected.peak.view(np.int64))
    assert found.poses.tobytes() == expected.poses.tobytes()


# --- against the slow twin

# (box, ir, ou, rs, xr, yr, ts)
SEARCHES = [
    pytest.param((20, 1, 6, 1, 2, 2, 1), id="25 shifts"),
    pytest.param((21, 1, 6, 1, 2, 2, 1), id="odd box"),
    pytest.param((20, 2, 7, 2, 1, 1, 1), id="every second ring"),
    pytest.param((21, 3, 7, 3, 1, 1, 1), id="every third ring, odd box"),
    pytest.param((20, 6, 6, 1, 1, 1, 1), id="one ring"),
    pytest.param((20, 1, 6, 1, 0, 0, 1), id="rotation only"),
    pytest.param((20, 1, 5, 1, 3, 1, 1), id="xr above yr"),
    pytest.param((21, 1, 5, 1, 0, 2, 1), id="yr only"),
    pytest.param((20, 1, 6, 1, 1.7, 0.9, 1), id="ranges between steps"),
    pytest.param((20, 1, 6, 1, 1, 1, 0.5), id="step 1/2"),
    pytest.param((21, 1, 5, 1, 4, 4, 2), id="step 2"),
    pytest.param((20, 1, 5, 1, 3, 3, 1.5), id="step 3/2"),
    pytest.param((20, 1, 5, 1, 1.4, 2.1, 0.7), id="step 7/10"),
    pytest.param((21, 1, 6, 1, 1, 1, 1 / 3), id="step 1/3"),
    pytest.param((20, 1, 6, 1, 3, 3, 10), id="step beyond the range"),
    pytest.param((20, 1, 8, 1, 3, 3, 1), id="range cut to 1 by ou"),
    pytest.param((20, 1, 7, 1, 2, 2, 0.5), id="half steps in a range cut by ou"),
    pytest.param((21, 1, 9, 1, 3, 3, 1), id="range cut to 0 on the left and 1 on the right"),
]
N = 20 if JIT else 2


@pytest.mark.parametrize("options", SEARCHES)
def test_from_the_identity(options):
    search = Search(*options)
    assert_agrees(noise(N, search.box, search.box), identity_poses(N), noise(3, search.box, search.box, seed=9), search)


@pytest.mark.parametrize("options", SEARCHES)
def test_from_poses_with_shifts_and_mirrors(options):
    search = Search(*options)
    reach = search.box // 2 + 1 - search.outer_radius - 2  # some of these are reset
    assert_agrees(noise(N, search.box, search.box), random_poses(N, reach), noise(3, search.box, search.box, seed=9),
                  search)


@pytest.mark.parametrize("step", [1, 0.7, 0.5, 1.5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_from_the_farthest_poses_that_are_not_reset(sign, step):
    # no room at all on one side; the grid of shifts must not run out of the image on it
    box, outer_radius = 20, 5
    limit = box // 2 + 1 - outer_radius - 2
    poses = make_poses([0, 0, 90], sign * limit, [0, limit, -limit])
    search = Search(box, 1, outer_radius, 1, 3, 3, step)
    n = 3 if JIT else 1
    assert np.abs(start_centres(poses, search)).max() == pytest.approx(limit)
    assert_agrees(noise(n, box, box), poses[:n], noise(2, box, box, seed=9), search)


@pytest.mark.parametrize("n_references", [1, 17])
def test_one_reference_and_more_references_than_lanes(n_references):
    search = Search(20, 1, 6, 1, 1, 1, 1)
    n = 40 if JIT else 3
    found = assert_agrees(noise(n, 20, 20), identity_poses(n), noise(n_references, 20, 20, seed=9), search)
    assert found.assign.max() < n_references


@pytest.mark.jit_only
@pytest.mark.parametrize("options", [(48, 1, 19, 1, 3, 3, 1), (65, 2, 24, 2, 2, 1, 0.5)])
def test_boxes_as_people_have_them(options):
    search = Search(*options)
    assert_agrees(noise(6, search.box, search.box), random_poses(6, 3), noise(4, search.box, search.box, seed=9),
                  search)


# --- the choice, on many particles

#: Of two peaks closer than this, as a share of the larger, either may win.
TIE = 1e-5


def slow_peaks(images, poses, references, search):
    """``naive.peaks`` of float32 images and references."""
    options = search.inner_radius, search.outer_radius, search.ring_step
    spectra = [naive.reference_spectra(reference.astype(float), *options) for reference in references]
    return naive.peaks(images.astype(float), spectra, poses, *options, search.xr, search.yr, search.shift_step)


def assert_chooses_alike(images, poses, references, search):
    """Reference, shift and mirror are those of the slow twin's highest peak, or of one that ties with it."""
    found = align(images, poses, ring_spectra(references, search), search)
    peaks = slow_peaks(images, poses, references, search)
    centres = [naive.start_centre(pose, search.box, search.outer_radius) for pose in poses]
    moved = np.rint((inverse_shift(found.poses) - centres) / search.shift_step).astype(int)
    middle_y, middle_x = np.array(peaks.shape[1:3]) // 2
    chosen = peaks[np.arange(len(images)), middle_y + moved[:, 1], middle_x + moved[:, 0], found.assign,
                   found.poses["mirror"]]
    best = peaks.max(axis=(1, 2, 3, 4))
    assert best.min() > 0
    assert (chosen >= best * (1 - TIE)).all()
    np.testing.assert_allclose(found.peak, best, rtol=PEAK)
    # so that the above says something: each reference, straight and mirrored, is the choice of some particle
    assert len(set(zip(found.assign, found.poses["mirror"], strict=True))) == 2 * len(references)


@pytest.mark.parametrize("options", [(20, 1, 6, 1, 2, 1, 1), (21, 2, 7, 2, 1, 1, 0.5)])
def test_the_slow_twin_for_many_particles_is_that_for_one(options):
    search = Search(*options)
    n = 12 if JIT else 3
    images, references = noise(n, search.box, search.box), noise(3, search.box, search.box, seed=9)
    poses = random_poses(n, search.box // 2 + 1 - search.outer_radius - 2)
    spectra = [naive.reference_spectra(reference.astype(float), *options[1:4]) for reference in references]
    for image, pose, peaks in zip(images, poses, slow_peaks(images, poses, references, search), strict=True):
        peak, assign, found = naive.search(image.astype(float), spectra, pose, *options[1:])
        assert peaks.max() == pytest.approx(peak, rel=1e-12)
        y, x, k, mirror = np.unravel_index(peaks.argmax(), peaks.shape)
        assert (k, mirror) == (assign, found["mirror"])
        shift = (np.array([x, y]) - np.array(peaks.shape[1::-1]) // 2) * search.shift_step
        assert inverse_shift(found) - start_centres(pose[None], search)[0] == pytest.approx(shift, abs=1e-9)


def of_like_power(references, search):
    """References of mean 0 and standard deviation 1, so that each is the best for some particles."""
    references = references.astype(np.float32)
    normalize_particles(references, disc(search.box, search.outer_radius))
    return references


@pytest.mark.jit_only
def test_two_thousand_particles_are_classed_as_by_the_slow_twin():
    search = Search(32, 1, 10, 1, 2, 2, 1)
    particles = simulate_particles(2000, 6, 32, snr=0.1, max_shift=3, seed=11)
    normalize_particles(particles.images, disc(32, search.outer_radius))
    # from shifts of up to 4 px: of some the range is cut, and those beyond 5 px start from the identity
    assert_chooses_alike(particles.images, random_poses(2000, 4), of_like_power(particles.views, search), search)


@pytest.mark.jit_only
def test_particles_of_noise_alone_are_classed_as_by_the_slow_twin():
    search = Search(33, 1, 11, 1, 1, 1, 0.5)
    references = of_like_power(low_passed(5, 33, seed=12), search)
    assert_chooses_alike(noise(500, 33, 33, seed=13), identity_poses(500), references, search)


@pytest.mark.jit_only
@pytest.mark.parametrize(("n", "n_references", "box", "outer_radius", "half"), [
    (400, 4, 40, 13, 2),
    pytest.param(2000, 10, 64, 27, 3, marks=pytest.mark.slow),
    pytest.param(400, 20, 128, 55, 3, marks=pytest.mark.slow),
])
def test_particles_are_classed_by_averages_as_by_the_slow_twin(n, n_references, box, outer_radius, half):
    """Averages as an iteration leaves them, each filtered by its FRC."""
    search = Search(box, 1, outer_radius, 1, half, half, 1)
    particles = simulate_particles(n, n_references, box, snr=0.1, max_shift=half, seed=14)
    inside = disc(box, outer_radius)
    normalize_particles(particles.images, inside)
    averages = naive.update(particles.images.astype(float), [None] * n_references, particles.poses.copy(),
                            particles.classes, inside.astype(float), inside, 1, None)["averages"]
    assert_chooses_alike(particles.images, identity_poses(n), normalize_references(averages, inside), search)


# --- poses far out


def test_a_particle_whose_disc_would_leave_the_image_starts_from_the_identity():
    search = Search(20, 1, 6, 1, 1, 1, 1)  # limit 20//2 + 1 - 6 - 2 = 3 px
    poses = make_poses(0, [3.0, 3.01, 0.0, -1.0], [-3.0, 0.0, -3.01, 2.0])
    assert start_centres(poses, search).tolist() == [[-3, 3], [0, 0], [0, 0], [1, -2]]


def test_the_limit_holds_for_the_inverse_shift_not_for_the_shift():
    search = Search(20, 1, 6, 1, 1, 1, 1)
    # (3, 3) turned by 45 degrees lies 4.24 px out along one axis
    assert start_centres(make_poses([45.0], 3, 3), search).tolist() == [[0, 0]]


def test_a_particle_that_starts_too_far_out_gets_the_bits_of_one_that_starts_from_the_identity():
    search = Search(20, 1, 6, 1, 1, 1, 1)
    images, spectra = noise(3, 20, 20), ring_spectra(noise(2, 20, 20, seed=9), search)
    assert_same_bits(align(images, make_poses([10.0, 200, 0], 9, [4, 0, -9], 1), spectra, search),
                     align(images, identity_poses(3), spectra, search))


def test_angle_and_mirror_of_the_start_are_ignored():
    search = Search(20, 1, 6, 1, 1, 1, 1)
    images, spectra = noise(2, 20, 20), ring_spectra(noise(2, 20, 20, seed=9), search)
    assert_same_bits(align(images, make_poses([77.0, 10], 0, 0, [1, 0]), spectra, search),
                     align(images, identity_poses(2), spectra, search))


# --- ties


def test_of_identical_references_the_later_wins():
    search = Search(20, 1, 6, 1, 1, 1, 1)
    one, other = noise(2, 20, 20, seed=9)
    found = assert_agrees(noise(N, 20, 20), identity_poses(N), np.array([one, other, one, other, one]), search)
    assert set(found.assign) <= {3, 4}


def test_of_equal_shifts_the_later_wins_y_before_x():
    # one pixel at the centre of a ring of zeros repeats itself every 4 px
    search = Search(20, 2, 2, 1, 4, 4, 4)
    image = np.zeros((1, 20, 20), np.float32)
    image[0, 2::4, 2::4] = 1
    found = align(image, identity_poses(1), ring_spectra(noise(1, 20, 20, seed=9), search), search)
    expected = align(image, make_poses([0.0], -4, -4), ring_spectra(noise(1, 20, 20, seed=9), search),
                     Search(20, 2, 2, 1, 0, 0, 4))
    assert found.peak == expected.peak
    assert inverse_shift(found.poses[0]) == pytest.approx((4, 4))


def test_of_equal_peaks_in_different_grids_of_half_steps_the_later_shift_wins():
    # the search goes grid by grid, whole steps before half ones; (iy, ix, reference) decides all the same
    search = Search(20, 1, 6, 1, 1, 1, 0.5)
    image = np.zeros((1, 20, 20), np.float32)
    found = align(image, identity_poses(1), ring_spectra(noise(3, 20, 20, seed=9), search), search)
    assert found.peak == 0
    assert found.assign == 2
    assert inverse_shift(found.poses[0]) == pytest.approx((1, 1))


def test_the_mirror_is_chosen_only_where_it_is_better():
    search = Search(20, 1, 6, 1, 0, 0, 1)
    zeros = np.zeros((1, 20, 20), np.float32)  # correlates equally, with 0, straight and mirrored
    assert align(zeros, identity_poses(1), ring_spectra(noise(1, 20, 20), search), search).poses["mirror"] == 0


@pytest.mark.parametrize("step", [1, 0.5])
def test_without_mirrors_the_best_straight_pose_is_found(step):
    search, n = Search(20, 1, 6, 1, 1, 1, step, mirror=False), 12 if JIT else 6
    images, references = noise(n, 20, 20), noise(3, 20, 20, seed=9)
    found = align(images, identity_poses(n), ring_spectra(references, search), search)
    spectra = [naive.reference_spectra(reference.astype(float), 1, 6, 1) for reference in references]
    expected = naive.peaks(images.astype(float), spectra, identity_poses(n), 1, 6, 1, 1, 1, step)
    assert not found.poses["mirror"].any()
    assert found.assign.tolist() == expected[..., 0].max(axis=(1, 2)).argmax(axis=1).tolist()
    np.testing.assert_allclose(found.peak, expected[..., 0].max(axis=(1, 2, 3)), rtol=PEAK)
    # some of these would rather be mirrored
    assert (expected[..., 1].max(axis=(1, 2, 3)) > found.peak).any()


# --- what must not matter

MANY = 37 if JIT else 5  # no multiple of the particles that share the lanes


@pytest.fixture(params=[(0, 0, 1), (1, 0, 1), (1, 1, 1), (2, 2, 1), (1, 1, 0.5)],
                ids=["16 particles a block", "5 a block", "1 a block", "2 blocks each", "4 grids each"])
def case(request):
    """A search, particles and poses, spectra and what is found."""
    search = Search(20, 1, 6, 1, *request.param)
    images, poses = noise(MANY, 20, 20), random_poses(MANY, 2)
    spectra = ring_spectra(noise(3, 20, 20, seed=9), search)
    return search, images, poses, spectra, align(images, poses, spectra, search)


def pick(found, index):
    return type(found)(found.assign[index], found.poses[index], found.peak[index])


@pytest.mark.jit_only
@pytest.mark.parametrize("n_threads", range(1, numba.config.NUMBA_NUM_THREADS + 1))
def test_equal_bits_whatever_the_number_of_threads(case, set_threads, n_threads):
    search, images, poses, spectra, expected = case
    set_threads(n_threads)
    assert_same_bits(align(images, poses, spectra, search), expected)


@pytest.mark.parametrize("threads_said", [1, 2, 3, 100])
def test_equal_bits_whatever_the_chunks(case, monkeypatch, threads_said):
    search, images, poses, spectra, expected = case
    monkeypatch.setattr("mrefali.search.numba.get_num_threads", lambda: threads_said)
    many = np.arange(4 * MANY) % MANY  # of more groups of lanes than one thread has chunks
    assert_same_bits(align(images[many], poses[many], spectra, search), pick(expected, many))


@pytest.mark.parametrize("size", [1, 4])
def test_equal_bits_whatever_the_neighbours(case, size):
    search, images, poses, spectra, expected = case
    for first in range(0, MANY, size):
        part = slice(first, first + size)
        assert_same_bits(align(images[part], poses[part], spectra, search), pick(expected, part))


def test_equal_bits_whatever_the_order(case):
    search, images, poses, spectra, expected = case
    order = np.random.default_rng(5).permutation(MANY)
    assert_same_bits(align(images[order], poses[order], spectra, search), pick(expected, order))


def test_equal_bits_whatever_the_other_references(case):
    search, images, poses, _, expected = case
    for k in set(expected.assign.tolist()):
        mine = np.flatnonzero(expected.assign == k)
        alone = align(images[mine], poses[mine], ring_spectra(noise(3, 20, 20, seed=9)[k:k + 1], search), search)
        alone.assign[:] = k
        assert_same_bits(alone, pick(expected, mine))


def test_equal_bits_with_only_some_of_the_references(case):
    search, images, poses, spectra, _ = case
    some = [2, 0]
    assert_same_bits(align(images, poses, only(spectra, some), search),
                     align(images, poses, ring_spectra(noise(3, 20, 20, seed=9)[some], search), search))


def test_the_particles_and_poses_are_not_written(case):
    search, images, poses, spectra, _ = case
    before = images.copy(), poses.copy()
    align(images, poses, spectra, search)
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(poses, before[1])


def test_each_reference_by_itself_gets_what_a_search_with_it_alone_finds(case):
    search, images, poses, _, best = case
    references = noise(3, 20, 20, seed=9)
    found = align_each(images, poses, ring_spectra(references, search), search)
    for k in range(3):
        # the scale of the spectra is a power of two, so that a reference alone has the same bits
        alone = align(images, poses, ring_spectra(references[k:k + 1], search), search)
        assert found.assign[k].tolist() == [k] * MANY
        np.testing.assert_array_equal(found.peak[k], alone.peak)
        assert found.poses[k].tobytes() == alone.poses.tobytes()
    np.testing.assert_array_equal(found.peak.max(axis=0), best.peak)


def test_no_particles_find_nothing():
    search = Search(20, 1, 6, 1, 1, 1, 1)
    found = align(noise(0, 20, 20), identity_poses(0), ring_spectra(noise(2, 20, 20), search), search)
    assert found.assign.shape == found.peak.shape == found.poses.shape == (0,)


@pytest.mark.parametrize(("factor", "offset"), [(1, 100), (1e-3, 0), (50, -20)])
def test_scale_and_offset_of_a_particle_do_not_matter(factor, offset):
    search = Search(20, 1, 6, 1, 1, 1, 1)
    images, spectra = noise(3, 20, 20), ring_spectra(noise(2, 20, 20, seed=9), search)
    plain = align(images, identity_poses(3), spectra, search)
    found = align((factor * images + offset).astype(np.float32), identity_poses(3), spectra, search)
    assert found.assign.tolist() == plain.assign.tolist()
    # the mean is subtracted after the sum: of an offset of 100 deviations its square's roundings stay
    np.testing.assert_allclose(found.peak, plain.peak, rtol=PEAK * max(1, abs(offset / factor)) ** 2)


# --- what is searched


@pytest.mark.parametrize(("step", "parts", "stride"), [(1, 1, 1), (2, 1, 2), (0.5, 2, 1), (1.5, 2, 3), (1 / 3, 3, 1)])
def test_a_step_of_p_over_q_is_q_grids_of_strides_of_p(step, parts, stride):
    shifts = Search(40, 1, 8, 1, 6, 3, step).shifts
    assert (shifts.parts, shifts.stride) == (parts, stride)
    for half, n in ((6, shifts.nx), (3, shifts.ny)):
        wanted = 2 * int(half / step + 1e-9) + 1
        assert wanted <= n * parts < wanted + parts


def test_the_grids_are_no_larger_than_the_image_allows():
    shifts = Search(64, 1, 30, 1, 10, 10, 1).shifts
    assert (shifts.nx, shifts.ny) == (3, 3)


@pytest.mark.parametrize(("options", "message"), [
    ((20, 1, 9, 1, 0, 0, 1), "ou=9 does not fit a 20-pixel image: give 1 to 8 "),
    ((20, 1, 6, 1, -1, 0, 1), "xr=-1 is not allowed: give the half-range of the search in px, 0 or more"),
    ((20, 1, 6, 1, 0, np.inf, 1), "yr=inf is not allowed"),
    ((20, 1, 6, 1, np.nan, 0, 1), "xr=nan is not allowed"),
    ((20, 1, 6, 1, 1, 1, 0), "ts=0 is not allowed: give a translation step in px of at least 0.01"),
    ((20, 1, 6, 1, 1, 1, -0.5), "ts=-0.5 is not allowed"),
    ((20, 1, 6, 1, 1, 1, np.nan), "ts=nan is not allowed"),
])
def test_a_search_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Search(*options)


@pytest.mark.parametrize("options", [(20, 1, 6, 1, 0, 0, 1), (21, 2, 8, 3, 0, 0, 1)])
def test_ring_spectra_are_those_of_the_slow_twin(options):
    search = Search(*options)
    references = noise(2, search.box, search.box)
    spectra = ring_spectra(references, search)
    blocks = spectra.packed.reshape(2, -1, 2, kernels.UNROLL)
    rows = spectra.scale * (blocks[:, :, 0] + 1j * blocks[:, :, 1]).reshape(2, -1)
    used = np.zeros(rows.shape[1], bool)
    for k in range(2):
        expected = naive.reference_spectra(references[k].astype(float), *options[1:4])[::-1]
        for ring, spectrum in enumerate(expected):
            index = search.rings.first_row[:spectrum.size] + ring
            used[index] = True
            np.testing.assert_allclose(rows[k, index], spectrum, rtol=1e-6, atol=1e-6)
        ones = naive.polar(np.ones((search.box, search.box)), 10, 10, *naive.rings(*options[1:4]))
        constant = sum(c[0].real * ring.sum() for c, ring in zip(expected[::-1], ones, strict=True))
        assert spectra.scale * spectra.constants[k] == pytest.approx(constant)
    assert not rows[:, ~used].any()  # what pads to UNROLL adds nothing


# --- known truth


def prepared(images, views, search):
    """Normalised particles and the spectra of the views."""
    inside = disc(search.box, search.outer_radius)
    images = images.copy()
    normalize_particles(images, inside)
    return images, ring_spectra(normalize_references(views, inside), search)


def angle_errors(poses, truth):
    """Degrees, in [-180, 180), of what remains of the true poses."""
    return (compose(invert(truth), poses)["alpha"] + 180) % 360 - 180


@pytest.mark.parametrize("box", [32, 33])
def test_where_the_true_shifts_are_tried_they_are_found_and_the_angle_within_half_a_sample(box):
    search = Search(box, 1, 7, 1, 2, 2, 1)  # the phantom reaches 6.7 px
    n = 60 if JIT else 4
    views = make_views(3, box, seed=3)  # of like power: the references are compared as they are
    rng = np.random.default_rng(3)
    # particle = the view moved by the inverse of its pose: rotation about the point (ix, iy) of the particle
    turned = make_poses(rng.uniform(0, 360, n), 0, 0, rng.integers(0, 2, n))
    truth = compose(make_poses(0, *-rng.integers(-2, 3, (2, n))), turned)
    classes = rng.integers(0, 3, n)
    images, spectra = prepared(render(views, classes, truth),
                               render(views, np.arange(3), identity_poses(3)), search)
    found = align(images, identity_poses(n), spectra, search)
    assert found.assign.tolist() == classes.tolist()
    assert found.poses["mirror"].tolist() == truth["mirror"].tolist()
    np.testing.assert_allclose(inverse_shift(found.poses), inverse_shift(truth), rtol=0, atol=1e-9)
    assert np.abs(angle_errors(found.poses, truth)).max() < 180 / search.rings.lengths[0]


@pytest.mark.jit_only
@pytest.mark.parametrize(("step", "snr"), [(1, np.inf), (0.5, np.inf), (0.5, 20)])
def test_simulated_particles_are_found_as_well_as_the_step_allows(step, snr):
    search = Search(64, 1, 24, 1, 3, 3, step)
    particles = simulate_particles(200, 3, 64, snr, 2.5, seed=3)
    images, spectra = prepared(particles.images, particles.views, search)
    found = align(images, identity_poses(200), spectra, search)
    assert found.assign.tolist() == particles.classes.tolist()
    assert found.poses["mirror"].tolist() == particles.poses["mirror"].tolist()
    # a shift between grid points is at most half a step off, or little more where the peak is not round: on
    # average step/sqrt(12) along each axis; the angle is at most half a sample off
    errors = inverse_shift(found.poses) - inverse_shift(particles.poses)
    assert np.sqrt((errors**2).mean()) == pytest.approx(step / np.sqrt(12), rel=0.1)
    assert np.mean(np.abs(errors) <= step / 2) > 0.9
    assert np.abs(errors).max() < step
    assert np.abs(angle_errors(found.poses, particles.poses)).max() < 2 * 180 / search.rings.lengths[0]
    assert np.sqrt((angle_errors(found.poses, particles.poses) ** 2).mean()) < 180 / search.rings.lengths[0]


def test_centre_shift_is_where_the_rings_are_sampled():
    # a particle moved by (2, -1) has its centre there; its pose carries it back
    box, search = 32, Search(32, 1, 11, 1, 0, 0, 1)
    views = make_views(1, box, seed=2)
    truth = make_poses([0.0], -2, 1)
    images, spectra = prepared(render(views, np.zeros(1, int), truth),
                               render(views, np.zeros(1, int), identity_poses(1)), search)
    assert geometry.inverse_shift(truth).tolist() == [[2, -1]]
    found = align(images, truth, spectra, search)
    assert found.poses["sx"] == pytest.approx(-2, abs=1e-2)
    assert found.poses["sy"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("half", "step", "steps"), [
    (0.3, 0.1, 3), (0.6, 0.2, 3), (1.2, 0.4, 3), (0.7, 0.1, 7), (1, 2, 0), (2.9, 1, 2), (1e308, 0.01, 1600)])
def test_a_range_holds_all_its_steps_whatever_the_rounding_of_the_division(half, step, steps):
    assert whole_steps(min(half, 16), step) == steps
    assert Search(40, 1, 3, 1, half, 0, step).shifts.nx >= 1


def test_the_first_look_changes_no_bit_of_the_result():
    images, references = low_passed(12, 40, seed=1), low_passed(5, 20, seed=2)[:5]
    images = images[:, 10:30, 10:30].copy()
    search_20 = Search(20, 1, 6, 1, 2, 2, 1)
    spectra = ring_spectra(references, search_20)
    assert spectra.n_kept < len(spectra.kept)  # it takes only a part of the rows
    assert (spectra.lost > 0).all()
    nothing_discarded = spectra._replace(lost=np.full(len(references), 1e30))
    mine, other = (align(images, identity_poses(len(images)), s, search_20) for s in (spectra, nothing_discarded))
    assert_same_bits(mine, other)


@pytest.mark.parametrize("smooth", [False, True])
def test_no_peak_exceeds_its_bound_by_the_first_look_and_rounding_is_far_below_what_is_allowed_for(smooth):
    search_20, n = Search(20, 1, 6, 1, 1, 1, 1), LANES if JIT else 2
    references = low_passed(3, 20, seed=4) if smooth else noise(3, 20, 20, seed=4)
    images, spectra = noise(n, 20, 20, seed=5), ring_spectra(references, search_20)
    normalize_particles(images, disc(20, 6))
    rings, shifts = search_20.rings, search_20.shifts
    n_shifts = shifts.nx * shifts.ny
    scratch = kernels._new_scratch(20, 3, rings, shifts)
    centres, first, count = np.full((n, 2), 10.0), np.full((n, 2), -1), np.full((n, 2), 3)
    for block in range(-(-n * n_shifts // LANES)):
        for p in range(block * LANES // n_shifts, min(n, -(-(block + 1) * LANES // n_shifts))):
            kernels._prepare(p, 0, images, centres, first, count, rings, shifts, scratch)
        kernels._first_look(block, 0, n, first, count, spectra, rings, shifts, scratch)
    bounds = scratch.bounds[:n * n_shifts].reshape(n, n_shifts, 3)
    for shift in range(n_shifts):
        poses = make_poses(np.zeros(n), 1 - shift % 3, 1 - shift // 3)
        for k in range(3):
            alone = ring_spectra(references[k:k + 1], search_20)
            peaks = align(images, poses, alone, Search(20, 1, 6, 1, 0, 0, 1)).peak / spectra.scale
            excess = (peaks - bounds[:, shift, k]) / spectra.lost[k]
            assert excess.max() < 0
            if not smooth:  # all rows are kept: what is allowed for is rounding alone
                assert np.abs(excess + 1).max() < 0.1


def test_the_first_look_loses_no_more_than_its_bound():
    references, search_20 = low_passed(3, 20, seed=4), Search(20, 1, 6, 1, 0, 0, 1)
    spectra, rows = ring_spectra(references, search_20), np.diff(search_20.rings.first_row)
    kept = [np.arange(rows[k]) < spectra.kept[k] for k in range(len(rows))]
    unpacked = spectra.packed.reshape(3, -1, 2, kernels.UNROLL)
    for image in noise(6, 20, 20, seed=5):
        particle = naive.particle_spectra(image.astype(float), 10, 10, 1, 6, 1)[::-1]
        for k in range(3):
            left_out = np.zeros((2, len(rows)), complex)
            for ring, spectrum in enumerate(particle):
                for frequency, d in enumerate(spectrum):
                    row = search_20.rings.first_row[frequency] + ring
                    if not kept[frequency][ring]:
                        real, imaginary = unpacked[k, row // kernels.UNROLL, :, row % kernels.UNROLL]
                        c = complex(real, imaginary)
                        left_out[0][frequency] += c * np.conj(d)
                        left_out[1][frequency] += np.conj(c) * np.conj(d)
            lost = max(np.abs(np.fft.irfft(q, search_20.rings.lengths[0])).max() for q in left_out)
            assert 0 < lost <= spectra.lost[k]


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100, 1e33, 1e-30])
def test_references_of_any_size_compete_alike(factor):
    images, references = noise(6, 20, 20, seed=7), noise(3, 20, 20, seed=8)
    search_20, poses = Search(20, 1, 6, 1, 1, 1, 1), identity_poses(6)
    plain = align(images, poses, ring_spectra(references, search_20), search_20)
    scaled = align(images, poses, ring_spectra((references * factor).astype(np.float32), search_20), search_20)
    np.testing.assert_array_equal(scaled.assign, plain.assign)
    assert scaled.peak == pytest.approx(plain.peak * factor, rel=1e-5)


def low_passed(n, box, seed):
    """Smooth random images."""
    filtered = np.fft.rfft2(noise(n, box, box, seed=seed)) * np.exp(-(np.hypot(
        np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)) / 0.1) ** 4)
    return np.fft.irfft2(filtered, s=(box, box)).astype(np.float32)
