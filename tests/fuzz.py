"""Damaged files of every format that is read here, made from valid ones and read in processes that may die of them.

``python tests/fuzz.py FORMAT SEED N FOLDER`` tries N files and prints, as JSON, how often what came of it. A format is
a function that writes valid files into a folder, and one that reads them; to add one, write both and name them in
``FORMATS``.
"""

import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np

from mrefali.errors import REFUSALS

#: Limits of one read: address space in bytes, Python and its libraries included, and seconds.
MEMORY, SECONDS = 1 << 30, 10

DATA = Path(__file__).parent / "data"

#: ``write(folder)`` makes valid files and returns the paths of those to damage; ``read(folder)`` reads all that there
#: is and returns a count, which is ``count`` for a sound file.
Format = namedtuple("Format", "write read count")


# ---- formats


def write_hdf(folder):
    from mrefali.geometry import make_poses, to_matrices
    from mrefali.io import write_stack
    rng = np.random.default_rng(3)
    write_stack(folder / "stack.hdf", rng.standard_normal((6, 4, 4)), [
        {"xform.align2d": to_matrices(make_poses([float(i)]))[0], "assign": i, "ctf": "E1 0 0 50 10 300 2 2.5 0 0 0",
         "members": np.arange(3.0 + i), "source": f"m{i}.hdf"} for i in range(6)], 2.5)
    return [folder / "stack.hdf"]


def write_new_hdf(folder):
    import h5py
    with h5py.File(folder / "stack.hdf", "w", libver="latest") as file:
        images = file.create_group("MDF/images")
        images.attrs["imageid_max"] = np.array([5], "i4")
        for i in range(6):
            image = images.create_group(str(i))
            image.create_dataset("image", data=np.full((4, 4), i, "u1"), compression="gzip", chunks=(2, 4))
            image.attrs["EMAN.assign"] = np.array([i], "i4")
            image.attrs["EMAN.stored_renderbits"] = np.array([8], "i4")
            image.attrs["EMAN.stored_rendermin"] = np.array([0], "f4")
            image.attrs["EMAN.stored_rendermax"] = np.array([1], "f4")
    return [folder / "stack.hdf"]


def write_eman_hdf(folder):
    (folder / "stack.hdf").write_bytes((DATA / "vanished_aqm000.hdf").read_bytes())
    return [folder / "stack.hdf"]


def read_stack(path):
    """All of a stack; the number of its images, each of which must have given pixels and headers."""
    from mrefali.io import open_stack
    stack = open_stack(path)
    for name in list(stack.header_names())[:3]:
        assert len(stack.column(name)) == stack.n_images
    for i in range(stack.n_images):
        stack.header(i)
    assert stack.read(0, stack.n_images).shape == (stack.n_images, stack.box, stack.box)
    with contextlib.suppress(*REFUSALS):
        assert len(stack.poses()) == stack.n_images
    return stack.n_images


def read_hdf(folder):
    return read_stack(folder / "stack.hdf")


#: With pixels of their own, in another database's file, and in an .mrcs.
DATABASES = ("ctfstack", "vstack", "mrcsstack")


def write_bdb(folder):
    from test_io_bdb import write_golden
    write_golden(folder)
    return [folder / f"py3/EMAN2DB/{name}.bdb" for name in DATABASES] + [folder / "py3/mrcsstack.mrcs"]


def read_bdb(folder):
    os.chdir(folder)
    return sum(read_stack(f"bdb:py3#{name}") for name in DATABASES)


def write_mrc(folder):
    import formats
    formats.write_mrc(folder / "stack.mrcs", formats.IMAGES, 2.5)
    return [folder / "stack.mrcs"]


def read_star(folder):
    """As ``read_any``, and 3 where there are as many particles as lines that can be one: a STAR knows no count."""
    lines = re.findall(rb"^\s*[0-9]+@", (folder / "Select/particles.star").read_bytes(), re.MULTILINE)
    n_images = read_any(folder)
    return 3 if n_images == len(lines) else n_images


