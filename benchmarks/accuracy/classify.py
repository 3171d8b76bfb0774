"""How right ``classify`` is from raw particles: a table of docs/classes.md.

``python benchmarks/accuracy/classify.py`` prints it; ``--sets=0,3 --seeds=2`` a part of it. One process of one thread a
core.
"""

import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fire
import numpy as np
from cases import UNEQUAL, judged

import mrefali
from mrefali.io import open_stack
from mrefali.simulation import read_truth

#: Name, views (and K), and how the particles are simulated, of 64 px, 100 a view if nothing else is said.
SETS = (
    ("8 views, SNR 0.3", 8, {"snr": 0.3}),
    ("8 views, SNR 0.1", 8, {"snr": 0.1}),
    ("8 views, SNR 0.05", 8, {"snr": 0.05}),
    ("20:1, SNR 0.3", 8, {"snr": 0.3, "sizes": UNEQUAL}),
    ("20:1, SNR 0.1", 8, {"snr": 0.1, "sizes": UNEQUAL}),
    ("10 % junk, SNR 0.1", 8, {"snr": 0.1, "junk": 0.1}),
    ("30 views, SNR 0.1", 30, {"snr": 0.1}),
    ("20:1, SNR 0.1, 4000 particles", 8, {"snr": 0.1, "sizes": UNEQUAL, "n_particles": 4000}),
    ("CTF, SNR 0.1", 8, {"snr": 0.1, "CTF": True}),
    ("CTF, 20:1, SNR 0.1", 8, {"snr": 0.1, "sizes": UNEQUAL, "CTF": True}),
)


def run(views, options, seed, assignment):
    """Share of the particles in the right class, views that have a class, and classes made, of one set."""
    with tempfile.TemporaryDirectory() as folder:
        stack, out = Path(folder, "p.hdf"), Path(folder, "out")
        mrefali.simulate(stack, **{"n_particles": 100 * views, "n_views": views, "box": 64, "seed": seed} | options)
        subprocess.run([Path(sys.executable).parent / "mrefali", "classify", stack, out, f"--K={views}",
                        f"--assignment={assignment}", f"--CTF={options.get('CTF', False)}", "--threads=1", "--quiet"],
                       check=True)
        assign, (truth, _) = np.array(open_stack(stack).column("assign")), read_truth(Path(folder, "p_truth.csv"))
    return judged(assign, truth, views)


def chosen(sets):
    """Those of ``SETS`` that ``--sets`` names, all without it."""
    numbers = [int(i) for i in (sets if isinstance(sets, tuple) else str(sets).split(",")) if str(i)]
    return [SETS[i] for i in numbers] or SETS


def main(sets="", seeds=5, assignment="likeliest"):
    """Print the table.

    Parameters
    ----------
    sets : str
        Which, by number from 0, such as 0,3; all without it.
    seeds : int
    assignment : str
        Of the iterations after the seeds.
    """
    print("| set | right class, % | each seed | views found | classes | CPU, s a run |\n" + "|---" * 6 + "|")
    for name, views, options in chosen(sets):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = list(pool.map(lambda seed, views=views, options=options: run(views, options, seed, assignment),
                                    range(seeds)))
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime) / seeds
        right, found, classes = zip(*results, strict=True)
        print(f"| {name} | {100 * np.mean(right):.1f} | {', '.join(f'{100 * r:.1f}' for r in right)} | "
              f"{', '.join(map(str, found))} of {views} | {', '.join(map(str, classes))} | {cpu:.0f} |", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
