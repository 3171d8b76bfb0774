"""Stacks of images: one module a format. Imports ctf, geometry and errors of ours only."""

import contextlib
import os

from mrefali.io.arrays import ArrayStack
from mrefali.io.bdb import BdbStack, database_file, is_bdb
from mrefali.io.content import Content
from mrefali.io.cs import CsStack
from mrefali.io.hdf import HdfStack, write_images, write_stack
from mrefali.io.lock import held
from mrefali.io.mrc import HEADER_BYTES, MrcStack, write_mrcs
from mrefali.io.npy import MAGIC as NPY_MAGIC
from mrefali.io.npy import NpyStack
from mrefali.io.spider import SpiderStack, header_order
from mrefali.io.stack import FileStack as Stack
from mrefali.io.star import StarStack
from mrefali.io.whole import check_new_file, check_parent, check_room, replacing, replacing_durably, sync

__all__ = ["ArrayStack", "BdbStack", "Content", "CsStack", "HdfStack", "MrcStack", "NpyStack", "SpiderStack",
           "Stack", "StarStack", "check_new_file", "check_parent", "check_room", "hold", "open_stack", "replacing",
           "replacing_durably", "sync", "write_images", "write_mrcs", "write_stack"]

HDF_MAGIC = b"\x89HDF\r\n\x1a\n"


def hold(path):
    """Keep other processes of ours from writing to the stack ``path``, as long as the context lasts; see ``lock``."""
    if is_bdb(path):
        return held(database_file(path), path)
    return held(path) if _kind(os.fspath(path)) is HdfStack else contextlib.nullcontext()  # others are only read


def open_stack(path, *, mixed=False):
    """The stack in the file ``path``, or in the database ``bdb:DIR#NAME``, open for reading.

    What is in a file decides, where it says so, and its name where not. Its images are square and of one size, numbered
    without holes; with ``mixed`` a database is taken as it is (:class:`BdbStack`).
    """
    if not is_bdb(path):
        return _kind(os.fspath(path))(path)
    stack = BdbStack(path)
    if not mixed:
        stack.require_alignable()
    return stack


def _kind(path):
    """The class of the format of a file; of one that is not there or unknown, ``HdfStack``, which says so."""
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER_BYTES)
    except OSError:
        return HdfStack
    suffix = os.path.splitext(path)[1].lower()
    if start.startswith(HDF_MAGIC):
        return HdfStack
    if start.startswith(NPY_MAGIC):
        return CsStack if suffix == ".cs" else NpyStack
    if suffix in (".mrc", ".mrcs") or start[208:212] == b"MAP ":
        return MrcStack
    if header_order(start):
        return SpiderStack
    return StarStack if suffix == ".star" else HdfStack
