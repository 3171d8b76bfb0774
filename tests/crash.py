"""What a crash can leave of a folder, by a model of the disk and by processes that are really killed.

``python tests/crash.py`` kills writers of a stack and prints, as JSON, how often it found what.
"""

import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a

from mrefali.geometry import make_poses, to_matrices
from mrefali.io import journal, lock, open_stack, write_stack

#: Every call of the operating system by which a file or a folder is changed here, or had on the disk.
CALLS = ("open", "write", "pwrite", "ftruncate", "posix_fallocate", "fsync", "replace", "rename", "unlink",
         "remove", "mkdir", "truncate")

N_IMAGES, BOX = 7, 8


# ---- a stack, and what must be true of it

def make_stack(path):
    """A stack with headers that are none of ours too; ``version(path, 0)`` is what a run has not touched."""
    rng = np.random.default_rng(5)
    write_stack(path, rng.standard_normal((N_IMAGES, BOX, BOX)), [
        {"xform.align2d": to_matrices(make_poses([float(i)]))[0], "ctf": f"E{1 + i / 10} 0 0 50 10 300 2 2.5 0 0 0",
         "ptcl_source_image": f"micrograph_{i}.hdf", "quality": i / 7} for i in range(N_IMAGES)], 2.5)


def columns(version):
    """Headers that tell the version of each image that has them; ``note`` grows, so that the file does."""
    return {"xform.align2d": make_poses([float(version % 360)] * N_IMAGES, 1.0, version, version % 2),
            "assign": [version] * N_IMAGES, "note": ["x" * (1 + version % 97)] * N_IMAGES}


def contents(path):
    """Every attribute and every dataset of an HDF5 file, and where its pixels stand, as bytes."""
    found = {}
    with h5py.File(path, "r") as file:
        def visit(name, node):
            for key in node.attrs:
                attribute = h5a.open(node.id, key.encode())
                raw = np.empty(attribute.shape, attribute.dtype)
                attribute.read(raw)
                found[name, key] = str(attribute.dtype), raw.tobytes()
            if isinstance(node, h5py.Dataset):
                found[name, None] = node.id.get_offset(), node[()].tobytes()
        file.visititems(visit)
    return found


OURS = {"EMAN.xform.align2d", "EMAN.assign", "EMAN.note"}


def version_of(path, before):
    """The version that all images have alike, after recovery; AssertionError unless pixels and the rest are intact."""
    found = open_stack(path).column("assign")
    assert len(set(found)) == 1, f"old and new headers are mixed: {found}"
    after = contents(path)
    foreign = {key: value for key, value in after.items() if key[1] not in OURS}
    assert foreign == {key: value for key, value in before.items() if key[1] not in OURS}, "pixels or headers changed"
    if found[0] is None:
        assert after == before
        return 0
    version = found[0]
    expected = columns(version)
    stack = open_stack(path)
    assert stack.column("note") == expected["note"]
    matrices = to_matrices(expected["xform.align2d"]).astype(np.float32)
    np.testing.assert_array_equal(stack.column("xform.align2d"), matrices)
    left = [name for name in os.listdir(os.path.dirname(path)) if "journal" in name or "copy" in name]
    assert not left, f"left behind: {left}"
    return version


# ---- the model of a disk

class Disk:
    """A folder, and what of it is surely on the disk: what was synced.

    A context, within which its files are held open. Content counts as of the last fsync of a file, names as of the
    last fsync of the folder.
    """

    def __init__(self, folder):
        self._folder = folder
        self._held = {}  # inode -> descriptor, so that no other file gets the number
        self._synced = {}  # inode -> bytes
        self._names = {name: self._hold(name) for name in os.listdir(folder)}
        for name, inode in self._names.items():
            self._synced[inode] = (folder / name).read_bytes()

    def _hold(self, name):
        inode = (self._folder / name).stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(self._folder / name, os.O_RDONLY)
        return inode

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for descriptor in self._held.values():
            os.close(descriptor)

    def synced(self, descriptor):
        """Note that fsync has returned for an open file or folder."""
        inode = os.fstat(descriptor).st_ino
        if inode == os.stat(self._folder).st_ino:
            self._names = {name: self._hold(name) for name in os.listdir(self._folder)}
        else:
            self._synced[inode] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def states(self, rng, n_mixtures):
        """``name -> bytes`` of the folder: as it is, with all dropped that was not synced, and some of each."""
        names = {name: self._hold(name) for name in os.listdir(self._folder)}
        now = {name: (self._folder / name).read_bytes() for name in names}
        by_inode = {inode: now[name] for name, inode in names.items()}
        yield now
        yield {name: self._synced.get(inode, b"") for name, inode in self._names.items()}
        for _ in range(n_mixtures):
            state = {}
            for name in sorted(names.keys() | self._names.keys()):
                inode = rng.choice([names.get(name), self._names.get(name)])
                if inode is not None:
                    old = self._synced.get(inode, b"")
                    state[name] = _mixed(rng, old, by_inode.get(inode, old))
            yield state


