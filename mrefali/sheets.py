"""The images of a file, or the classes of a run, in one picture (the command ``montage``). Imports results and io."""

import logging
import os

import numpy as np

from mrefali.classes import SMALLEST_CLASS
from mrefali.errors import InputError
from mrefali.io import check_new_file, open_stack, replacing
from mrefali.results import open_run, require_pictures

logger = logging.getLogger(__name__)


def montage(file, out, *, order="size", columns=0, most=400):
    """Write a PNG with the images of a file, or the class averages of a run, each with what is known of it below.

    Parameters
    ----------
    file : str
        A stack, a file of class averages (with ``ave_n``), or the OUTDIR of a run, whose last averages then have their
        resolution too.
    out : str
        ``.png`` to write; must not exist.
    order : str
        ``size``, the largest class first, where the classes have sizes; or ``number``.
    columns : int
        0: such that the picture is somewhat wider than high.
    most : int
        Images shown at most; of a longer file the first in the order.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
    """
    require_pictures("montage")
    from mrefali import plots

    _check(out, order, columns, most, plots.ORDERS)
    if os.path.isdir(file):
        run = open_run(file)
        figure = plots.run_montage(run, order, columns or None, most)
        n_images = run.n_references
    else:
        stack = open_stack(file)
        images, captions = _tiles(stack, order, most)
        figure = plots.montage(images, captions, columns or None)
        n_images = stack.n_images
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=144, metadata={"Software": None})
    rest = f" of {n_images}" if n_images > most else ""
    logger.info("%s: %d%s images", out, min(n_images, most), rest)


def _check(out, order, columns, most, orders):
    check_new_file(out, ".png")
    if order not in orders:
        raise InputError(f"order={order} is not known: give {' or '.join(orders)}")
    if columns < 0:
        raise InputError(f"columns={columns} is not allowed: give a number of columns, or 0")
    if most < 1:
        raise InputError(f"most={most} is not allowed: give at least 1")


def _tiles(stack, order, most):
    """Images and captions of a stack; where it has ``ave_n``, no image of a class that vanished."""
    counts = stack.column("ave_n")
    if any(count is None for count in counts):
        return stack.read(0, min(most, stack.n_images)), [str(k) for k in range(min(most, stack.n_images))]
    counts = np.array(counts, np.int64)
    numbers = (np.argsort(-counts, kind="stable") if order == "size" else np.arange(len(counts)))[:most]
    images = [None if counts[k] < SMALLEST_CLASS else image
              for k, image in zip(numbers, stack.read_at(numbers), strict=True)]
    return images, [f"{k}: {counts[k]}" for k in numbers]