def write_star(folder):
    import formats
    formats.write_star(folder)
    return [folder / "Select/particles.star", folder / "Select/particles.star", folder / "Extract/b.mrcs"]


def write_cs(folder):
    import formats
    records = formats.cs_records()
    records["ctf/phase_shift_rad"] = 0  # what EMAN2's text for a CTF can hold
    formats.write_cs(folder, records)
    return [folder / "J12/particles.cs", folder / "J12/particles.cs", folder / "J5/a.mrc"]


def write_spider(folder):
    import formats
    formats.write_spider(folder / "stack.spi")
    return [folder / "stack.spi"]


def write_npy(folder):
    import formats
    np.save(folder / "stack.npy", formats.IMAGES)
    return [folder / "stack.npy"]


def read_any(folder):
    """Whatever stack is there."""
    names = ("stack.mrcs", "Select/particles.star", "J12/particles.cs", "stack.spi", "stack.npy")
    path, = (folder / name for name in names if (folder / name).exists())
    return read_stack(path)


def write_table(folder):
    (folder / "table.txt").write_text("".join(f"{i * 11.25} {i / 3:.4f} {-i} {i % 2} 1.0 {i}\n" for i in range(40)))
    return [folder / "table.txt"]


def write_csv(folder):
    (folder / "table.txt").write_text("index,assign,alpha,sx,sy,mirror,peak,changed\r\n" + "".join(
        f"{i},{i},{i * 11.25},{i / 3:.4f},{-i},{i % 2},{100 + i},1\r\n" for i in range(40)))
    return [folder / "table.txt"]


def read_table(folder):
    from mrefali.headers import read_table
    columns = read_table(folder / "table.txt", ["xform.align2d", "assign"], 40)
    assert len(columns["xform.align2d"]) == len(columns["assign"])
    return len(columns["assign"])


def write_journal(folder):
    """A stack, half of which is changed, and the journal with the rest; headers and journal are damaged in turn."""
    import crash

    from mrefali.io import journal, open_stack
    crash.make_stack(str(folder / "stack.hdf"))
    whole, apply, finish = open_stack(str(folder / "stack.hdf")), journal._apply, journal._finish
    journal._finish = lambda file, name: None
    try:
        whole.write_columns(crash.columns(1))
    finally:
        journal._apply, journal._finish = apply, finish
    for left in folder.glob(".*.lock"):
        left.unlink()
    return [folder / ".stack.hdf.journal"]


def read_journal(folder):
    """The number of images that agree, which all do; a refusal leaves the stack as it is."""
    from mrefali.io import open_stack
    before = (folder / "stack.hdf").read_bytes()
    try:
        found = open_stack(folder / "stack.hdf").column("assign")
    except REFUSALS:
        assert (folder / "stack.hdf").read_bytes() == before
        raise
    return found.count(1)


def write_checkpoint(folder):
    from mrefali import checkpoint
    from mrefali.geometry import identity_poses
    from mrefali.refine import State
    state = State(3, np.ones((2, 4, 4), np.float32), identity_poses(40), np.zeros(40, np.int32), 1.5,
                  random.Random(1).getstate())
    (folder / "checkpoint").mkdir()
    checkpoint.save(folder, checkpoint.Checkpoint(state, {"ou": 3}, {"numpy": "2"}, [1, 2], 100))
    return [folder / "checkpoint/last"]


def read_checkpoint(folder):
    from mrefali import checkpoint
    return len(checkpoint.load(folder).state.poses)


