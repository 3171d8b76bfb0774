"""What a second MPI rank gains: two ranks against one, one thread each, 128 px and 50 references.

Started without arguments it launches itself under ``mpiexec``, with one rank and with two in turn.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
from measure import write_files
from threadpoolctl import threadpool_limits

from mrefali import io, parallel
from mrefali.average import normalize_references
from mrefali.checks import Options, prepare
from mrefali.refine import refine
from mrefali.search import align, ring_spectra
from mrefali.warmup import compile_kernels

MPIEXEC = Path(sys.executable).parent / "mpiexec"
BOX, OUTER_RADIUS, HALF_RANGE, N_REFERENCES, N_PARTICLES = 128, 55, 3, 50, 4000
REPEATS = 3


def time_one_rank(stack, references):
    """As one of the ranks: search the own share, then do a whole iteration; the root prints the seconds of both."""
    comm = parallel.mpi()
    numba.set_num_threads(1)
    with comm.ending_together(), threadpool_limits(1):
        plan = prepare(io.open_stack(stack), io.open_stack(references), Options(
            mask=None, ir=1, ou=OUTER_RADIUS, rs=1, xr=HALF_RANGE, yr=HALF_RANGE, ts=1, center=1, maxit=1,
            function="ref_ali2d", rand_seed=1000, vanished="random", center_limit=None, quiet=True), comm)
        settings, mine = plan.settings, slice(*comm.share(N_PARTICLES))
        spectra = ring_spectra(normalize_references(plan.references, settings.inside), settings.search)
        images = plan.particles.read(mine)
        compile_kernels(comm)
        comm.all_values(None)  # a barrier that does not look round only every 10 ms
        began = time.perf_counter()
        align(images, plan.poses[mine], spectra, settings.search)
        comm.all_values(None)
        searched = time.perf_counter() - began
        iteration, = refine(plan.particles, plan.references, plan.poses, settings, comm)
    if comm.is_root:
        print(searched, iteration.seconds)


def seconds_of(ranks, files):
    """Seconds of the search and of the iteration on so many ranks."""
    done = subprocess.run([MPIEXEC, "-n", str(ranks), sys.executable, __file__, *files], check=True,
                          stdout=subprocess.PIPE, text=True)
    return [float(word) for word in done.stdout.split()]


def main():
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(folder, BOX, HALF_RANGE, N_REFERENCES, N_PARTICLES)
        one, two = np.median([[seconds_of(ranks, files) for ranks in (1, 2)] for _ in range(REPEATS)], axis=0)
    print(f"two MPI ranks of one thread against one, {N_PARTICLES} particles of {BOX} px, {N_REFERENCES} references, "
          f"medians of {REPEATS}: " + "; ".join(
              f"{name} {a:.2f} s and {b:.2f} s, {a / b:.2f}x" for name, a, b in zip(
                  ("search", "whole iteration"), one, two, strict=True)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        time_one_rank(*sys.argv[1:])
    else:
        main()
