"""A model of one iteration, fitted to 1, 2 and 4 MPI ranks here and carried to clusters: see ``docs/scaling.md``.

Started without arguments it launches itself under ``mpiexec``. What is said of the network is assumed (``NETWORK``),
all else measured in the same run. Ranks beyond the cores share them, which the model knows.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numba
import numpy as np
from measure import write_files
from threadpoolctl import threadpool_limits

from mrefali import io, parallel, refine
from mrefali.average import LARGEST_GAIN, _unit
from mrefali.checks import Options, prepare
from mrefali.geometry import POSE, identity_poses, make_poses
from mrefali.outdir import OutputDirectory

MPIEXEC = Path(sys.executable).parent / "mpiexec"
BOX, OUTER_RADIUS, HALF_RANGE, N_REFERENCES, N_PARTICLES = 64, 27, 3, 10, 8000
RANKS, REPEATS = (1, 2, 4), 5
CORES = len(os.sched_getaffinity(0))

#: Bytes of a particle that the root gathers in an iteration: class, pose and peak, whether changed, centred pose.
GATHERED_BYTES = 4 + POSE.itemsize + 8 + 1 + POSE.itemsize
#: Bytes of a pixel of a class that are summed over all ranks: two halves, int64.
SUMMED_BYTES = 2 * 8
#: What a cluster's network is taken to do: bytes/s of a link, and seconds of one message.
NETWORK = {"bandwidth": 10e9, "latency": 2e-6}


# ---- measured, as one of the ranks


def timed(seconds, name, function):
    """``function``, whose seconds are added up under ``name``."""
    def run(*arguments, **options):
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - began
    return run


def time_one_rank(stack, references):
    """Two iterations of this rank's share; the root prints the seconds of the parts of the second, by name."""
    comm, seconds = parallel.mpi(), defaultdict(float)
    numba.set_num_threads(1)
    with comm.ending_together(), threadpool_limits(1):
        plan = prepare(io.open_stack(stack), io.open_stack(references), Options(
            mask=None, ir=1, ou=OUTER_RADIUS, rs=1, xr=HALF_RANGE, yr=HALF_RANGE, ts=1, center=1, maxit=2,
            function="ref_ali2d", rand_seed=1000, vanished="keep", center_limit=None, quiet=True), comm)
        refine._search_and_sum = timed(seconds, "search", refine._search_and_sum)
        refine.update_classes = timed(seconds, "update", refine.update_classes)
        run = refine.refine(plan.particles, plan.references, plan.poses, plan.settings, comm)
        next(run)
        seconds.clear()
        iteration = next(run)
        seconds["iteration"] = iteration.seconds
        numbers = np.zeros(4 << 20, np.int64)  # 34 MB
        for name, work in (("reduce", lambda: comm.sum_into(numbers)),
                           ("gather", lambda: comm.gather(identity_poses(1 << 20)[slice(*comm.share(1 << 20))]))):
            work()
            comm.all_values(None)
            timed(seconds, name, work)()
    if comm.is_root:
        seconds["reduce"] /= numbers.nbytes
        seconds["gather"] /= POSE.itemsize << 20
        print(json.dumps(seconds))


def seconds_of(ranks, files):
    """What :func:`time_one_rank` prints on so many ranks; of the runs the one with the fastest iteration."""
    runs = [json.loads(subprocess.run([MPIEXEC, "-n", str(ranks), sys.executable, __file__, *files], check=True,
                                      stdout=subprocess.PIPE, text=True).stdout) for _ in range(REPEATS)]
    return min(runs, key=lambda seconds: seconds["iteration"])


def beside_the_search(folder, stack):
    """Seconds a particle of what is not shared among ranks: opening a stack, a table of poses, headers written back."""
    seconds, stack = defaultdict(float), io.open_stack(stack)
    opened = timed(seconds, "opening", lambda: (io.open_stack(stack.path), stack.poses(), list(stack.values("assign"))))
    opened()
    rng = np.random.default_rng(0)
    poses = make_poses(*rng.uniform(0, 5, (3, stack.n_images)), rng.integers(0, 2, stack.n_images))
    assign = rng.integers(0, N_REFERENCES, stack.n_images)
    with OutputDirectory(os.path.join(folder, "out"), None) as output:
        timed(seconds, "table", lambda: output.write_start(assign, poses))()
    timed(seconds, "headers", lambda: stack.write_columns({"xform.align2d": poses, "assign": assign}))()
    began = time.perf_counter()
    for first in range(0, stack.n_images, 1000):
        stack.read(first, min(first + 1000, stack.n_images))
    seconds["reading"] = time.perf_counter() - began
    return {name: value / stack.n_images for name, value in seconds.items()}


