"""What the search costs, beside the original: ms per particle on one thread, and in units of a matrix product.

The unit is one 1024 x 1024 x 1024 float32 matrix product on one thread, timed in the same run, between the searches:
what a search costs in it survives a change of machine well enough to compare with figures taken elsewhere. The same
searches on two threads say what the second one gains.
"""

import numba
from measure import UNIT, interleaved_seconds, matrix_product, product_flop, search_of

#: (box, ou, xr = yr, references) and what the original takes for one particle, in units, measured once.
ORIGINAL_UNITS = {
    (64, 27, 3, 3): 0.081,
    (64, 27, 3, 10): 0.154,
    (128, 55, 3, 50): 1.62,
    (128, 52, 10, 10): 4.0,
}
#: Particles searched at a time: enough for threads to share them evenly.
N_PARTICLES = {(64, 27, 3, 3): 512, (64, 27, 3, 10): 512, (128, 55, 3, 50): 128, (128, 52, 10, 10): 64}
REPEATS = 7


def main():
    threads = [1, 2] if numba.config.NUMBA_NUM_THREADS > 1 else [1]
    works = {"unit": matrix_product()} | {
        (case, n): search_of(*case, N_PARTICLES[case], n) for case in ORIGINAL_UNITS for n in threads}
    seconds = interleaved_seconds(works, REPEATS)
    unit = seconds["unit"]
    peak = 2 * UNIT**3 / unit
    print(f"search on one thread, medians of {REPEATS}; unit: {UNIT}^3 float32 matrix product, {1e3 * unit:.1f} ms, "
          f"{peak / 1e9:.0f} GFLOP/s\n"
          "box   ou  xr=yr  references   ms/particle   units   original, units   times faster   two threads   GFLOP/s")
    for case, original in ORIGINAL_UNITS.items():
        particle = seconds[case, 1] / N_PARTICLES[case]
        gain = f"{seconds[case, 1] / seconds[case, 2]:13.2f}x" if 2 in threads else "   (one core)"
        _, outer_radius, half_range, n_references = case
        rate = product_flop(outer_radius, (2 * half_range + 1) ** 2, n_references) / particle
        print("{:3d}  {:3d}  {:5d}  {:10d}".format(*case), f"{1e3 * particle:13.3f} {particle / unit:7.4f}"
              f"{original:18.3f}{original * unit / particle:15.1f}{gain}{rate / 1e9:10.0f}")
    print("GFLOP/s: as if each reference were multiplied in full at every shift, over the time of the whole search")


if __name__ == "__main__":
    main()
