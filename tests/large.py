"""Stacks of many particles, written quickly, and the peak memory of a run on them."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t
from scipy.ndimage import gaussian_filter

from mrefali.geometry import make_poses, to_matrices
from mrefali.io import write_stack
from mrefali.io.hdf import MATRIX

N_DIFFERENT = 500  # images; the stack repeats them


def views(box):
    """Three views, blurred noise in a disc, (3, box, box) float32."""
    d = np.arange(box) - box // 2
    noise = np.random.default_rng(3).standard_normal((3, box, box))
    blurred = gaussian_filter(noise, (0, box / 16, box / 16)) * (np.hypot(d[:, None], d) < box / 3)
    return (blurred / blurred.std()).astype(np.float32)


def write(folder, n_particles, box):
    """``stack.hdf`` with poses, classes and CTFs in its headers, and ``refs.hdf``; both paths as str."""
    rng = np.random.default_rng(4)
    pixels = views(box)[rng.integers(0, 3, N_DIFFERENT)] + rng.standard_normal((N_DIFFERENT, box, box), np.float32)
    stack, refs = str(folder / f"stack{n_particles}.hdf"), str(folder / f"refs{n_particles}.hdf")
    matrix = to_matrices(make_poses([0.0], 0.0, 0.0)).astype("f4").reshape(1, 12).view(MATRIX)[0]
    text = np.array(b"E1.5 0 0 50 10 300 2 2.5 0 0 0\0", "S31")
    values = {b"EMAN.xform.align2d": matrix, b"EMAN.assign": np.array([0], "i4"), b"EMAN.ctf": text,
              b"EMAN.ctf_applied": np.array([0], "i4")}
    types = {key: h5t.py_create(value.dtype) for key, value in values.items()}
    types[b"EMAN.ctf"] = h5t.C_S1.copy()
    types[b"EMAN.ctf"].set_size(31)
    one, scalar, shape = h5s.create_simple((1,)), h5s.create(h5s.SCALAR), h5s.create_simple((box, box))
    with h5py.File(stack, "w", libver="earliest") as file:
        images = file.create_group("MDF/images")
        images.attrs["imageid_max"] = np.array([n_particles - 1], "i4")
        for i in range(n_particles):
            group = h5g.create(images.id, b"%d" % i)
            h5d.create(group, b"image", h5t.IEEE_F32LE, shape, h5p.create(h5p.DATASET_CREATE)).write(
                h5s.ALL, h5s.ALL, pixels[i % N_DIFFERENT])
            for key, value in values.items():
                h5a.create(group, key, types[key], one if value.shape else scalar).write(value, mtype=types[key])
    write_stack(refs, views(box))
    return stack, refs


#: The main job at the command line, with as many bytes of pixels at a time; then what it took at most. (What the system
#: says of resources used begins with the peak of the parent.)
MEASURED = """
import json, re, sys, time
from mrefali import cli, memory
memory.BLOCK_BYTES = int(sys.argv[1])
began = time.perf_counter()
status = cli.main(["mref_ali2d", *sys.argv[2:]])
seconds = time.perf_counter() - began
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({"status": status, "seconds": seconds, "peak_bytes": peak}))
"""


#: Has the C library give back every large array when it is freed. Else it keeps up to 4 MB, more or less by chance.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def run_measured(*words, block_bytes):
    """What was said and what ``MEASURED`` tells of ``mrefali mref_ali2d ...`` in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURED, str(block_bytes), *words], capture_output=True, text=True,
                          check=True, env=os.environ | GIVE_BACK)
    *said, measured = done.stdout.splitlines()
    return said, json.loads(measured)
