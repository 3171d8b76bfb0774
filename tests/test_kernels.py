"""Each kernel against numpy or its slow twin."""

import naive
import numpy as np
import pytest
from conftest import JIT

from mrefali.average import transform
from mrefali.compiled import kernels
from mrefali.geometry import make_poses, ring_radii
from mrefali.kernels import LANES
from mrefali.search import Search, ring_spectra

EPS = float(np.finfo(np.float32).eps)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- FFT


@pytest.fixture(scope="module")
def longest_rings():
    """Tables for FFTs of up to 2048 samples, those of one ring of radius 163."""
    return Search(box=330, inner_radius=163, outer_radius=163, ring_step=1, xr=0, yr=0, shift_step=1).rings


@pytest.mark.parametrize("exponent", range(2, 12))
def test_fft_of_each_lane_is_numpys(exponent, longest_rings):
    n = 1 << exponent
    values = noise(n, 2, LANES, seed=exponent)
    a = np.concatenate([values.ravel(), noise(7)])  # buffers may be longer than the transform
    b = noise(a.size)
    result = kernels.fft_lanes(a, b, n, longest_rings)
    assert np.shares_memory(result, a) or np.shares_memory(result, b)

    real, imaginary = np.moveaxis(result[:2 * LANES * n].reshape(n, 2, LANES), 1, 0)
    expected = np.fft.fft(values[:, 0].astype(float) + 1j * values[:, 1], axis=0)
    # each of log2(n) passes adds a few rounding errors to numbers that grow like the result
    tolerance = 4 * exponent * EPS * np.sqrt((np.abs(expected) ** 2).mean())
    np.testing.assert_allclose(real + 1j * imaginary, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("exponent", range(2, 12))
def test_the_largest_of_an_fft_are_those_of_its_values(exponent, longest_rings):
    n = 1 << exponent
    a = noise(2 * LANES * n, seed=exponent)
    values = kernels.fft_lanes(a.copy(), np.empty_like(a), n, longest_rings).reshape(n, 2 * LANES)
    largest = np.empty(2 * LANES, np.float32)
    kernels.fft_largest(a.copy(), np.empty_like(a), n, longest_rings, largest)
    # the same sums, but what is compiled apart may round a product and a sum at once or one by one
    np.testing.assert_allclose(largest, values.max(axis=0), rtol=0, atol=4 * EPS * np.abs(values).max())


# --- one particle at all its shifts


class Lanes:
    """The kernels' buffers for one particle, its shifts side by side."""

    def __init__(self, search, image, x0, y0):
        self.search, self.rings, self.shifts = search, search.rings, search.shifts
        self.n_lanes = self.shifts.nx * self.shifts.ny
        self.scratch = kernels._new_scratch(search.box, 1, self.rings, self.shifts)
        self.first, self.count = np.zeros((1, 2), np.int64), np.full((1, 2), 100)
        self.images, self.centres = image[None], np.array([[x0, y0]])
        kernels._prepare(0, 0, self.images, self.centres, self.first, self.count, self.rings, self.shifts, self.scratch)
        self.image, self.x0, self.y0 = image.astype(float), x0, y0

    def fill(self, block):
        """Fill the block that begins with lane ``block`` and return how many of its lanes hold a shift."""
        kernels._fill_block(block // LANES, 1, self.rings.lengths // 2 + 1, self.rings, self.shifts, self.scratch)
        return min(LANES, self.n_lanes - block)

    def naive_samples(self, lane):
        """The slow twin's samples at one shift, innermost ring first."""
        radii = ring_radii(self.search.inner_radius, self.search.outer_radius, self.search.ring_step)
        x = self.x0 + lane % self.shifts.nx * self.shifts.stride
        y = self.y0 + lane // self.shifts.nx * self.shifts.stride
        return naive.polar(self.image, x, y, radii, self.rings.lengths[::-1])

    def spectra(self, lane):
        """The kernel's ring spectra in one lane, innermost ring first."""
        rows = self.scratch.spectra.reshape(-1, 2, LANES)[:, :, lane]
        return [rows[self.rings.first_row[:length // 2 + 1] + ring] @ [0.5, 0.5j]
                for ring, length in enumerate(self.rings.lengths)][::-1]

    def moments(self, lane):
        """The kernel's mean and variance of the samples in one lane."""
        mean, square = self.scratch.moments[:, lane] / (self.rings.weights * self.rings.lengths).sum()
        return mean, square - mean**2


# (box, ir, ou, rs, xr, yr, ts): a step of p/q px is q x q grids of strides of p px
SEARCHES = [
    pytest.param((20, 1, 6, 1, 2, 2, 1), id="25 shifts in 2 blocks"),
    pytest.param((21, 2, 7, 2, 1, 1, 1), id="9 shifts in a block, odd box, every second ring"),
    pytest.param((20, 1, 6, 1, 0, 0, 1), id="1 shift"),
    pytest.param((20, 1, 5, 1, 2, 0, 1), id="5 shifts in x only"),
    pytest.param((21, 1, 4, 1, 4, 4, 2), id="stride 2"),
    pytest.param((20, 1, 5, 1, 3, 3, 1.5), id="stride 3 of step 3/2"),
]


@pytest.fixture(params=SEARCHES)
def lanes(request):
    search = Search(*request.param)
    left = 2 * int(min(search.xr, 2)), 2 * int(min(search.yr, 2))
    # the first shift: as far left as the rings allow, or less, and between pixels
    x0 = max(search.outer_radius + 1.3, search.box // 2 + 0.3 - left[0])
    y0 = max(search.outer_radius + 1.6, search.box // 2 - 0.4 - left[1])
    return Lanes(search, noise(search.box, search.box, seed=3), x0, y0)


def test_spread_pixels_are_those_of_the_image_or_0_beyond_its_edge(lanes):
    n, p = lanes.search.box, lanes.shifts.stride
    strips = lanes.scratch.strips[0]
    for x in range(n):
        for y in range(n):
            row = np.concatenate([lanes.image[y, x::p], np.zeros(lanes.shifts.nx)])
            np.testing.assert_array_equal(strips[x + 1, y % p, y // p], row[:lanes.shifts.nx])
    assert not strips[0].any()
    assert not strips[n + 1].any()


def test_spectra_and_moments_of_every_shift_are_those_of_the_samples_of_the_slow_twin(lanes):
    compared = 0
    for block in range(0, lanes.n_lanes, LANES):
        for i in range(lanes.fill(block)):
            shift = np.array([(block + i) % lanes.shifts.nx, (block + i) // lanes.shifts.nx]) * lanes.shifts.stride
            if (np.array([lanes.x0, lanes.y0]) + shift + lanes.search.outer_radius > lanes.search.box - 1).any():
                continue  # beyond the image the search ignores what a lane holds
            compared += 1
            samples = lanes.naive_samples(block + i)
            for ring, spectrum in zip(samples, lanes.spectra(i), strict=True):
                np.testing.assert_allclose(spectrum, np.fft.rfft(ring), rtol=0, atol=64 * EPS * np.sqrt(ring.size))
            weights = np.repeat(lanes.rings.weights[::-1], lanes.rings.lengths[::-1])
            values = np.concatenate(samples)
            mean = np.average(values, weights=weights)
            variance = np.average((values - mean) ** 2, weights=weights)
            assert lanes.moments(i) == pytest.approx((mean, variance), abs=16 * EPS)
    assert compared >= min(lanes.n_lanes, 4)


def test_correlations_are_those_of_the_slow_twin_at_every_angle(lanes):
    search = lanes.search
    reference = noise(1, search.box, search.box, seed=4)
    rings = search.inner_radius, search.outer_radius, search.ring_step
    packed = ring_spectra(reference, search)
    longest = lanes.rings.lengths[0]
    lanes.fill(0)
    all_rows = np.diff(lanes.rings.first_row)
    kernels._correlate(packed.packed[0], lanes.scratch.spectra, lanes.rings.first_row, all_rows, all_rows.size,
                       lanes.scratch.a)
    z = kernels.fft_lanes(lanes.scratch.a, lanes.scratch.b, longest, lanes.rings)
    for lane in range(min(2, lanes.n_lanes)):
        mean, variance = lanes.moments(lane)
        columns = z[:2 * LANES * longest].reshape(longest, 2, LANES)[:, :, lane]
        kernel = (columns / 2 - mean * packed.constants[0]) * packed.scale / (longest * np.sqrt(variance))
        x = lanes.x0 + lane % lanes.shifts.nx * lanes.shifts.stride
        y = lanes.y0 + lane // lanes.shifts.nx * lanes.shifts.stride
        particle = naive.particle_spectra(lanes.image, x, y, *rings)
        expected = naive.correlations(naive.reference_spectra(reference[0].astype(float), *rings), particle)
        np.testing.assert_allclose(kernel.T, expected, rtol=0, atol=64 * EPS * np.abs(expected).max())


def inside(lanes, lane):
    """Whether the rings of this shift lie within the image; else the search ignores the lane."""
    shift = np.array([lane % lanes.shifts.nx, lane // lanes.shifts.nx]) * lanes.shifts.stride
    return (np.array([lanes.x0, lanes.y0]) + shift + lanes.search.outer_radius <= lanes.search.box - 1).all()


def test_a_candidate_alone_has_the_spectra_of_its_place_among_the_shifts(lanes):
    if lanes.shifts.parts > 1:  # of one grid of several: the candidates count through all of them
        lanes.shifts = lanes.shifts._replace(parts=1, step=float(lanes.shifts.stride))
    chosen = [lane for lane in range(lanes.n_lanes) if inside(lanes, lane)][-LANES:]
    lanes.scratch.lanes[:len(chosen)] = chosen[::-1]
    kernels._fill_lanes(len(chosen), lanes.images, lanes.centres, lanes.first, lanes.count, lanes.rings, lanes.shifts,
                        lanes.scratch)
    for i, lane in enumerate(chosen[::-1]):
        for ring, spectrum in zip(lanes.naive_samples(lane), lanes.spectra(i), strict=True):
            np.testing.assert_allclose(spectrum, np.fft.rfft(ring), rtol=0, atol=64 * EPS * np.sqrt(ring.size))


@pytest.mark.parametrize("n_particles", [2, 5, 16])
@pytest.mark.parametrize("half", [0, 1, 2, 3])
def test_the_lanes_of_several_particles_hold_what_each_would_alone(n_particles, half):
    search = Search(20, 1, 6, 1, half, half, 1)
    rings, shifts = search.rings, search.shifts
    images = noise(n_particles, 20, 20, seed=6)
    centres = np.stack([9.7 - half + 0.1 * np.arange(n_particles), np.full(n_particles, 10.2 - half)], axis=1)
    first, count = np.zeros((n_particles, 2), np.int64), np.full((n_particles, 2), 100)
    n_shifts = shifts.nx * shifts.ny

    def columns(particles):
        """Spectra and moments of all shifts of these particles, one after the other."""
        scratch, n, prepared, found = kernels._new_scratch(20, 1, rings, shifts), len(particles), 0, []
        for block in range(-(-n * n_shifts // LANES)):
            while prepared < n and prepared * n_shifts < (block + 1) * LANES:
                kernels._prepare(prepared, 0, images[particles], centres[particles], first, count, rings, shifts,
                                 scratch)
                prepared += 1
            kernels._fill_block(block, n, rings.lengths // 2 + 1, rings, shifts, scratch)
            spectra = scratch.spectra.reshape(-1, 2, LANES).transpose(2, 0, 1)
            found += [(spectrum.tobytes(), moment.tobytes())
                      for spectrum, moment in zip(spectra, scratch.moments.T, strict=True)]
        return found[:n * n_shifts]

    assert columns(list(range(n_particles))) == [column for p in range(n_particles) for column in columns([p])]


# --- which candidates are looked at


@pytest.fixture
def choice():
    """Buffers of four candidates a particle, of which a test says what each promises."""
    search = Search(20, 1, 6, 1, 0.5, 0.5, 0.5)
    return kernels._new_scratch(20, 1, search.rings, search.shifts._replace(nx=1, ny=1))


def test_of_each_particle_the_most_promising_candidate_is_chosen_first(choice):
    choice.promise[:] = -np.inf
    choice.promise[:8] = [1, 4, 2, 3, 9, 5, 6, 7]
    assert kernels._choose_lanes(np.array([2.5, 6.0]), choice) == 5
    # those that cannot exceed 2.5 and 6 are left out, one that may equal it is not
    assert choice.lanes[:5].tolist() == [1, 4, 3, 7, 6]
    assert kernels._choose_lanes(np.array([2.5, 6.0]), choice) == 0


def test_no_more_candidates_are_chosen_than_there_are_lanes(choice):
    choice.promise[:] = np.arange(choice.promise.size)
    peak = np.full(LANES, -np.inf)
    chosen = []
    while n := kernels._choose_lanes(peak, choice):
        assert n == LANES
        chosen += choice.lanes[:n].tolist()
    assert sorted(chosen) == list(range(4 * LANES))


def test_the_largest_of_each_column():
    z = noise(32, 2 * LANES, seed=5)
    largest = np.empty(2 * LANES, np.float32)
    kernels._largest(z.ravel(), 32, largest)
    np.testing.assert_array_equal(largest, z.max(axis=0))


# --- the angle


def refined(values, column=3):
    """``refine_angle`` of values that stand in one column among others."""
    z = noise(len(values), 2 * LANES, seed=6)
    z[:, column] = values
    return kernels.refine_angle(z.ravel(), column, len(values), z[:, column].max())


@pytest.mark.parametrize("vertex", [5.0, 5.25, 4.6])
def test_the_vertex_of_a_parabola_is_found(vertex):
    assert refined(2 - 0.25 * (np.arange(16) - vertex) ** 2) == pytest.approx(vertex, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_refined_angles_are_those_of_the_slow_twin(seed):
    values = noise(32, seed=seed)
    _, expected = naive.best_angle(values.astype(float))
    assert refined(values) * 360 / 32 % 360 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("index", [0, 1, 31])
def test_the_seven_samples_wrap_around(index):
    values = -np.abs((np.arange(32) - index + 16) % 32 - 16).astype(float)
    assert refined(values) == index


def test_of_equal_samples_the_last_is_refined():
    values = np.zeros(32)
    values[[4, 20]] = 1
    assert refined(values) == 20


def test_a_flat_curve_moves_nothing():
    assert refined(np.ones(16)) == 15


# --- pixels


def test_describe_is_mean_deviation_and_extremes():
    images = 5 + noise(3, 17, 17, seed=7)
    inside = np.zeros((17, 17), bool)
    inside[4:12, 3:10] = True
    found = np.empty((4, 3))
    kernels.describe(images, inside, *found)
    exact = images.astype(float)
    np.testing.assert_allclose(found[0], exact[:, inside].mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(found[1], exact[:, inside].std(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(found[2], exact.min(axis=(1, 2)))
    np.testing.assert_array_equal(found[3], exact.max(axis=(1, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (8, 8), (16, 16)])
def test_describe_marks_an_image_with_a_pixel_that_is_no_number(bad, place):
    images = noise(2, 17, 17)
    images[1][place] = bad
    found = np.empty((4, 2))
    with np.errstate(invalid="ignore"):  # plain Python warns where compiled code does not
        kernels.describe(images, np.ones((17, 17), bool), *found)
    assert np.isfinite(found[:, 0]).all()
    assert np.isnan(found[2:, 1]).all()


def test_subtract_and_divide_works_in_place():
    images = noise(2, 5, 5)
    expected = (images.astype(float) - [[[1.5]], [[-2.0]]]) / [[[3.0]], [[0.7]]]
    kernels.subtract_and_divide(images, np.array([1.5, -2.0]), np.array([3.0, 0.7]))
    np.testing.assert_allclose(images, expected, rtol=EPS)


def test_the_quadratic_formula_is_exact_for_a_quadratic():
    n = 8
    y, x = np.mgrid[:n, :n]

    def f(x, y):
        return 2 + x - 3 * y + 0.5 * x**2 + 0.25 * y**2 + 0.75 * x * y

    image = f(x, y).astype(np.float32)
    for px, py in ((2.0, 3.0), (2.25, 3.75), (5.5, 1.125)):
        assert kernels.quadratic(image, px, py) == pytest.approx(f(px, py), rel=1e-12)


def test_the_quadratic_formula_wraps_around_at_the_edge():
    image = np.zeros((4, 4), np.float32)
    image[0, 3] = 1
    # at u the neighbour to the left weighs (u^2 - u) / 2, that to the right u + (u^2 - u) / 2
    assert kernels.quadratic(image, 0.5, 0.0) == pytest.approx(-0.125)
    assert kernels.quadratic(image, 2.5, 0.0) == pytest.approx(0.375)
    assert kernels.quadratic(image, 3.0, 3.5) == pytest.approx(0.375)


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("mirror", [0, 1])
def test_moved_images_are_those_of_the_slow_twin(box, mirror):
    rng = np.random.default_rng(box)
    alpha = np.array([0, 0, 90, 180, 270, 45, 33.3, 211])
    shifts = rng.uniform(-4, 4, (2, alpha.size))
    shifts[:, :2] = [[0, 3], [0, -2]]
    poses = make_poses(alpha, *shifts, mirror)
    images = noise(alpha.size, box, box)
    expected = [naive.transform(image, pose) for image, pose in zip(images.astype(float), poses, strict=True)]
    # the sum of at most six pixels, rounded once to float32
    np.testing.assert_allclose(transform(images, poses), expected, rtol=0, atol=EPS * np.abs(images).max())


def test_a_sample_outside_takes_the_pixel_at_its_own_place():
    image = noise(1, 16, 16)
    moved = transform(image, make_poses([0.0], 5.0))[0]
    np.testing.assert_array_equal(moved[:, 5:], image[0, :, :-5])
    np.testing.assert_array_equal(moved[:, :5], image[0, :, :5])


@pytest.mark.parametrize("box", [16, 17])
def test_the_flip_leaves_column_0_of_an_even_image_where_it_is(box):
    image = noise(1, box, box)
    flipped = transform(image, make_poses([0.0], mirror=1))[0]
    if box % 2:
        np.testing.assert_array_equal(flipped, image[0, :, ::-1])
    else:
        np.testing.assert_array_equal(flipped[:, 1:], image[0, :, :0:-1])
        np.testing.assert_array_equal(flipped[:, 0], image[0, :, 0])


# --- sums


def test_class_sums_are_the_same_to_the_bit_in_whatever_order():
    n_images = 200 if JIT else 20
    images = noise(n_images, 6, 6) * np.float32(10) ** np.random.default_rng(1).integers(-4, 4, (n_images, 1, 1))
    rng = np.random.default_rng(2)
    assign, half = rng.integers(0, 3, n_images).astype(np.int32), rng.integers(0, 2, n_images)
    unit = 2.0**-30
    sums = np.zeros((3, 2, 6, 6), np.int64)
    kernels.add_to_classes(images, assign, half, unit, sums)
    for order in (np.arange(n_images)[::-1], rng.permutation(n_images)):
        again = np.zeros_like(sums)
        for piece in np.array_split(order, 3):
            kernels.add_to_classes(images[piece], assign[piece], half[piece], unit, again)
        np.testing.assert_array_equal(again, sums)

    exact = np.rint(images.astype(float) / unit).astype(np.int64)
    for k in range(3):
        for h in range(2):
            np.testing.assert_array_equal(sums[k, h], exact[(assign == k) & (half == h)].sum(axis=0))
