"""What the search costs, beside the original: ms per particle on one thread, and in units of a matrix product.

The unit is one 1024 x 1024 x 1024 float32 matrix product on one thread, timed in the same run, between the searches:
what a search costs in it survives a change of machine well enough to compare with figures taken elsewhere.
"""

import time

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from mrefali.average import normalize_particles, normalize_references
from mrefali.geometry import disc, identity_poses
from mrefali.reference import TanhFilter, low_pass
from mrefali.search import Search, align, ring_spectra
from mrefali.simulation import simulate_particles

#: (box, ou, xr = yr, references) and what the original takes for one particle, in units, measured once.
ORIGINAL_UNITS = {
    (64, 27, 3, 3): 0.081,
    (64, 27, 3, 10): 0.154,
    (128, 55, 3, 50): 1.62,
    (128, 52, 10, 10): 4.0,
}
N_PARTICLES, REPEATS = 64, 7


def matrix_product():
    """A function that does the unit of work."""
    a, b = np.random.default_rng(0).standard_normal((2, 1024, 1024), np.float32)
    product = np.empty_like(a)

    def run():
        with threadpool_limits(1):
            np.matmul(a, b, out=product)
    return run


def search_of(box, outer_radius, half_range, n_references):
    """A function that searches ``N_PARTICLES`` noisy particles; the references are low-passed as averages are."""
    search = Search(box, 1, outer_radius, 1, half_range, half_range, 1)
    particles = simulate_particles(N_PARTICLES, n_references, box, snr=0.1, max_shift=half_range / 3)
    inside = disc(box, outer_radius)
    normalize_particles(particles.images, inside)
    averages = np.stack([low_pass(view, TanhFilter(0.2, 0.1)) for view in particles.views])
    spectra = ring_spectra(normalize_references(averages, inside), search)
    poses = identity_poses(N_PARTICLES)
    return lambda: align(particles.images, poses, spectra, search)


def seconds_of(work):
    """How long ``work()`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main():
    numba.set_num_threads(1)
    works = {"unit": matrix_product()} | {case: search_of(*case) for case in ORIGINAL_UNITS}
    for work in works.values():
        work()  # compiles, and warms caches
    seconds = {name: [] for name in works}
    for _ in range(REPEATS):  # interleaved, so that a busy spell of the machine meets all alike
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    unit = np.median(seconds["unit"])
    print(f"search on one thread, medians of {REPEATS}; unit: 1024^3 float32 matrix product, {1e3 * unit:.1f} ms\n"
          "box   ou  xr=yr  references   ms/particle   units   original, units   times faster")
    for case, original in ORIGINAL_UNITS.items():
        particle = np.median(seconds[case]) / N_PARTICLES
        print("{:3d}  {:3d}  {:5d}  {:10d}".format(*case), f"{1e3 * particle:13.3f} {particle / unit:7.4f}"
              f"{original:18.3f}{original * unit / particle:15.1f}")


if __name__ == "__main__":
    main()
