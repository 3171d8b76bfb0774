"""Pack the golden data into the files beside this one: ``python make.py GOLDEN_FOLDER``.

Of each case ``CASE.npz`` holds the call, the references, the mask, the headers and what the original wrote, and
``CASE_images_I.npz`` the particles, in pieces that keep a file below 1 MiB. Images that an earlier file holds are
named, not stored again. ``tests/golden.py`` reads them.
"""

import sys
from pathlib import Path

import numpy as np

from mrefali.io import open_stack

#: In this order, so that ``continued`` names what ``typical`` stores.
CASES = ("typical", "continued", "odd_box_subpixel", "vanished", "center_mean", "soft_mask", "mask_rotation_only",
         "ctf")
HERE = Path(__file__).parent

#: Averages that lie here as the original wrote them.
SAMPLE = "vanished_aqm000.hdf"

#: Particles in one file: below 1 MiB for the largest box.
PIECE = 60


def main(golden):
    stored = {read(HERE / SAMPLE).tobytes(): SAMPLE}
    for case in CASES:
        images, others = load(golden / case)
        if stored.setdefault(images.tobytes(), f"{case}/images") == f"{case}/images":
            for i, first in enumerate(range(0, len(images), PIECE)):
                np.savez_compressed(HERE / f"{case}_images_{i}.npz", images=images[first:first + PIECE])
        else:
            others["images"] = stored[images.tobytes()]
        for name, array in others.items():
            if name in ("references", "mask") or name.startswith("aqm"):
                place = stored.setdefault(array.tobytes(), f"{case}/{name}")
                others[name] = array if place == f"{case}/{name}" else place
        np.savez_compressed(HERE / f"{case}.npz", **others)


def load(folder):
    """The particles of a case, and by name all else that the tests need of it."""
    stack = open_stack(folder / "stack.hdf")
    others = {"call": (folder / "call.json").read_text(), "references": read(folder / "refs.hdf"),
              "xform.align2d": np.array(stack.column("xform.align2d"), np.float32),
              **np.load(folder / "expected.npz")}
    if (folder / "mask.hdf").exists():
        others["mask"] = read(folder / "mask.hdf")
    for name in sorted({"ctf", "ctf_applied"} & stack.header_names().keys()):
        others[name] = np.array(stack.column(name))
    return read(folder / "stack.hdf"), others


def read(path):
    """All images of a file, (n_images, n, n) float32."""
    stack = open_stack(path)
    return stack.read(0, stack.n_images)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
