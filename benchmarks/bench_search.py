"""Steps of the search one by one, on one thread, at 64 and 128 px: what a profile of ``align`` would show.

A step of a few microseconds is repeated inside compiled code, for the call from Python costs as much.
"""

import numpy as np
import pytest
from measure import particles_and_averages
from numba import njit

from mrefali.compiled import kernels
from mrefali.search import Search, ring_spectra

TIMES = 20


@njit
def repeat_fft(a, b, n, rings):
    for _ in range(TIMES):
        kernels.fft_lanes(a, b, n, rings)


@njit
def repeat_fill(n_freq, rings, shifts, scratch):
    for _ in range(TIMES):
        kernels._fill_block(0, 1, n_freq, rings, shifts, scratch)


@njit
def repeat_correlate(reference, spectra, first_row, n_rows, n_freq, z):
    for _ in range(TIMES):
        kernels._correlate(reference, spectra, first_row, n_rows, n_freq, z)


@njit
def repeat_largest(a, b, n, rings, largest):
    for _ in range(TIMES):
        kernels.fft_largest(a, b, n, rings, largest)


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
def particle(search, images):
    """One particle from the identity, as the kernels take it."""
    half = int(search.xr)
    return (0, 0, images[:1], np.full((1, 2), search.box / 2), np.full((1, 2), -half), np.full((1, 2), 2 * half + 1),
            search.rings, search.shifts)


@pytest.fixture
def scratch(search, particle):
    """Buffers of one thread, the particle in them."""
    buffers = kernels._new_scratch(search.box, 1, search.rings, search.shifts)
    kernels._prepare(*particle, buffers)
    return buffers


def test_prepare(benchmark, particle, scratch):
    """Pixels and sample places of one particle."""
    benchmark(kernels._prepare, *particle, scratch)


def test_fill_20_blocks_of_a_first_look(benchmark, search, averages, scratch):
    """Samples, moments, ring FFTs and the rows kept of 16 shifts, 20 times."""
    benchmark(repeat_fill, ring_spectra(averages, search).kept_of_ring, search.rings, search.shifts, scratch)


def test_fill_20_blocks_in_full(benchmark, search, scratch):
    benchmark(repeat_fill, search.rings.lengths // 2 + 1, search.rings, search.shifts, scratch)


def test_correlate_20_blocks_of_a_first_look(benchmark, search, averages, scratch):
    """Products of 16 shifts with one reference, 20 times, of the rows kept."""
    spectra = ring_spectra(averages, search)
    benchmark(repeat_correlate, spectra.packed[0], scratch.spectra, search.rings.first_row, spectra.kept,
              spectra.n_kept, scratch.a)


def test_correlate_20_blocks_in_full(benchmark, search, averages, scratch):
    rows = search.rings.n_rows
    benchmark(repeat_correlate, ring_spectra(averages, search).packed[0], scratch.spectra, search.rings.first_row,
              rows, rows.size, scratch.a)


def test_20_ffts_of_lanes(benchmark, search, scratch):
    """Of Lmax complex numbers in 16 lanes, 20 times: both correlations of 16 shifts with one reference."""
    scratch.a[:] = 1
    benchmark(repeat_fft, scratch.a, scratch.b, search.rings.lengths[0], search.rings)


def test_largest_of_20_ffts_of_lanes(benchmark, search, scratch):
    scratch.a[:] = 1
    benchmark(repeat_largest, scratch.a, scratch.b, search.rings.lengths[0], search.rings, scratch.largest)


def test_ring_spectra_of_10_references(benchmark, search, averages):
    benchmark(ring_spectra, averages, search)
