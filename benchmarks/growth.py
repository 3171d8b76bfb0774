"""How the search grows with particles, shifts and references: one of them about doubled at a time, the rest kept.

The slope is that of a straight line through the logarithms: 1 is growth in proportion, 0 is none.
"""

import numpy as np
from measure import interleaved_seconds, search_of

BOX, OUTER_RADIUS = 64, 21  # leaves +-10 px of search
N_PARTICLES, HALF_RANGE, N_REFERENCES = 128, 3, 10
REPEATS = 5

#: Half-ranges in x and y whose numbers of shifts double, as nearly as odd numbers do.
HALF_RANGES = [(2, 2), (3, 3), (4, 5), (6, 7), (9, 10)]


def report(name, numbers, works):
    """Time the searches, one a number, and print times and slope."""
    seconds = interleaved_seconds(dict(zip(numbers, works, strict=True)), REPEATS)
    slope = np.polyfit(np.log(numbers), np.log([seconds[n] for n in numbers]), 1)[0]
    print(f"{name:10s}", "  ".join(f"{n}: {1e3 * seconds[n]:.1f} ms" for n in numbers), f"  slope {slope:.2f}")


def main():
    print(f"growth of the search on one thread, {BOX} px, ou={OUTER_RADIUS}, medians of {REPEATS}; what is not varied: "
          f"{N_PARTICLES} particles, {N_REFERENCES} references, xr=yr={HALF_RANGE}")
    numbers = [64, 128, 256, 512, 1024]
    report("particles", numbers, [search_of(BOX, OUTER_RADIUS, HALF_RANGE, N_REFERENCES, n) for n in numbers])
    numbers = [(2 * x + 1) * (2 * y + 1) for x, y in HALF_RANGES]
    report("shifts", numbers, [search_of(BOX, OUTER_RADIUS, half, N_REFERENCES, N_PARTICLES) for half in HALF_RANGES])
    numbers = [5, 10, 20, 40, 80]
    report("references", numbers, [search_of(BOX, OUTER_RADIUS, HALF_RANGE, k, N_PARTICLES) for k in numbers])


if __name__ == "__main__":
    main()
