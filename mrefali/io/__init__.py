"""Stacks of images: one module a format. Imports geometry and errors of ours only."""

from mrefali.io.arrays import ArrayStack
from mrefali.io.hdf import HdfStack, write_stack

__all__ = ["ArrayStack", "HdfStack", "open_stack", "write_stack"]


def open_stack(path):
    """The stack in the file ``path``, open for reading; what is in the file decides, not its name."""
    return HdfStack(path)
