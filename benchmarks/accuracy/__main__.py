"""How close runs on simulated particles come to the truth: the tables of docs/accuracy.md.

``python benchmarks/accuracy`` makes both tables anew, in the page; ``--snr=0.3,0.1`` and ``--repeats=2`` make part of
them, on the screen. Each case varies one thing against the first; the last has all that is hard at once. Each core has
a process of its own, of one thread.
"""

import math
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import fire
import numpy as np
from cases import CASES, STARTS, evaluate_case, use_one_thread

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
SNRS, REPEATS = (1.0, 0.3, 0.1, 0.05, 0.02), 5
COLUMNS = (
    ("right class, %", 100, "class_share", 1), ("Rand", 1, "adjusted_rand", 3),
    ("right mirror, %", 100, "mirror_share", 1),
    ("gross, %", 100, "gross_share", 1), ("angle, degrees", 1, "angle_error_rms", 2),
    ("x bound", 1, "angle_multiple_of_bound", 2), ("shift, px", 1, "shift_error_rms", 2),
    ("x bound", 1, "shift_multiple_of_bound", 2), ("FRC 0.5, px", 1, "resolution_px", 2),
    ("empty", 1, "empty_classes", 1), ("s", 1, "seconds", 1),
)
HEAD = ["| " + " | ".join(["case", "SNR", *(head for head, *_ in COLUMNS)]) + " |", "|---" * (2 + len(COLUMNS)) + "|"]


def row(name, snr, runs):
    """A line of a table: mean and standard deviation over the runs, one a seed."""
    cells = [name, f"{snr:g}"]
    for _, factor, column, digits in COLUMNS:
        values = factor * np.array([math.nan if run[column] is None else run[column] for run in runs])
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(runs) > 1 else ""
        cells.append(f"{values.mean():.{digits}f}{spread}")
    return "| " + " | ".join(cells) + " |"


def tables(cases, snrs, repeats):
    """The lines of the table of each start, printed as they are made."""
    lines = {start: list(HEAD) for start in STARTS}
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, use_one_thread) as pool:
        runs = {(case.name, snr): [pool.submit(evaluate_case, case, snr, seed) for seed in range(repeats)]
                for case in cases for snr in snrs}
        for (name, snr), seeds in runs.items():
            for start in STARTS:
                lines[start].append(row(name, snr, [seed.result()[start] for seed in seeds]))
                print(f"{start}: {lines[start][-1]}", flush=True)
    return lines


def write_page(lines):
    """Put the tables in the place of those in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for start, rows in lines.items():
        marked = re.compile(rf"(<!-- table: {start} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        text = marked.sub(lambda found, rows=rows: found[1] + "\n".join(rows) + "\n" + found[2], text)
    PAGE.write_text(text, encoding="utf-8")


def chosen(*, snr=SNRS, repeats=REPEATS):
    """Make the tables of docs/accuracy.md anew, or part of them on the screen.

    Args:
        snr: SNRs, such as 0.3,0.1
        repeats: seeds
    """
    return np.atleast_1d(snr).tolist(), repeats


def main():
    # fire complains of a mistyped option after its function is done: so before the hour, not after it
    snrs, repeats = fire.Fire(chosen, serialize=lambda _: None)
    began = time.perf_counter()
    lines = tables(CASES, snrs, repeats)
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes, {len(os.sched_getaffinity(0))} cores")
    if (snrs, repeats) == (list(SNRS), REPEATS):
        write_page(lines)


if __name__ == "__main__":
    main()
