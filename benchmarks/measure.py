"""What the benchmarks share: the unit of work, particles and references as they occur, and how time is taken."""

import os
import time
from pathlib import Path

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from mrefali import write_stack
from mrefali.average import normalize_particles, normalize_references
from mrefali.geometry import disc, identity_poses, ring_lengths, ring_radii, to_matrices
from mrefali.reference import TanhFilter, low_pass
from mrefali.search import Search, align, ring_spectra
from mrefali.simulation import simulate_particles

# as the command line has it, before the first parallel call: idle threads would slow what comes after them
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

#: Edge of the matrices whose product is the unit.
UNIT = 1024


def matrix_product():
    """A function that does the unit of work on one thread: a ``UNIT``**3 float32 matrix product."""
    a, b = np.random.default_rng(0).standard_normal((2, UNIT, UNIT), np.float32)
    product = np.empty_like(a)

    def run():
        with threadpool_limits(1):
            np.matmul(a, b, out=product)
    return run


def particles_and_averages(n_particles, n_references, box, half_range):
    """Noisy particles, and references low-passed as class averages are; (n, box, box) float32 both."""
    particles = simulate_particles(n_particles, n_references, box, snr=0.1, max_shift=half_range / 3)
    return particles.images, np.stack([low_pass(view, TanhFilter(0.2, 0.1)) for view in particles.views])


def search_of(box, outer_radius, half_range, n_references, n_particles, n_threads=1):
    """A function that searches noisy particles; ``half_range`` is one number, or those of x and y."""
    xr, yr = np.broadcast_to(half_range, 2).tolist()
    search = Search(box, 1, outer_radius, 1, xr, yr, 1)
    images, averages = particles_and_averages(n_particles, n_references, box, max(xr, yr))
    inside = disc(box, outer_radius)
    normalize_particles(images, inside)
    spectra, poses = ring_spectra(normalize_references(averages, inside), search), identity_poses(n_particles)

    def run():
        numba.set_num_threads(n_threads)
        align(images, poses, spectra, search)
    return run


def write_files(folder, box, half_range, n_references, n_particles):
    """Write ``particles.hdf`` and ``references.hdf`` into ``folder``; their paths."""
    paths = [str(Path(folder, name)) for name in ("particles.hdf", "references.hdf")]
    images, averages = particles_and_averages(n_particles, n_references, box, half_range)
    write_stack(paths[0], images, [{"xform.align2d": matrix} for matrix in to_matrices(identity_poses(n_particles))])
    write_stack(paths[1], averages)
    return paths


def product_flop(outer_radius, n_shifts, n_references):
    """Additions and multiplications in the products of one particle with all references, at all shifts.

    Four products of real numbers, real and imaginary parts of reference and particle, for each ring and each of its
    angular frequencies up to its own Nyquist frequency: they give the straight and the mirrored correlation.
    """
    lengths = ring_lengths(ring_radii(1, outer_radius, 1))
    return 4 * 2 * int((lengths // 2 + 1).sum()) * n_shifts * n_references


def interleaved_seconds(works, repeats):
    """Median time of each of some functions, one after the other, so that a busy spell meets all alike.

    Parameters
    ----------
    works : dict of callables
        Each is called once before, which compiles it and warms caches.

    Returns
    -------
    dict of float, s
    """
    seconds = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(times)) for name, times in seconds.items()}
