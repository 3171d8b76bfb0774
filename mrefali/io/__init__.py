"""Stacks of images: one module a format. Imports geometry and errors of ours only."""

from mrefali.io.arrays import ArrayStack
from mrefali.io.bdb import BdbStack, is_bdb
from mrefali.io.hdf import HdfStack, write_images, write_stack
from mrefali.io.stack import FileStack as Stack
from mrefali.io.whole import replacing

__all__ = ["ArrayStack", "BdbStack", "HdfStack", "Stack", "open_stack", "replacing", "write_images", "write_stack"]


def open_stack(path, *, mixed=False):
    """The stack in the file ``path``, or in the database ``bdb:DIR#NAME``, open for reading.

    What is in a file decides, not its name. Its images are square and of one size, numbered without holes; with
    ``mixed`` a database is taken as it is (:class:`BdbStack`).
    """
    if not is_bdb(path):
        return HdfStack(path)
    stack = BdbStack(path)
    if not mixed:
        stack.require_alignable()
    return stack
