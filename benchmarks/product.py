"""How fast the search multiplies: GFLOP/s of its product alone, beside the machine's own peak in the same run.

The peak is the rate of the unit, a large float32 matrix product on one thread. Counted are the additions and
multiplications that ``measure.product_flop`` counts, for the lanes of one block; zeros that pad the rows and the sums
at the end of each frequency are not.
"""

import numpy as np
from measure import UNIT, interleaved_seconds, matrix_product, product_flop
from numba import njit
from search import ORIGINAL_UNITS

from mrefali.compiled import kernels
from mrefali.search import Search, ring_spectra

REPEATS = 15


@njit
def correlate_with_all(packed, spectra, first_row, n_rows, z, times):
    """Products of one block of lanes with every reference, so many times."""
    for _ in range(times):
        for k in range(packed.shape[0]):
            kernels._correlate(packed[k], spectra, first_row, n_rows, n_rows.size, z)


def product_of(box, outer_radius, n_references):
    """A function that multiplies one block of lanes with random references, and what it computes."""
    search = Search(box, 1, outer_radius, 1, 0, 0, 1)
    rng = np.random.default_rng(1)
    references = ring_spectra(rng.standard_normal((n_references, box, box), np.float32), search)
    first_row = search.rings.first_row
    spectra = rng.standard_normal(2 * kernels.LANES * first_row[-1], np.float32)
    z = np.empty(2 * kernels.LANES * search.rings.lengths[0], np.float32)
    flop = product_flop(outer_radius, kernels.LANES, n_references)
    times = max(1, int(1e9 / flop))  # some 20 ms, as the unit takes

    def run():
        correlate_with_all(references.packed, spectra, first_row, np.diff(first_row), z, times)
    return run, times * flop


def main():
    shapes = sorted({(box, outer_radius, k) for box, outer_radius, _, k in ORIGINAL_UNITS})
    products = {shape: product_of(*shape) for shape in shapes}
    works = {"unit": matrix_product()} | {shape: run for shape, (run, _) in products.items()}
    seconds = interleaved_seconds(works, REPEATS)
    peak = 2 * UNIT**3 / seconds["unit"]
    print(f"product of the search on one thread, medians of {REPEATS}; peak: {peak / 1e9:.0f} GFLOP/s\n"
          "box   ou  references   GFLOP/s   of the peak")
    for shape, (_, flop) in products.items():
        rate = flop / seconds[shape]
        print("{:3d}  {:3d}  {:10d}".format(*shape), f"{rate / 1e9:9.0f} {100 * rate / peak:11.0f} %")


if __name__ == "__main__":
    main()
