"""Stacks in numpy's .npy files, mapped into memory; written too. Imports errors and io of ours."""

import os
import tokenize

import numpy as np

from mrefali.errors import InputError
from mrefali.io.mapped import read_rows
from mrefali.io.stack import ReadOnlyStack
from mrefali.io.whole import replacing_durably

MAGIC = b"\x93NUMPY"


def map_array(path):
    """The array of a .npy file, mapped; InputError unless it is all there and plain numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        raise InputError(f"{path} is no .npy file that can be read ({' '.join(str(error).split())}): copy it again, or "
                         f"write it with numpy.save") from None
    beyond = os.path.getsize(path) - array.offset - array.nbytes
    if beyond:
        raise InputError(f"{path} has {beyond} bytes beyond the array of shape {array.shape} that it says it holds: "
                         f"copy it again, or write it with numpy.save")
    return array


class NpyStack(ReadOnlyStack):
    """The images of a .npy file that holds an (n, y, x) array, or one image as (y, x).

    Parameters
    ----------
    path : str or path

    Attributes and errors are those of :class:`mrefali.io.stack.FileStack`; the format has no place for a pixel size.
    """

    pixel_size_A = None

    def __init__(self, path):
        self.path = os.fspath(path)
        self.n_images, self.box, _ = self._open().shape

    def _open(self):
        array = map_array(self.path)
        images = array.reshape(1, *array.shape) if array.ndim == 2 else array
        if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.size or images.dtype.kind not in "iuf":
            raise InputError(f"{self.path} holds {array.dtype} of the shape {array.shape}: give real numbers as "
                             f"(n, y, x), images square")
        return images

    def _read(self, indices):
        return read_rows(self._open(), indices)


def write_npy(path, blocks, n_images, box):
    """Write images, ``n_images`` of ``box`` x ``box`` float32 in all, block by block, whole or not at all."""
    with replacing_durably(path) as temporary:
        array, start = np.lib.format.open_memmap(temporary, "w+", np.float32, (n_images, box, box)), 0
        for block in blocks:
            array[start:start + len(block)] = block
            start += len(block)
        array.flush()