def _mixed(rng, old, new):
    """A file of which each sector, and the length, is on the disk as it was or as it is to be."""
    size = len(rng.choice([old, new]))
    pieces = []
    for at in range(0, max(len(old), len(new)), journal.SECTOR):
        pieces.append(rng.choice([old, new])[at:at + journal.SECTOR].ljust(journal.SECTOR, b"\0"))
    return b"".join(pieces)[:size].ljust(size, b"\0")


@contextlib.contextmanager
def before_each_call(visit, after_sync=lambda descriptor: None):
    """Have ``visit(name, arguments)`` called before each call that changes a file, and ``after_sync`` after fsync."""
    saved = {name: getattr(os, name) for name in CALLS}

    def wrap(name, call):
        def wrapped(*arguments, **options):
            if name != "open" or arguments[1] & os.O_CREAT:
                visit(name, arguments)
            result = call(*arguments, **options)
            if name == "fsync":
                after_sync(*arguments)
            return result
        return wrapped

    for name, call in saved.items():
        setattr(os, name, wrap(name, call))
    try:
        yield
    finally:
        for name, call in saved.items():
            setattr(os, name, call)


# ---- processes that are killed

def _check_after(path, before, count):
    """What a killed writer left, counted; then all must be well."""
    folder = Path(path).parent
    name = journal.journal_name(path)
    names = {"journal": name, "unready": f"{name}.part", "copy": journal.copy_name(path), "lock": lock.lock_name(path)}
    for kind in [kind for kind, name in names.items() if os.path.exists(name)] or ["nothing"]:
        count[kind] = count.get(kind, 0) + 1
    version = version_of(path, before)
    for name in os.listdir(folder):
        if name != os.path.basename(path):
            os.unlink(folder / name)
    return version


def kill_at_every_call(path, write_back):
    """Fork a writer for each call it makes, and kill it there; how often what was left."""
    make_stack(path)
    before, count, at = contents(path), {}, 0
    for version in (1, 2):
        whole = Path(path).read_bytes()
        while True:
            Path(path).write_bytes(whole)
            process = os.fork()
            if process == 0:
                _write_until_call(path, version, write_back, at)
            status = os.waitpid(process, 0)[1]
            if not os.WIFSIGNALED(status):
                assert status == 0
                break
            found = _check_after(path, before, count)
            assert found in (version - 1, version)
            count[f"version {found - version:+d}"] = count.get(f"version {found - version:+d}", 0) + 1
            at += 1
        count["calls"] = count.get("calls", 0) + at
        at = 0
    return count


def _write_until_call(path, version, write_back, at):
    stack, calls = open_stack(path), iter(range(at + 1))

    def visit(name, arguments):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_call(visit):
        stack.write_columns(columns(version), write_back)
    os._exit(0)


def kill_at_random(path, write_back, n, seed):
    """Fork a writer that never ends, kill it after a random time, ``n`` times; how often what was left."""
    make_stack(path)
    before, count, rng, version = contents(path), {"kills": 0}, random.Random(seed), 0
    while count["kills"] < n:
        ready, told = os.pipe()
        process = os.fork()
        if process == 0:
            stack = open_stack(path)
            os.write(told, b".")
            while True:
                version += 1
                stack.write_columns(columns(version), write_back)
        os.read(ready, 1)
        os.close(ready)
        os.close(told)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found = _check_after(path, before, count)
        assert found >= version
        count["kills"] += 1
        count["with a new version"] = count.get("with a new version", 0) + (found > version)
        version = found
    return count


if __name__ == "__main__":
    logging.getLogger("mrefali").setLevel(logging.ERROR)
    place, how, write_back_, *numbers = sys.argv[1:]
    if os.listdir(os.path.dirname(place) or "."):
        sys.exit(f"{place}: its folder must be empty, since all but the stack is removed there")
    result = (kill_at_every_call(place, write_back_) if how == "every-call" else
              kill_at_random(place, write_back_, *map(int, numbers)))
    print(json.dumps(result))
