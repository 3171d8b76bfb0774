"""Which ``--vanished`` brings a lost view back: a table of docs/classes.md.

``python benchmarks/accuracy/lost_view.py`` prints it. The references are the true views but one, in whose place stands
noise; its class vanishes, and the particles of that view are in the others. One process of one thread a core.
"""

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from cases import UNEQUAL, use_one_thread

import mrefali
from mrefali.accuracy import match_classes
from mrefali.simulation import simulate_particles

PARTICLES, VIEWS, BOX, SNR, SEED, LOST = 800, 8, 64, 0.1, 0, (0, 2, 4, 6)
SETS = {"equal": {}, "20:1": {"sizes": UNEQUAL}, "10 % junk": {"junk": 0.1}}
POLICIES = ("split", "reseed")


def run(policy, simulated, lost):
    """Share of all particles, and of those of the lost view, in the right class; junk does not count."""
    made = simulate_particles(PARTICLES, VIEWS, BOX, snr=SNR, seed=SEED, **simulated)
    references = made.views.copy()
    references[lost] = np.random.default_rng(SEED).standard_normal((BOX, BOX))
    found = mrefali.align(made.images, references, ou=27, xr=3, yr=3, center=4, maxit=6, quiet=True, threads=1,
                          normalize_references=True, vanished=policy)
    shows = made.classes >= 0
    assign, classes = found.assign[shows], made.classes[shows]
    view_of_class, _ = match_classes(assign, classes, VIEWS, VIEWS)
    right = view_of_class[assign] == classes
    return right.mean(), right[classes == lost].mean()


def main():
    print("| set | vanished | right class, % | of the lost view, % |\n" + "|---" * 4 + "|")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, use_one_thread) as pool:
        for (name, simulated), policy in itertools.product(SETS.items(), POLICIES):
            results = [pool.submit(run, policy, simulated, lost) for lost in LOST]
            right, back = zip(*(one.result() for one in results), strict=True)
            print(f"| {name} | {policy} | {100 * np.mean(right):.1f} | {', '.join(f'{100 * b:.0f}' for b in back)} |",
                  flush=True)


if __name__ == "__main__":
    main()
