"""Where the time of one iteration goes, the stack on disk: reading, normalising, search, averaging, update.

Measured by cProfile around ``mref_ali2d`` on one thread, the compiled search warm. The same for any run, by function:
``python -m cProfile -s cumtime -m mrefali mref_ali2d STACK REFS OUTDIR ...``
"""

import cProfile
import pstats
import tempfile
from pathlib import Path

from measure import write_files

from mrefali import mref_ali2d

#: (box, ou, xr = yr, references, particles)
SHAPES = [(64, 27, 3, 3, 4000), (64, 27, 3, 10, 4000), (128, 55, 3, 50, 1000)]

#: What an iteration does: the function whose time that is, and who calls it then.
STAGES = {
    "reading": ("stream", "_normalized"),  # as far as it is waited for
    "normalising": ("normalize_particles", "_normalized"),
    "search": ("align", "__call__"),
    "averaging": ("add", "_search_and_sum"),
    "update": ("update_classes", "refine"),
    "whole": ("refine", "go_on"),
}
#: What a run does beside its iterations.
BESIDE = {
    "checks before": ("prepare", "_run_on_files"),
    "output": ("write_iteration", "go_on"),
    "headers": ("write_columns", "_write_headers"),
}


def profile(folder, box, outer_radius, half_range, n_references, n_particles):
    """Seconds of each part of a run of one iteration, by name."""
    files = write_files(folder, box, half_range, n_references, n_particles)
    options = {"ou": outer_radius, "xrng": half_range, "yrng": half_range, "maxit": 1, "threads": 1, "quiet": True}
    mref_ali2d(*files, str(Path(folder, "warm")), **options)
    profiler = cProfile.Profile()
    profiler.runcall(mref_ali2d, *files, str(Path(folder, "out")), **options)
    seconds = {(name, caller): times[3]
               for (_, _, name), (*_, callers) in pstats.Stats(profiler).stats.items()
               for (_, _, caller), times in callers.items()}
    return {part: seconds[pair] for part, pair in (STAGES | BESIDE).items()}


def main():
    print("shares of the time of one iteration on one thread, stack on disk, and beside it, in s")
    for shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            seconds = profile(folder, *shape)
        whole = seconds["whole"]
        shares = {part: seconds[part] / whole for part in STAGES if part != "whole"}
        shares["all else"] = 1 - sum(shares.values())
        print("{} px, ou={}, xr=yr={}, {} references, {} particles:".format(*shape), f"{whole:.2f} s = "
              + ", ".join(f"{part} {100 * share:.1f} %" for part, share in shares.items())
              + "; " + ", ".join(f"{part} {seconds[part]:.2f}" for part in BESIDE))


if __name__ == "__main__":
    main()
