"""Steps of the search one by one, on one thread, at 64 and 128 px: what a profile of ``align`` would show.

A step of a few microseconds is repeated inside compiled code, for the call from Python costs as much.
"""

import numpy as np
import pytest
from measure import particles_and_averages
from numba import njit

from mrefali import kernels
from mrefali.search import Search, ring_spectra

TIMES = 20


@njit
def repeat_fft(a, b, n, rings):
    for _ in range(TIMES):
        kernels.fft_lanes(a, b, n, rings)


@njit
def repeat_fill(rings, shifts, scratch):
    for _ in range(TIMES):
        kernels._fill_block(0, rings, shifts, scratch)


@njit
def repeat_correlate(reference, spectra, first_row, n_rows, z):
    for _ in range(TIMES):
        kernels._correlate(reference, spectra, first_row, n_rows, n_rows.size, z)


@njit
def repeat_largest(z, length, largest):
    for _ in range(TIMES):
        kernels._largest(z, length, largest)


@pytest.fixture(params=[(64, 27), (128, 55)], ids=["64px", "128px"])
def search(request):
    box, outer_radius = request.param
    return Search(box, 1, outer_radius, 1, 3, 3, 1)


@pytest.fixture
def images(search):
    return particles_and_averages(10, 10, search.box, 3)[0]


@pytest.fixture
def averages(search):
    return particles_and_averages(10, 10, search.box, 3)[1]


@pytest.fixture
def scratch(search, images):
    """Buffers of one thread, one particle in them."""
    c = search.box // 2 - 3.0
    buffers = kernels._new_scratch(search.box, 1, 1, search.rings, search.shifts)
    kernels.spread_shifts(images[0], search.shifts, buffers.strips[0])
    kernels.locate_samples(search.rings, search.shifts, search.box, c, c, buffers.base[0], buffers.below[0],
                           buffers.u[0], buffers.v[0])
    return buffers


def test_spread_shifts(benchmark, search, images, scratch):
    """One particle."""
    benchmark(kernels.spread_shifts, images[0], search.shifts, scratch.strips[0])


def test_locate_samples(benchmark, search, scratch):
    """One particle."""
    c = search.box // 2 - 3.0
    benchmark(kernels.locate_samples, search.rings, search.shifts, search.box, c, c, scratch.base[0],
              scratch.below[0], scratch.u[0], scratch.v[0])


def test_fill_20_blocks(benchmark, search, scratch):
    """Samples, moments and ring FFTs of 16 shifts, 20 times."""
    benchmark(repeat_fill, search.rings, search.shifts, scratch)


def test_correlate_20_blocks(benchmark, search, averages, scratch):
    """Products of 16 shifts with one reference, 20 times."""
    rows = np.diff(search.rings.first_row)
    benchmark(repeat_correlate, ring_spectra(averages, search).packed[0], scratch.spectra, search.rings.first_row,
              rows, scratch.a)


def test_20_ffts_of_lanes(benchmark, search, scratch):
    """Of Lmax complex numbers in 16 lanes, 20 times: both correlations of 16 shifts with one reference."""
    benchmark(repeat_fft, scratch.a, scratch.b, search.rings.lengths[0], search.rings)


def test_largest_of_20_blocks(benchmark, search, scratch):
    benchmark(repeat_largest, scratch.a, search.rings.lengths[0], scratch.largest)


def test_ring_spectra_of_10_references(benchmark, search, averages):
    benchmark(ring_spectra, averages, search)
