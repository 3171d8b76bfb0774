"""Classes beside RELION's: the same simulated particles and number of classes, each program on one core.

``python benchmarks/relion.py FOLDER [PROGRAM ...]`` runs the programs named, or all, in FOLDER, which must not exist,
and prints for both sets of particles how many are in the right class and how many views have a class. RELION is
Debian's (``apt-get install --no-install-recommends relion``), with the options that its job Class2D has by default, 12
degrees being the step before oversampling. It tries no mirror images, so there are two classes a view, and a class of
mirrored particles counts as right.

This file imports nothing large before its children are done: a child process begins with its parent's peak of memory.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PARTICLES, VIEWS, BOX, SNR, PIXEL_SIZE_A = 1600, 8, 64, 0.1, 2.0
CLASSES, ITERATIONS, CORE = 2 * VIEWS, 25, 1
SETS = {"equal": [], "unequal": ["--sizes=20,10,8,6,4,3,2,1"]}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

MREFALI = str(Path(sys.executable).parent / "mrefali")
RELION = ["relion_refine", "--o", "relion/run", "--i", "p.star", "--iter", str(ITERATIONS), "--K", str(CLASSES),
          "--tau2_fudge", "2", "--particle_diameter", f"{0.85 * BOX * PIXEL_SIZE_A:.0f}", "--zero_mask",
          "--flatten_solvent", "--oversampling", "1", "--psi_step", "12", "--offset_range", "5", "--offset_step", "2",
          "--norm", "--scale", "--dont_combine_weights_via_disc", "--pool", "30", "--random_seed", "0", "--j", "1"]
#: What each program is called with, in a folder of its own that has the particles as p.hdf and p.star.
PROGRAMS = {
    "relion": RELION,
    "mref_ali2d": [MREFALI, "mref_ali2d", "p.hdf", "r.hdf", "out", "--ou=27", "--xr=3", "--yr=3", "--maxit=5"],
    "classify": [MREFALI, "classify", "p.hdf", "out", f"--K={CLASSES}"],
}

#: Write averages of random particles as they are, which know nothing of any view.
RANDOM_AVERAGES = """
import sys
import numpy as np
from mrefali.io import open_stack, write_stack
n_references, n_averaged = map(int, sys.argv[1:])
stack, rng = open_stack("p.hdf"), np.random.default_rng(0)
images = stack.read(0, stack.n_images)
chosen = [rng.choice(len(images), n_averaged, replace=False) for _ in range(n_references)]
write_stack("r.hdf", np.stack([images[some].mean(axis=0) for some in chosen]), pixel_size_A=stack.pixel_size_A)
"""
AVERAGED = 100


def simulate(folder, options):
    """Write p.hdf, its truth and, for RELION, p.star into a new folder."""
    folder.mkdir(parents=True)
    for command in (["simulate", "p.hdf", f"--n={PARTICLES}", f"--views={VIEWS}", f"--box={BOX}", f"--snr={SNR}",
                     f"--pixel_size={PIXEL_SIZE_A}", *options], ["convert", "p.hdf", "p.star", "--normalize"]):
        subprocess.run([MREFALI, *command], cwd=folder, check=True)
    import gemmi
    # RELION reads no file without a microscope, whatever it is for: nothing asks for it without --ctf
    star = gemmi.cif.read(str(folder / "p.star"))
    optics = star.find_block("optics").find_loop("_rlnOpticsGroup").get_loop()
    for name, value in (("_rlnVoltage", "300"), ("_rlnSphericalAberration", "2.7"), ("_rlnAmplitudeContrast", "0.1")):
        optics.add_columns([name], value)
    star.write_file(str(folder / "p.star"))


def timed(command, folder):
    """Run a command to its end on one core: CPU time and wall time in s, peak of resident memory in MB."""
    began = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["taskset", "-c", str(CORE), *command], cwd=folder, env=os.environ | ONE_THREAD,
                                   stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: see {folder}/log")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss / 1024


def run(program, particles, folder):
    """Run a program over a copy of the particles, whose headers it may change; what :func:`timed` says."""
    shutil.copytree(particles, folder)
    if program == "relion":
        (folder / "relion").mkdir()
    elif program == "mref_ali2d":
        subprocess.run([sys.executable, "-c", RANDOM_AVERAGES, str(CLASSES), str(AVERAGED)], cwd=folder, check=True)
    return timed(PROGRAMS[program], folder)


def classes_of_relion(folder):
    """The class of each particle, from 0, in the order of the stack."""
    import gemmi
    star = gemmi.cif.read(str(folder / f"relion/run_it{ITERATIONS:03d}_data.star"))
    rows = star.find_block("particles").find(["_rlnImageName", "_rlnClassNumber"])
    return [int(k) - 1 for _, k in sorted((int(re.match(r"\d+", name)[0]), k) for name, k in rows)]


def score(program, folder):
    """Share of the particles in the right class, by the majority in each, how many views have a class, and classes."""
    import numpy as np

    from mrefali.accuracy import match_classes
    from mrefali.io import open_stack
    from mrefali.simulation import read_truth
    classes, _ = read_truth(folder / "p_truth.csv")
    assign = classes_of_relion(folder) if program == "relion" else open_stack(str(folder / "p.hdf")).column("assign")
    assign = np.array(assign)
    views, _ = match_classes(assign, classes, max(CLASSES, assign.max() + 1), VIEWS)
    return (views[assign] == classes).mean(), len(np.unique(views[views >= 0])), len(np.unique(assign))


def main():
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(PROGRAMS):
        raise SystemExit(f"give a folder to make, then programs of {', '.join(PROGRAMS)}; without one, all")
    base, spent = Path(sys.argv[1]), {}
    for name, options in SETS.items():
        simulate(base / name / "particles", options)
        for program in sys.argv[2:] or PROGRAMS:
            spent[name, program] = run(program, base / name / "particles", base / name / program)
    print(f"{PARTICLES} particles of {VIEWS} views, {BOX} px, SNR {SNR:g}, {CLASSES} classes, one core\n"
          "| particles | program | right class, % | views with a class | classes | CPU, s | wall, s | MB |\n"
          + "|---" * 8 + "|")
    for (name, program), (cpu, wall, megabytes) in spent.items():
        share, found, made = score(program, base / name / program)
        print(f"| {name} | {program} | {100 * share:.1f} | {found} of {VIEWS} | {made} | {cpu:.0f} | {wall:.0f} | "
              f"{megabytes:.0f} |")


if __name__ == "__main__":
    main()
