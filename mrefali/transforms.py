"""The poses of a stack applied to its pixels, into a new stack (the command ``transform2d``).

May import io, geometry, average and fourier; knows nothing of the search.
"""

import logging
import os

import numpy as np

from mrefali.errors import InputError
from mrefali.fourier import INTERPOLATIONS
from mrefali.geometry import identity_poses, to_matrices
from mrefali.io import check_new_file, is_bdb, open_stack, write_images

logger = logging.getLogger(__name__)

#: Pixels held at a time.
BLOCK_BYTES = 32 << 20


def transform2d(stack, out, *, interpolation="quadratic"):
    """Write a new stack whose images are those of another, moved by their poses.

    The poses of the new stack are the identity, its statistics are those of the new pixels, and all other headers
    are carried over. One block of images is in memory at a time.

    Parameters
    ----------
    stack : str
        Images with ``xform.align2d`` in their headers; only read.
    out : str
        HDF stack to write, whole or not at all; must not exist.
    interpolation : str
        ``quadratic``: as in the averages, see :func:`mrefali.average.transform`. ``fourier``: for band-limited
        images, see :func:`mrefali.fourier.transform`.

    Raises
    ------
    InputError, FileNotFoundError, FileExistsError, PermissionError
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation={interpolation} is not known: give {' or '.join(INTERPOLATIONS)}")
    _check_out(out, stack)
    images = open_stack(stack)
    if images.read_only and not images.has_poses():
        logger.info("%s has no poses: they are taken to be the identity", stack)
    write_images(out, _moved(images, images.poses(), INTERPOLATIONS[interpolation]))
    logger.info("%s: %d images of %s moved by their poses, which are the identity now; interpolation %s", out,
                images.n_images, stack, interpolation)


def _check_out(out, stack):
    if is_bdb(out):
        raise InputError(f"{out} is a database, which cannot be made here: give the name of an HDF file")
    if os.path.realpath(out) == os.path.realpath(stack):
        raise FileExistsError(f"{out} is the stack itself, whose pixels stay as they are: give another name")
    check_new_file(out)


def _moved(images, poses, transform):
    """Pairs of image and header of the new stack, read and moved in blocks."""
    identity = {"xform.align2d": to_matrices(identity_poses(1))[0]}
    step = max(1, BLOCK_BYTES // (4 * images.box**2))
    for start in range(0, images.n_images, step):
        block = images.read(start, min(start + step, images.n_images))
        spoiled = np.flatnonzero(~np.isfinite(block).all(axis=(1, 2)))
        if spoiled.size:
            raise InputError(f"image {start + spoiled[0]} of {images.path} has a pixel that is NaN or infinite: "
                             f"leave the image out, or repair it")
        for i, image in enumerate(transform(block, poses[start:start + step]), start):
            yield image, images.header(i) | identity
