"""The same numbers to the bit with vectors of any length, and in the process that compiles as in those after it."""

import os
import platform
import subprocess
import sys

import pytest

#: Prints what a search, continuous refinement and Fourier interpolation make of particles together, and of each alone.
FIND = """
import numpy as np
from mrefali import fourier, geometry
from mrefali.search import Search, align, ring_spectra
from mrefali.sharpening import sharpen, splines

rng = np.random.default_rng(1)
images, references = (rng.standard_normal((n, 20, 20), np.float32) for n in (40, 5))
search = Search(20, 1, 6, 1, 2, 2, 1.0)

def numbers(some):
    found = align(some, geometry.identity_poses(len(some)), ring_spectra(references, search), search)
    sharp = sharpen(some, found, splines(references), search)
    moved = fourier.transform(some, sharp.poses)
    return [a.tobytes().hex() for one in zip(found.peak, found.poses, sharp.peak, sharp.poses, moved) for a in one]

together = numbers(images)
assert together == [number for image in images for number in numbers(image[None])]
print(*together, sep="\\n")
"""


@pytest.mark.slow  # a processor takes one or two minutes
@pytest.mark.jit_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the processors are of this kind")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "host"])
def test_numbers_depend_on_neither_neighbours_nor_who_compiled(tmp_path, processor):
    """Of 4, 8 and as many numbers to a vector as there are here."""
    kind = {} if processor == "host" else {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    first, second = (subprocess.run(
        [sys.executable, "-c", FIND], env=os.environ | kind | {"NUMBA_CACHE_DIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=900) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.split()) == 200
    assert second.stdout == first.stdout
