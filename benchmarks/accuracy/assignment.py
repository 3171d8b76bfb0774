"""Which options of ``mref_ali2d`` keep classes from collapsing: a table of docs/classes.md.

``python benchmarks/accuracy/assignment.py`` prints it; ``--sets=0 --assignment=equal --seeds=1`` a part of it. The
references know nothing of any view: each is the average of a hundred particles drawn at random, as they are. One
process of one thread a core.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fire
import numpy as np
from cases import UNEQUAL, judged, use_one_thread

import mrefali
from mrefali.io import open_stack, write_stack
from mrefali.simulation import read_truth

VIEWS, BOX, SNR, AVERAGED = 8, 64, 0.1, 100
SETS = (("equal", {}), ("20:1", {"sizes": UNEQUAL}))
RUN = {"ou": 27, "xrng": 3, "yrng": 3, "center": 4, "maxit": 10, "threads": 1, "quiet": True}
VANISHED = ("random", "split", "reseed")


def write_set(folder, options, seed):
    """Write particles, their truth, and references that are averages of particles drawn at random."""
    mrefali.simulate(str(folder / "p.hdf"), 100 * VIEWS, VIEWS, BOX, SNR, seed=seed, **options)
    stack, rng = open_stack(str(folder / "p.hdf")), np.random.default_rng(seed)
    images = stack.read(0, stack.n_images)
    drawn = [rng.choice(len(images), AVERAGED, replace=False) for _ in range(VIEWS)]
    write_stack(str(folder / "r.hdf"), np.stack([images[some].mean(axis=0) for some in drawn]),
                pixel_size_A=stack.pixel_size_A)


def run(simulated, seed, options):
    """Share of the particles in the right class, views that have a class, sizes of the classes, and s of a core."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_set(folder, simulated, seed)
        began = time.process_time()
        mrefali.mref_ali2d(str(folder / "p.hdf"), str(folder / "r.hdf"), str(folder / "out"), **RUN, **options)
        seconds = time.process_time() - began
        assign = np.array(open_stack(str(folder / "p.hdf")).column("assign"))
        truth, _ = read_truth(folder / "p_truth.csv")
    right, found, _ = judged(assign, truth, VIEWS)
    return right, found, np.bincount(assign, minlength=VIEWS), seconds


def main(sets=(0, 1), assignment=("best", "likeliest", "capped", "equal"), normalized=(False, True), vanished=VANISHED,
         seeds=2):
    """Print the table.

    Parameters
    ----------
    sets : int
        Which of ``SETS``, by number from 0.
    assignment, normalized, vanished
        Values of these options of a run.
    seeds : int
    """
    sets, *options = [value if isinstance(value, (tuple, list)) else (value,)
                      for value in (sets, assignment, normalized, vanished)]
    # of equal classes none vanishes
    cases = [(a, n, v) for a, n, v in itertools.product(*options) if a != "equal" or v == options[2][0]]
    print("| set | assignment | normalised | vanished | right class, % | views found | largest, smallest class | s |")
    print("|---" * 8 + "|")
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, use_one_thread) as pool:
        for i in sets:
            name, simulated = SETS[i]
            results = [pool.submit(run, simulated, seed, {"assignment": a, "normalize_references": n, "vanished": v})
                       for a, n, v in cases for seed in range(seeds)]
            for number, (a, n, v) in enumerate(cases):
                right, found, sizes, cpu = zip(*(one.result() for one in results[number * seeds:(number + 1) * seeds]),
                                               strict=True)
                print(f"| {name} | {a} | {'yes' if n else 'no'} | {'' if a == 'equal' else v} | "
                      f"{', '.join(f'{100 * r:.1f}' for r in right)} | {', '.join(map(str, found))} | "
                      f"{'; '.join(f'{s.max()}, {s.min()}' for s in sizes)} | {np.mean(cpu):.0f} |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
