"""What seeding does before any iteration of ``classify``: figures of docs/classes.md, on simulated particles of 64 px.

``python benchmarks/accuracy/seeding.py`` prints by how many standard errors groups of one view, and of two, differ by
more than noise, and how right the classes are that the references are made of, beside those that stay where one
begins with the true ones; ``--sets=1,4 --seeds=20`` the latter alone, of more sets of particles, since of five luck
decides. One process of one thread a core.
"""

import os

os.environ.update(NUMBA_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from multiprocessing import get_context

import fire
import numpy as np
from cases import judged
from classify import SETS, chosen

from mrefali import average, geometry
from mrefali.contrast import Contrast
from mrefali.seeding import Classes, _averages, _needed, _settle, find_seeds, search_of
from mrefali.simulation import simulate_particles
from mrefali.structure import SURE, Structures

BOX, RADIUS, HALF_RANGE, VIEWS = 64, 28, 3.0, 8


def simulated(seed, views, **options):
    """Normalised images, what is true of them, and the search."""
    made = simulate_particles(**{"n_particles": 100 * views, "n_views": views, "box": BOX, "seed": seed} | options)
    search, images = search_of(BOX, RADIUS, HALF_RANGE)[0], made.images.copy()
    average.normalize_particles(images, geometry.disc(BOX, RADIUS))
    return images, made, search


def excess(snr, seed):
    """The largest of each group of 100 particles of one view, and of each two such groups together."""
    images, made, search = simulated(seed, VIEWS, snr=snr)
    structures = Structures(images, Contrast(images, RADIUS), search, np.random.default_rng(seed))

    def of(*views):
        members = np.flatnonzero(np.isin(made.classes, views))
        mean = average.transform(images[members], made.poses[members]).mean(axis=0)
        return structures.of(members, 100, mean, len(members)).excess.max()

    return snr, [of(k) for k in range(VIEWS)], [of(k, (k + 1) % VIEWS) for k in range(VIEWS)]


def right(views, options, seed):
    """Share of the particles in the right class, and views that have a class: as found, and as stay of the truth."""
    images, made, search = simulated(seed, views, **options)
    found = find_seeds(images, views, search, np.random.default_rng(1000))
    results = []
    for assign in (found.assign, settled_truth(images, made, views, search)):
        share, n_found, _ = judged(assign, made.classes, views)
        results += [100 * share, n_found]
    return results


def settled_truth(images, made, views, search):
    """What becomes of the true classes, begun with the true poses; junk is in none."""
    contrast, shown = Contrast(images, search.outer_radius), np.flatnonzero(made.classes >= 0)
    blank = np.zeros((views, BOX, BOX), np.float32)
    classes = Classes(*_averages(images[shown], made.classes[shown], made.poses[shown], blank),
                      made.classes.astype(np.int32))
    state = _settle(images, classes, contrast, search)
    kept = _needed(state, views, Structures(images, contrast, search, np.random.default_rng(0)))
    return (state if len(kept) == views else _settle(images, state.only(kept), contrast, search)).assign


def main(sets="", seeds=5):
    """Print both tables, or the second of some sets.

    Parameters
    ----------
    sets : str
        Which of classify.py without a CTF, by number from 0, such as 1,4; without it both tables, the second of the
        first six.
    seeds : int
    """
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        if not str(sets):
            _print_groups(pool)
        print("\n| set | right class before any iteration, % | each seed | views found | each seed "
              "| of true classes, right, % | views that stay | each seed |\n" + "|---" * 8 + "|")
        for name, views, options in chosen(sets) if str(sets) else SETS[:6]:
            found = pool.starmap(right, [(views, options, seed) for seed in range(seeds)], chunksize=1)
            shares, n_found, true_shares, n_stay = zip(*found, strict=True)
            print(f"| {name} | {np.mean(shares):.1f} | {', '.join(f'{share:.1f}' for share in shares)} | "
                  f"{sum(n_found)} of {views * seeds} | {', '.join(map(str, n_found))} | {np.mean(true_shares):.1f} | "
                  f"{sum(n_stay)} of {views * seeds} | {', '.join(map(str, n_stay))} |", flush=True)


def _print_groups(pool):
    groups = pool.starmap(excess, [(snr, seed) for snr in (0.3, 0.1, 0.05) for seed in range(4)], chunksize=1)
    print("| SNR | one view: largest, groups beyond SURE | two views: median, least |\n|---|---|---|")
    for snr in (0.3, 0.1, 0.05):
        one, two = (np.concatenate([group[i] for group in groups if group[0] == snr]) for i in (1, 2))
        beyond = f"{(one > SURE).sum()} of {len(one)}"
        print(f"| {snr:g} | {one.max():.1f}, {beyond} | {np.median(two):.0f}, {two.min():.0f} |")


if __name__ == "__main__":
    fire.Fire(main)