# ---- the model


def model(ranks, cores, n_particles, n_references, box, search, update, reduce, gather):
    """Seconds of the parts of one iteration.

    Parameters
    ----------
    ranks, cores : int
        Of one thread each; ranks beyond the cores share them.
    n_particles, n_references, box : int
    search : float
        Seconds of a particle, on one core.
    update : float
        Seconds of a class, on one core; each is one rank's.
    reduce, gather : float
        Seconds of a byte that is summed over all ranks, or gathered at the root; 0 for one rank.
    """
    return {"search": n_particles / min(ranks, cores) * search,
            "update": n_references / min(ranks, cores, n_references) * update,
            "reduce": n_references * box**2 * SUMMED_BYTES * reduce, "gather": n_particles * GATHERED_BYTES * gather}


def on_network(ranks):
    """Seconds of a byte summed and of a byte gathered, among so many ranks of a cluster.

    A sum sends every byte twice, and each of its pieces of 2 MB takes two messages for each doubling of the ranks.
    """
    messages = 2 * math.log2(ranks) * NETWORK["latency"] / (8 * parallel.REDUCED_AT_ONCE)
    return 2 / NETWORK["bandwidth"] + messages, 1 / NETWORK["bandwidth"]


def print_fit(measured):
    """Measured iterations beside modelled ones, whose seconds of a particle and a class are those of one rank."""
    search, update = measured[1]["search"] / N_PARTICLES, measured[1]["update"] / N_REFERENCES
    print(f"{N_PARTICLES} particles of {BOX} px, {N_REFERENCES} references, one thread a rank, {CORES} cores:\n"
          f"search {1e3 * search:.3f} ms a particle, update {1e3 * update:.2f} ms a class\n"
          "ranks   iteration, s   model, s   search   update   reduce ns/byte   gather ns/byte")
    for ranks, seconds in measured.items():
        links = (0, 0) if ranks == 1 else (seconds["reduce"], seconds["gather"])
        parts = model(ranks, CORES, N_PARTICLES, N_REFERENCES, BOX, search, update, *links)
        print(f"{ranks:5d} {seconds['iteration']:14.3f} {sum(parts.values()):10.3f} {parts['search']:8.3f} "
              f"{parts['update']:8.3f} {1e9 * links[0]:16.2f} {1e9 * links[1]:16.2f}")
    return search, update


def print_clusters(search, update, beside):
    print("\ncarried to clusters, ten million particles of the same box; seconds of an iteration; times of search and "
          "update grow with the references\nranks   references   search   update   reduce   gather   table of poses")
    for n_references in (10, 100):
        for ranks in (32, 1024):
            parts = model(ranks, ranks, 10**7, n_references, BOX, search * n_references / N_REFERENCES, update,
                          *on_network(ranks))
            print(f"{ranks:5d} {n_references:12d}", *(f"{parts[name]:8.2f}" for name in parts),
                  f"{10**7 * beside['table']:14.0f}")
    print("\nof ten million particles, once a run and not shared among ranks, s: "
          + ", ".join(f"{name} {10**7 * value:.0f}" for name, value in beside.items() if name != "table"))
    for n_particles in (10**7, 10**9):
        unit = _unit(n_particles * LARGEST_GAIN * 10)
        print(f"sums of {n_particles:.0e} particles, largest pixel 10 deviations: unit {unit:.1e}, 1 / "
              f"{np.finfo(np.float32).eps / unit:.0f} of float32's at 1")


def main():
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(folder, BOX, HALF_RANGE, N_REFERENCES, N_PARTICLES)
        measured = {ranks: seconds_of(ranks, files) for ranks in RANKS}
        beside = beside_the_search(folder, files[0])
    print_clusters(*print_fit(measured), beside)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        time_one_rank(*sys.argv[1:])
    else:
        main()
