"""What seeding does before any iteration of ``classify``: figures of docs/classes.md, on simulated particles of 64 px.

``python benchmarks/accuracy/seeding.py`` prints by how many standard errors groups of one view, and of two, differ by
more than noise, and how right the classes are that the references are made of; ``--sets=1,4 --seeds=20`` the latter
alone, of more particles, since of five sets luck decides. One process of one thread a core.
"""

import os

os.environ.update(NUMBA_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from multiprocessing import get_context

import fire
import numpy as np
from classify import SETS

from mrefali import average, geometry
from mrefali.accuracy import match_classes
from mrefali.contrast import Contrast
from mrefali.seeding import find_seeds, search_of
from mrefali.simulation import simulate_particles
from mrefali.structure import SURE, Structures

BOX, RADIUS, HALF_RANGE, VIEWS = 64, 28, 3.0, 8


def simulated(seed, n, views, **options):
    """Normalised images, what is true of them, and the search."""
    made = simulate_particles(n, views, BOX, seed=seed, **options)
    search, images = search_of(BOX, RADIUS, HALF_RANGE)[0], made.images.copy()
    average.normalize_particles(images, geometry.disc(BOX, RADIUS))
    return images, made, search


def excess(snr, seed):
    """The largest of each group of 100 particles of one view, and of each two such groups together."""
    images, made, search = simulated(seed, 100 * VIEWS, VIEWS, snr=snr)
    structures = Structures(images, Contrast(images, RADIUS), search, np.random.default_rng(seed))

    def of(*views):
        members = np.flatnonzero(np.isin(made.classes, views))
        mean = average.transform(images[members], made.poses[members]).mean(axis=0)
        return structures.of(members, 100, mean, len(members)).excess.max()

    return snr, [of(k) for k in range(VIEWS)], [of(k, (k + 1) % VIEWS) for k in range(VIEWS)]


def right(name, views, options, seed):
    """Share of the particles in the right class, and views that have a class, as found before any iteration."""
    images, made, search = simulated(seed, 100 * views, views, **options)
    found, shows = find_seeds(images, views, search, np.random.default_rng(1000)), made.classes >= 0
    assign, truth = found.assign[shows], made.classes[shows]
    view_of_class, _ = match_classes(assign, truth, max(found.n_classes, views), views)
    counts = np.zeros((found.n_classes, views), int)
    np.add.at(counts, (assign, truth), 1)
    return name, 100 * (view_of_class[assign] == truth).mean(), len(set(counts.argmax(axis=1)[counts.any(axis=1)]))


def main(sets="", seeds=5):
    """Print both tables, or the second of some sets.

    Parameters
    ----------
    sets : str
        Which of classify.py's, by number from 0, such as 1,4.
    seeds : int
    """
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        if not str(sets):
            _print_groups(pool)
        chosen = [int(i) for i in (sets if isinstance(sets, tuple) else str(sets).split(",")) if str(i)] or range(6)
        found = pool.starmap(right, [(*SETS[i], seed) for i in chosen for seed in range(seeds)], chunksize=1)
    print("\n| set | right class before any iteration, % | each seed | views found | each seed |\n" + "|---" * 5 + "|")
    for i in chosen:
        name, views, _ = SETS[i]
        _, shares, n_found = zip(*(one for one in found if one[0] == name), strict=True)
        print(f"| {name} | {np.mean(shares):.1f} | {', '.join(f'{share:.1f}' for share in shares)} | "
              f"{sum(n_found)} of {views * seeds} | {', '.join(map(str, n_found))} |")


def _print_groups(pool):
    groups = pool.starmap(excess, [(snr, seed) for snr in (0.3, 0.1, 0.05) for seed in range(4)], chunksize=1)
    print("| SNR | one view: largest, groups beyond SURE | two views: median, least |\n|---|---|---|")
    for snr in (0.3, 0.1, 0.05):
        one, two = (np.concatenate([group[i] for group in groups if group[0] == snr]) for i in (1, 2))
        beyond = f"{(one > SURE).sum()} of {len(one)}"
        print(f"| {snr:g} | {one.max():.1f}, {beyond} | {np.median(two):.0f}, {two.min():.0f} |")


if __name__ == "__main__":
    fire.Fire(main)
