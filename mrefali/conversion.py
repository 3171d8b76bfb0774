"""Stacks carried into other files and formats: the commands ``convert``, ``select`` and ``recenter``.

May import io, geometry, fourier, results and errors; knows nothing of the search.
"""

import logging
import os
from dataclasses import dataclass

import numpy as np

from mrefali import fourier, geometry
from mrefali.errors import InputError
from mrefali.io import Content, check_new_file, is_bdb, open_stack
from mrefali.io.bdb import new_database
from mrefali.io.content import HELD, format_of, pixel_file, text_of_ctf, write
from mrefali.io.star import cautions, recentered, write_table
from mrefali.results import open_run

logger = logging.getLogger(__name__)

#: The smallest box that is worth a file, in px.
SMALLEST_BOX = 8

#: Headers of an HDF stack that another format has in its own way, or that describe the pixels and are made anew.
STANDARD_HEADERS = {
    "xform.align2d", "assign", "ctf", "ctf_applied", "apix_x", "apix_y", "apix_z", "nx", "ny", "nz", "datatype",
    "is_complex", "is_complex_x", "is_complex_ri", "all_int", "minimum", "maximum", "mean", "sigma", "square_sum",
    "mean_nonzero", "sigma_nonzero", "changecount"}


@dataclass(frozen=True)
class PixelChange:
    """What is done to the pixels on their way, in this order.

    Attributes
    ----------
    bin : int
        See :func:`mrefali.fourier.shrink`.
    invert : bool
        Change the sign.
    normalize : bool
        Mean 0 and standard deviation 1 of the background, which is all outside a disc of 3/8 of the box.
    """

    bin: int = 1
    invert: bool = False
    normalize: bool = False

    def __call__(self, images):
        if self.bin > 1:
            images = fourier.shrink(images, self.bin)
        if self.invert:
            images = -images
        if self.normalize:
            images = _normalized(images)
        return images


def _normalized(images):
    box = images.shape[-1]
    background = images[:, ~geometry.disc(box, 3 * box / 8)].astype(np.float64)
    deviation = background.std(axis=1)
    flat = np.flatnonzero(deviation == 0)
    if flat.size:
        raise InputError(f"normalize: the background of an image is constant ({background[flat[0], 0]:g}), so no "
                         f"deviation can be made 1: leave --normalize out")
    return ((images - background.mean(axis=1)[:, None, None]) / deviation[:, None, None]).astype(np.float32)


