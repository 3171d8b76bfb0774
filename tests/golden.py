"""The golden cases: small inputs and what the original wrote for them, packed by ``data/make.py``."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mrefali.io import open_stack, write_stack

DATA = Path(__file__).parent / "data"
CASES = ("typical", "continued", "odd_box_subpixel", "vanished", "center_mean", "soft_mask", "mask_rotation_only",
         "ctf")

#: An option's name on the command line where it differs from that of the Python call.
WORDS = {"xrng": "xr", "yrng": "yr", "step": "ts"}


@dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes
    ----------
    images : (n_particles, n, n) float32
    references : (n_references, n, n) float32
    mask : (n, n) float32 or None
    headers : list of dict
        One a particle: ``xform.align2d``, and ``ctf`` and ``ctf_applied`` where the case has them.
    call : dict
        Arguments of ``mref_ali2d`` but ``maxit`` and the files.
    iterations : list of int
        Values of ``maxit`` that the original was run with.
    expected : dict of array
        What the original found: ``params_M``, ``drm_III_RRRR``, ``aqmIII``, ``criterion``, ``filter``.
    """

    images: np.ndarray
    references: np.ndarray
    mask: np.ndarray | None
    headers: list
    call: dict
    iterations: list
    expected: dict

    def write(self, folder):
        """Write the stack, the references and the mask; the first arguments of ``mref_ali2d``, OUTDIR included."""
        folder.mkdir(exist_ok=True)
        stack, references, outdir, mask = (str(folder / name) for name in ("stack.hdf", "refs.hdf", "out", "mask.hdf"))
        write_stack(stack, self.images, self.headers)
        write_stack(references, self.references)
        if self.mask is None:
            return stack, references, outdir
        write_stack(mask, self.mask[None])
        return stack, references, outdir, mask


@cache
def load(name):
    """The ``Case`` of that name."""
    arrays = _arrays(name)
    headers = {key: arrays.pop(key).tolist() for key in ("xform.align2d", "ctf", "ctf_applied") if key in arrays}
    call = json.loads(str(arrays.pop("call")))
    iterations, has_mask = call.pop("iterations"), call.pop("mask")
    return Case(
        images=arrays.pop("images"), references=arrays.pop("references"),
        mask=arrays.pop("mask")[0] if has_mask else None,
        headers=[dict(zip(headers, values, strict=True)) for values in zip(*headers.values(), strict=True)],
        call=call, iterations=iterations, expected=arrays)


@cache
def _stored(name):
    """The arrays in a case's files, as they stand there."""
    arrays = dict(np.load(DATA / f"{name}.npz"))
    if "images" not in arrays:
        pieces = sorted(DATA.glob(f"{name}_images_*.npz"))
        arrays["images"] = np.concatenate([np.load(piece)["images"] for piece in pieces])
    return arrays


def _arrays(name):
    """The arrays of a case; one that stands in another file is read there."""
    return {key: _find(str(value)) if value.dtype.kind == "U" and value.ndim == 0 and key != "call" else value
            for key, value in _stored(name).items()}


def _find(place):
    """The images in the place that make.py named: ``CASE/NAME`` or a file."""
    if place.endswith(".hdf"):
        stack = open_stack(DATA / place)
        return stack.read(0, stack.n_images)
    case, name = place.split("/")
    return _stored(case)[name]
