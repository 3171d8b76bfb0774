"""What is simulated, aligned and held against the truth: one case at one SNR from one seed, on one thread."""

import math
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np
from threadpoolctl import threadpool_limits

import mrefali
from mrefali.accuracy import match_classes
from mrefali.average import normalize_particles
from mrefali.demonstration import poor_references
from mrefali.geometry import disc
from mrefali.io import open_stack, write_stack
from mrefali.parallel import SERIAL
from mrefali.simulation import read_truth
from mrefali.warmup import compile_kernels

PARTICLES_A_VIEW, PIXEL_SIZE_A = 100, 2.0
UNEQUAL = [20, 10, 8, 6, 4, 3, 2, 1]


def judged(assign, truth, views):
    """Share of the particles in the right class, views that most of a class show, and classes.

    A particle of view -1 shows none and does not count. With as many classes as views or fewer, one class is right for
    each view, and the particles of views without one are wrong.
    """
    shows = truth >= 0
    n_classes = int(assign.max()) + 1
    counts = np.zeros((n_classes, views), int)
    np.add.at(counts, (assign[shows], truth[shows]), 1)
    view_of_class, _ = match_classes(assign[shows], truth[shows], max(n_classes, views), views)
    right = (view_of_class[assign[shows]] == truth[shows]).mean()
    return right, len(set(counts.argmax(axis=1)[counts.any(axis=1)])), n_classes


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
        return {"ou": self.box // 2 - 5, "xrng": 3, "yrng": 3, "CTF": "CTF" in self.simulate, "quiet": True,
                "threads": 1}


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


def use_one_thread():
    """What a process does first that shares the cores with others of its kind."""
    numba.set_num_threads(1)
    threadpool_limits(1)
    compile_kernels(SERIAL)  # so that no run is timed with it


def evaluate_case(case, snr, seed):
    """Simulate, and from each start align and evaluate.

    Returns
    -------
    dict of dict
        For each of ``STARTS`` what ``mrefali evaluate --json`` prints, and the time of the run, in s of a core.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        mrefali.simulate(str(folder / "p.hdf"), case.views * PARTICLES_A_VIEW, case.views, case.box, snr,
                         pixel_size=PIXEL_SIZE_A, seed=seed, **case.simulate)
        return {start: _evaluate_start(case, start, folder) for start in STARTS}


def _evaluate_start(case, start, folder):
    truth, stack, refs, out = (str(folder / name) for name in ("p_truth.csv", f"{start}.hdf", f"{start}_r.hdf", start))
    shutil.copy(folder / "p.hdf", stack)  # a run writes its poses into its stack
    write_stack(refs, _references(case, start, folder), pixel_size_A=PIXEL_SIZE_A)
    began = time.process_time()
    mrefali.mref_ali2d(stack, refs, out, **case.run, **STARTS[start])
    seconds = time.process_time() - began
    found = mrefali.evaluate(stack, truth, CTF=case.run["CTF"]).as_dict()
    resolutions = [c["resolution_px"] for c in found["classes"] if c["resolution_px"] is not None]
    return found | {"seconds": seconds, "resolution_px": float(np.median(resolutions)) if resolutions else math.nan}


def _references(case, start, folder):
    particles, views = open_stack(str(folder / "p.hdf")), open_stack(str(folder / "p_views.hdf"))
    if start == "poor":
        return poor_references(particles.read(0, particles.n_images), *read_truth(folder / "p_truth.csv"))
    references = views.read(0, views.n_images)
    normalize_particles(references, disc(case.box, case.run["ou"]))  # of one contrast, or the strongest draws all
    return references
