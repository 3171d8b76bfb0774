"""Pixels mapped into memory from where they lie in a file. Imports errors of ours only."""

import numpy as np

from mrefali.errors import InputError


def map_file(path, dtype, offset, shape):
    """The part of a file that begins at byte ``offset``, as a read-only array.

    Raises
    ------
    InputError
        If the file has become too short.
    """
    try:
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read any more ({error}): it was changed after it was opened; start "
                         f"again") from None


def read_rows(images, indices):
    """Images of a mapped array, ``(len(indices), n, n) float32`` in the order given, read in that of the file."""
    pixels = np.empty((len(indices), *images.shape[1:]), np.float32)
    for row in np.argsort(indices, kind="stable"):
        pixels[row] = images[indices[row]]
    return pixels