FORMATS = {
    "hdf": Format(write_hdf, read_hdf, 6), "new-hdf": Format(write_new_hdf, read_hdf, 6),
    "eman-hdf": Format(write_eman_hdf, read_hdf, 4), "bdb": Format(write_bdb, read_bdb, None),
    "mrc": Format(write_mrc, read_any, 7), "star": Format(write_star, read_star, 3),
    "cs": Format(write_cs, read_any, 3), "spider": Format(write_spider, read_any, 7),
    "npy": Format(write_npy, read_any, 7),
    "table": Format(write_table, read_table, 40), "csv": Format(write_csv, read_table, 40),
    "journal": Format(write_journal, read_journal, 7), "checkpoint": Format(write_checkpoint, read_checkpoint, 40),
}


# ---- damage


def damage(rng, data):
    """``data`` with some bits, bytes or numbers changed, a piece lost, doubled or moved, or the end lost."""
    data = bytearray(data)
    kind = rng.choice(("bit", "bit", "byte", "byte", "number", "number", "lose", "double", "move", "cut", "zeros"))
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20)) if kind in ("bit", "byte", "number", "zeros") else 1):
        at, size = rng.randrange(len(data)), rng.choice((1, 4, 16, 64, 512))
        if kind == "bit":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            data[at] = rng.randrange(256)
        elif kind == "number":
            width = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, 2**(8 * width) - 1, 2**(8 * width - 1), 2**31 - 1, 2**20, rng.getrandbits(64)))
            at -= at % width
            data[at:at + width] = (number % 2**(8 * width)).to_bytes(width, "little")
        elif kind == "lose":
            del data[at:at + size]
        elif kind == "double":
            data[at:at] = data[at:at + size]
        elif kind == "move":
            to = rng.randrange(len(data))
            data[to:to + size] = data[at:at + size]
        elif kind == "zeros":
            data[at:at + size] = bytes(len(data[at:at + size]))
        else:
            del data[at:]
    return bytes(data)


def try_files(name, seed, n, folder, only=None):
    """Read ``n`` damaged files; how often what came of it. What went wrong is told on stderr, and counted."""
    kind, folder = FORMATS[name], Path(folder)
    logging.getLogger("mrefali").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")  # mrcfile's, of a file that is longer than it says
    paths = kind.write(folder)
    sound = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = kind.read(folder)
    assert kind.count in (None, expected)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    count, times = {"read": 0, "refused": 0, "wrong": 0}, {}
    for number in range(n) if only is None else [only]:
        for path in folder.rglob("*"):
            if path.is_file() and path not in sound:
                path.unlink()
        for path, data in sound.items():
            if not path.exists() or path.stat().st_mtime_ns != times.get(path):
                path.write_bytes(data)
                times[path] = path.stat().st_mtime_ns
        rng = random.Random(f"{seed} {number}")
        path = rng.choice(paths)
        path.write_bytes(damage(rng, sound[path]))
        times.pop(path)
        print(f"{number}", file=sys.stderr, flush=True)
        signal.alarm(SECONDS)
        count[_try_one(kind, folder, expected)] += 1
        signal.alarm(0)
    return count


def _try_one(kind, folder, expected):
    try:
        found = kind.read(folder)
    except REFUSALS as error:
        if "\n" not in str(error) and len(str(error)) > 10:
            return "refused"
        print(f"  more or less than one line: {error}", file=sys.stderr)
    except Exception:
        print(traceback.format_exc(), file=sys.stderr)
    else:
        if found == expected:
            return "read"
        print(f"  counted {found} in place of {expected}", file=sys.stderr)
    return "wrong"


def run(name, seed, n, folder):
    """:func:`try_files` in a process of its own: its count, and what it said if a file killed it or went wrong."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, __file__, name, str(seed), str(n), str(folder)], capture_output=True,
                          text=True, env=environment)
    count = json.loads(done.stdout) if done.returncode == 0 else {"killed by": done.returncode}
    told = [line for line in io.StringIO(done.stderr) if not line.strip().isdigit()] if done.returncode == 0 else (
        done.stderr.splitlines()[-3:])
    return count, "".join(told)


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(try_files(words[0], int(words[1]), int(words[2]), words[3], *map(int, words[4:]))))
