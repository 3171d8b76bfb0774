"""How close runs on simulated particles come to the truth: the tables of docs/accuracy.md.

``python benchmarks/accuracy`` makes both tables anew, in the page; ``--snr=0.3,0.1`` and ``--repeats=2`` make part of
them, on the screen. Each case varies one thing against the first; the last has all that is hard at once.
"""

import argparse
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import mrefali
from mrefali.average import normalize_particles
from mrefali.demonstration import poor_references
from mrefali.geometry import disc
from mrefali.io import open_stack, write_stack
from mrefali.simulation import read_truth

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
SNRS, REPEATS = (1.0, 0.3, 0.1, 0.05, 0.02), 5
PARTICLES_A_VIEW, PIXEL_SIZE_A = 100, 2.0
UNEQUAL = [20, 10, 8, 6, 4, 3, 2, 1]


@dataclass(frozen=True)
class Case:
    """One way to simulate: a name and what differs from 8 views in a box of 64 px."""

    name: str
    views: int = 8
    box: int = 64
    simulate: dict = field(default_factory=dict)

    @property
    def run(self):
        """Options of the search: rings as wide as a search of 3 px allows."""
        return {"ou": self.box // 2 - 5, "xrng": 3, "yrng": 3, "CTF": "CTF" in self.simulate, "quiet": True}


CASES = (
    Case("8 views, 64 px"),
    Case("30 views", views=30),
    Case("nearly symmetric", simulate={"nearly_symmetric": True}),
    Case("128 px", box=128),
    Case("CTF", simulate={"CTF": True}),
    Case("sizes 20:1", simulate={"sizes": UNEQUAL}),
    Case("10 % junk", simulate={"junk": 0.1}),
    Case("all but 30 views", box=128, simulate={"nearly_symmetric": True, "CTF": True, "sizes": UNEQUAL, "junk": 0.1}),
)
#: How a run starts and how long it is: references of a few badly aligned particles, or the true views, once.
STARTS = {"poor": {"maxit": 5}, "true": {"maxit": 1, "center": 0}}
COLUMNS = (
    ("right class, %", 100, "class_share", 1), ("Rand", 1, "adjusted_rand", 3),
    ("right mirror, %", 100, "mirror_share", 1),
    ("gross, %", 100, "gross_share", 1), ("angle, degrees", 1, "angle_error_rms", 2),
    ("x bound", 1, "angle_multiple_of_bound", 2), ("shift, px", 1, "shift_error_rms", 2),
    ("x bound", 1, "shift_multiple_of_bound", 2), ("FRC 0.5, px", 1, "resolution_px", 2),
    ("empty", 1, "empty_classes", 1), ("s", 1, "seconds", 1),
)


def evaluate_once(case, snr, start, seed, folder):
    """Simulate, align and evaluate; what ``mrefali evaluate --json`` prints, and the time of the run in s."""
    stack, refs, truth, out = (str(folder / name) for name in ("p.hdf", "r.hdf", "p_truth.csv", "out"))
    mrefali.simulate(stack, case.views * PARTICLES_A_VIEW, case.views, case.box, snr, pixel_size=PIXEL_SIZE_A,
                     seed=seed, **case.simulate)
    particles, views = open_stack(stack), open_stack(folder / "p_views.hdf")
    if start == "true":
        references = views.read(0, views.n_images)
        normalize_particles(references, disc(case.box, case.run["ou"]))  # of one contrast, or the strongest draws all
    else:
        classes, poses = read_truth(truth)
        references = poor_references(particles.read(0, particles.n_images), classes, poses)
    write_stack(refs, references, pixel_size_A=PIXEL_SIZE_A)
    began = time.perf_counter()
    mrefali.mref_ali2d(stack, refs, out, **case.run, **STARTS[start])
    seconds = time.perf_counter() - began
    found = mrefali.evaluate(stack, truth, CTF=case.run["CTF"]).as_dict()
    resolutions = [c["resolution_px"] for c in found["classes"] if c["resolution_px"] is not None]
    return found | {"seconds": seconds, "resolution_px": float(np.median(resolutions))}


def row(case, snr, start, repeats):
    """A line of the table: mean and standard deviation over seeds."""
    runs = []
    for seed in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(evaluate_once(case, snr, start, seed, Path(folder)))
    cells = [case.name, f"{snr:g}"]
    for _, factor, name, digits in COLUMNS:
        values = factor * np.array([math.nan if run[name] is None else run[name] for run in runs])
        spread = values.std(ddof=1) if repeats > 1 else math.nan
        cells.append(f"{values.mean():.{digits}f} ± {spread:.{digits}f}")
    return "| " + " | ".join(cells) + " |"


def table(start, snrs, repeats):
    """The lines of the table of one way to start, printed as they are made."""
    heads = ["case", "SNR", *(head for head, *_ in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    print(*lines, sep="\n", flush=True)
    for case in CASES:
        for snr in snrs:
            lines.append(row(case, snr, start, repeats))
            print(lines[-1], flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snr", default=None, help="SNRs, such as 0.3,0.1; the page is left as it is then")
    parser.add_argument("--repeats", type=int, default=None, help="seeds; the page is left as it is then")
    given = parser.parse_args()
    snrs = SNRS if given.snr is None else [float(word) for word in given.snr.split(",")]
    began = time.perf_counter()
    tables = {start: table(start, snrs, given.repeats or REPEATS) for start in STARTS}
    minutes = (time.perf_counter() - began) / 60
    print(f"{minutes:.0f} minutes, {len(os.sched_getaffinity(0))} cores")
    if given.snr is None and given.repeats is None:
        text = PAGE.read_text(encoding="utf-8")
        for start, lines in tables.items():
            marked = re.compile(rf"(<!-- table: {start} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
            text = marked.sub(lambda found, lines=lines: found[1] + "\n".join(lines) + "\n" + found[2], text)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
