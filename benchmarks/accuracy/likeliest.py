"""Classes by ``--assignment=likeliest`` and by ``best`` from known references: figures of docs/commands.md and more.

``python benchmarks/accuracy/likeliest.py`` prints, iteration by iteration, how many particles are in the right class:
from the true views, and from averages, in true poses, of classes of which half of the particles are drawn at random.
"""

import numpy as np

import mrefali
from mrefali import average, geometry
from mrefali.accuracy import match_classes
from mrefali.simulation import simulate_particles

#: Particles, views, box, SNR, shifts, seeds, iterations, and whether references begin as the true views.
SETS = (
    (3000, 8, 64, 0.1, 3, (1,), 3, True),
    (3000, 30, 64, 0.1, 3, (1,), 3, True),
    (800, 8, 64, 0.1, 3, range(5), 1, True),  # as benchmarks/accuracy/classify.py has it
    (800, 8, 64, 0.05, 3, range(5), 1, True),
    (160, 4, 32, 0.1, 1, (3, 4, 5), 6, False),
    (320, 4, 64, 0.02, 1, (3, 4, 5), 6, False),
    (160, 4, 64, 0.05, 1, (3, 4, 5), 6, False),
)


def half_right(made, seed):
    """Averages of the particles in their true poses, by labels of which half are drawn."""
    rng, labels = np.random.default_rng(seed), made.classes.copy()
    drawn = rng.random(len(labels)) < 0.5
    labels[drawn] = rng.integers(0, len(made.views), drawn.sum())
    moved = average.transform(made.images.copy(), made.poses)
    return np.stack([moved[labels == k].mean(axis=0) for k in range(len(made.views))])


def shares_right(found, classes, views):
    """Share of the particles in the right class after each iteration, %."""
    return [100 * (match_classes(i.assign, classes, views, views)[0][i.assign] == classes).mean()
            for i in found.iterations]


def main():
    print("| particles | views | box | SNR | references | assignment | right class, % |\n" + "|---" * 7 + "|")
    for n, views, box, snr, shift, seeds, maxit, true in SETS:
        for assignment in ("best", "likeliest"):
            rows = []
            for seed in seeds:
                made = simulate_particles(n, views, box, snr, shift, seed=seed)
                found = mrefali.align(
                    made.images, made.views if true else half_right(made, seed), xr=shift, yr=shift, maxit=maxit,
                    ou=geometry.default_outer_radius(box) + 1 - shift, subpixel=True, normalize_references=True,
                    center=-1, assignment=assignment, vanished="keep", quiet=True)
                rows.append(shares_right(found, made.classes, views))
            print(f"| {n} | {views} | {box} | {snr} | {'true' if true else 'half drawn'} | {assignment} | "
                  f"{', '.join(f'{share:.1f}' for share in np.mean(rows, axis=0))} |", flush=True)


if __name__ == "__main__":
    main()
