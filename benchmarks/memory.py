"""Peak memory of a run, at two numbers of particles: what the process that ran it says of itself when it is done.

This file imports nothing large: a child process begins with its parent's peak.
"""

import subprocess
import sys
import tempfile

BOX, N_REFERENCES = 64, 3
NUMBERS = (4_000, 12_000)  # a full block, and three

#: Write so many particles and references of noise.
WRITE = """
import sys
import numpy as np
from mrefali import write_stack
from mrefali.geometry import identity_poses, to_matrices
n, n_references, box = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
headers = [{"xform.align2d": matrix} for matrix in to_matrices(identity_poses(n))]
write_stack("particles.hdf", rng.standard_normal((n, box, box), np.float32), headers)
write_stack("references.hdf", rng.standard_normal((n_references, box, box), np.float32))
"""

#: One iteration as the command line runs it; prints the peak of resident memory in kB.
RUN = """
import resource, sys
from mrefali import cli
status = cli.main(["mref_ali2d", "particles.hdf", "references.hdf", "out", "--ou=27", "--xr=3", "--yr=3", "--maxit=1",
                   "--center=0"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def peak_megabytes(n_particles):
    """Peak of resident memory of one iteration over so many particles on disk, MB."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = map(str, (n_particles, N_REFERENCES, BOX))
        subprocess.run([sys.executable, "-c", WRITE, *sizes], cwd=folder, check=True)
        done = subprocess.run([sys.executable, "-c", RUN], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        return int(done.stdout.split()[-1]) / 1024


def main():
    few, many = NUMBERS
    peaks = {n: peak_megabytes(n) for n in NUMBERS}
    print(f"peak resident memory of one iteration, {BOX} px, {N_REFERENCES} references: " + "; ".join(
        f"{n} particles ({4 * n * BOX**2 / 2**20:.0f} MB of pixels) {peak:.0f} MB" for n, peak in peaks.items())
        + f"; {(peaks[many] - peaks[few]) * 2**20 / (many - few):.0f} bytes a particle more")


if __name__ == "__main__":
    main()