def convert(source, out, *, bin=1, invert=False, normalize=False):
    """Write a stack anew in another format: pixels, poses, classes, CTFs, pixel size, as far as the format has places.

    Parameters
    ----------
    source : str
        Any stack; only read.
    out : str
        Its name chooses the format, see :data:`mrefali.io.content.FORMATS`; must not exist.
    bin : int
        Make pixels so many times as large, see :func:`mrefali.fourier.shrink`.
    invert : bool
        Change the sign of the pixels.
    normalize : bool
        Bring the background of each image to mean 0 and standard deviation 1.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
    """
    _check_out(out, source)
    stack = open_stack(source)
    if isinstance(bin, bool) or not isinstance(bin, int) or not 1 <= bin <= stack.box // SMALLEST_BOX:
        raise InputError(f"bin={bin} is not allowed: give 1 to {max(1, stack.box // SMALLEST_BOX)} for a box of "
                         f"{stack.box} px")
    if stack.box % bin:
        logger.info("%s: images are cut from %d to %d px about their centre, a multiple of %d", out, stack.box,
                    stack.box // bin * bin, bin)
    inverted = getattr(stack, "is_inverted", False)
    change = PixelChange(bin, invert, normalize) if bin > 1 or invert or normalize or inverted else None
    if inverted:
        logger.info("%s: images whose blob/sign is -1 are inverted", out)
    poses, ctf, applied = _read_poses(stack), *stack.known_ctf()
    if bin > 1:
        poses = geometry.make_poses(poses["alpha"], poses["sx"] / bin, poses["sy"] / bin, poses["mirror"])
        if ctf is not None:
            ctf = ctf.copy()
            ctf["pixel_size_A"] *= bin
    size = None if stack.pixel_size_A is None else bin * stack.pixel_size_A
    _write(out, Content(stack, np.arange(stack.n_images), poses, _read_classes(stack), ctf, applied, stack.box // bin,
                        size, change))


def _check_out(out, source):
    """Raise unless OUT can be a new file."""
    kind = format_of(out)
    if kind == "bdb":
        new_database(out)
        return
    for path in (out, pixel_file(out)) if kind == "star" else (out,):
        if not is_bdb(source) and os.path.realpath(path) == os.path.realpath(source):
            raise FileExistsError(f"{path} is the stack itself, which stays as it is: give another name")
        check_new_file(path)


def _read_poses(stack):
    if stack.has_poses():
        return stack.poses()
    logger.info("%s has no poses: they are taken to be the identity", stack.path)
    return geometry.identity_poses(stack.n_images)


def _read_classes(stack):
    """(n_images,) int64, None unless every image has a class."""
    values = stack.column("assign")
    return np.array(values, np.int64) if all(isinstance(value, int) for value in values) else None


def _write(out, content):
    write(out, content)
    for line in _left_out(out, content):
        logger.info("%s: %s", out, line)
    known = content.pixel_size_A is not None and "pixel size" in HELD[format_of(out)]
    size = f"{content.pixel_size_A:g} A a pixel" if known else "pixel size unknown"
    logger.info("%s: %d images of %d x %d px, %s, from %s", out, content.n_images, content.box, content.box, size,
                content.stack.path)


def _left_out(out, content):
    """A line for each thing that the new file cannot hold, or holds in a way that some readers miss."""
    stack, kind = content.stack, format_of(out)
    held = HELD[kind]
    moved = bool(content.poses[["alpha", "sx", "sy"]].tolist() != [(0.0, 0.0, 0.0)] * content.n_images
                 or content.poses["mirror"].any())
    known = {"poses": moved, "classes": content.assign is not None, "ctf": content.ctf is not None,
             "pixel size": content.pixel_size_A is not None, "columns": hasattr(stack, "table")}
    lost = [what for what, there in known.items() if there and what not in held]
    if lost:
        yield f"its format has no place for {', '.join(lost)}: left out"
    if "headers" not in held and not stack.read_only:
        others = sorted(name for name in stack.header_names() if name not in STANDARD_HEADERS and not (
            kind == "star" and name.removeprefix("optics.").startswith("rln")))
        if others:
            yield f"left out are the headers {', '.join(others)}"
    if getattr(stack, "not_carried", None):
        yield f"left out are the fields {', '.join(stack.not_carried)}"
    if kind == "star":
        yield from cautions(content)
    if "headers" in held and content.ctf is not None:
        yield from _of_phase_shifts(content.ctf)


def _of_phase_shifts(ctf):
    shifted = ctf[ctf["phase_shift_deg"] != 0]
    if shifted.size:
        without = sum(text_of_ctf(parameters) is None for parameters in shifted)
        yield f"the phase shifts of {shifted.size} particles become part of the amplitude contrast"
        if without:
            yield f"{without} particles go without ctf: no amplitude contrast stands for their phase shift"


# --- some classes


def select(source, out, *, classes=None, min_size=None, min_frc=None):
    """Write the particles of some classes as a new stack; each condition given must hold.

    Parameters
    ----------
    source : str
        Output directory of a run, or a stack whose particles have classes; only read.
    out : str
        As for :func:`convert`.
    classes : sequence of int, optional
    min_size : int, optional
        Least number of particles in a class.
    min_frc : float, optional, 1/px
        Frequency up to which the Fourier ring correlation of a class stays above 0.5, in the last iteration. Only an
        output directory has it.

    Returns
    -------
    list of int
        The classes chosen.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
    """
    if classes is None and min_size is None and min_frc is None:
        raise InputError("nothing says which classes: give classes, min_size or min_frc")
    if os.path.isdir(source):
        stack, poses, assign, reach = _read_run(source)
    else:
        stack, reach = open_stack(source), None
        poses, assign = _read_poses(stack), _read_classes(stack)
        if assign is None:
            raise InputError(f"{source}: not every particle has a class (assign): align them first, or give the output "
                             f"directory of a run")
    _check_out(out, stack.path)
    sizes = np.bincount(np.maximum(assign, 0), minlength=0 if reach is None else len(reach))
    chosen = _choose(source, sizes, reach, classes, min_size, min_frc)
    rows = np.flatnonzero(np.isin(assign, chosen))
    if not rows.size:
        raise InputError(f"{source}: the classes chosen ({', '.join(map(str, chosen)) or 'none'}) have no particles; "
                         f"the largest of all has {sizes.max()}")
    ctf, applied = (None if values is None else values[rows] for values in stack.known_ctf())
    change = PixelChange() if getattr(stack, "is_inverted", False) else None
    _write(out, Content(stack, rows, poses[rows], assign[rows], ctf, applied, stack.box, stack.pixel_size_A, change))
    return chosen


def _choose(source, sizes, reach, classes, min_size, min_frc):
    keep = np.ones(len(sizes), bool)
    if classes is not None:
        unknown = [k for k in classes if not 0 <= k < len(sizes)]
        if unknown:
            raise InputError(f"classes={unknown[0]} is not one of {source}: give 0 to {len(sizes) - 1}")
        keep &= np.isin(np.arange(len(sizes)), classes)
    if min_size is not None:
        if min_size < 1:
            raise InputError(f"min_size={min_size} is not allowed: give a number of particles, 1 or more")
        keep &= sizes >= min_size
    if min_frc is not None:
        if reach is None:
            raise InputError(f"min_frc={min_frc:g}: {source} is a stack, and FRC curves are in the output directory of "
                             f"a run: give that")
        if not 0 < min_frc <= 0.5:
            raise InputError(f"min_frc={min_frc:g} is not allowed: give a frequency above 0 to 0.5, in 1/px")
        keep &= reach >= min_frc
    return np.flatnonzero(keep).tolist()


def _read_run(outdir):
    """Stack, poses and classes of a run; the 1/px up to which each class has an FRC above 0.5."""
    run = open_run(outdir)
    run.require_iteration()
    return (run.stack(), run.pose_records, run.pose_columns["assign"].astype(np.int64),
            np.nan_to_num(1 / run.resolution_05_px[-1]))


# --- new coordinates


def recenter(source, out):
    """Fold the shifts of particles into their coordinates in the micrographs, to extract them again.

    The coordinates change by whole pixels of the micrograph; what is left of a shift stays in the origins, and angles,
    classes and all other columns stay as they are.

    Parameters
    ----------
    source : str
        STAR with rlnCoordinateX, rlnCoordinateY and origins; the images themselves are not needed.
    out : str
        STAR to write; must not exist.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
    """
    if format_of(out) != "star":
        raise InputError(f"{out}: coordinates are written as a STAR: give a name that ends in .star")
    _check_out(out, source)
    table, moved = recentered(source)
    write_table(out, table)
    logger.info("%s: %d of %d particles of %s moved, by up to %d px of the micrographs", out, (moved.any(axis=1)).sum(),
                len(moved), source, np.abs(moved).max())
