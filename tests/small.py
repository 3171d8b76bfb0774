"""A job small enough for any test: 24 particles of 20 x 20 px, two views, and files of them."""

import csv

import numpy as np
from scipy.ndimage import gaussian_filter

from mrefali.geometry import make_poses, to_matrices
from mrefali.io import write_stack

N_PARTICLES, BOX, PIXEL_SIZE_A = 24, 20, 2.5

#: The options of the job, in Python and as words of the command line.
OPTIONS = {"ou": 6, "xrng": 1, "yrng": 1, "center": -1}
WORDS = ["--ou=6", "--xr=1", "--yr=1", "--center=-1"]


def references():
    """The two views, an L and a bar with a spot, (2, BOX, BOX) float32."""
    views = np.zeros((2, BOX, BOX))
    views[0, 6:15, 7:9] = views[0, 6:8, 7:13] = 1
    views[1, 9:11, 5:15] = views[1, 13:15, 11:13] = 1
    return (5 * gaussian_filter(views, (0, 1, 1))).astype(np.float32)


def particles():
    """Views turned, shifted and every fifth mirrored, in noise, (N_PARTICLES, BOX, BOX) float32.

    Two of three are of view 0.
    """
    rng = np.random.default_rng(6)
    views = np.stack([references(), references()[:, :, ::-1]])
    clean = [np.roll(np.rot90(views[int(i % 5 == 0), i % 3 // 2], i % 4), rng.integers(-1, 2, 2), (0, 1))
             for i in range(N_PARTICLES)]
    return (clean + rng.standard_normal((N_PARTICLES, BOX, BOX))).astype(np.float32)


def poses():
    """Where the search starts, (N_PARTICLES,) POSE; as the files hold it after rounding to float32."""
    i = np.arange(N_PARTICLES)
    return make_poses(10.0 * i, 0.5 * (i % 3 - 1), 0.25 * (i % 2), i % 2)


def write(folder):
    """Write ``stack.hdf``, with headers that are none of ours too, and ``refs.hdf``; both paths as str."""
    stack, refs = str(folder / "stack.hdf"), str(folder / "refs.hdf")
    write_stack(stack, particles(), [
        {"xform.align2d": matrix, "ctf": f"E{1 + i / 10} 0 0 50 10 300 2 2.5 0 0 0", "ptcl_source_image": "m.hdf",
         "quality": i / 7} for i, matrix in enumerate(to_matrices(poses()))], PIXEL_SIZE_A)
    write_stack(refs, references(), None, PIXEL_SIZE_A)
    return stack, refs


def read_table(path):
    """A CSV file as a dict of columns: lists of float, or of None where the field is empty."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in rows[0]}


def snapshot(folder):
    """Bytes and time of change of every file under ``folder``, and the names of its folders."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
            for path in folder.rglob("*")}
