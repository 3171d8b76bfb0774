"""The last finished iteration on disk, and what must be the same for a run to go on from it.

May import io, geometry, refine's ``State`` and what it needs of a plan; knows nothing of the search.
"""

import dataclasses
import json
import math
import os
import zlib

import numpy as np

from mrefali import geometry
from mrefali.errors import InputError
from mrefali.io import replacing_durably
from mrefali.refine import State

#: Particles, spread over the stack, of which all pixels and headers are looked at.
SAMPLED = 64

#: The headers that a run itself writes.
OURS = ("xform.align2d", "assign")

#: Of a state, what is stored as bytes, with its type and the number of axes.
ARRAYS = {"references": (np.dtype("<f4"), 3), "poses": (geometry.POSE, 1), "assign": (np.dtype("<i4"), 1)}

#: What a checksum that differs means.
CHECKSUMS = {"references": "the references", "mask": "the mask", "function_file": "the file of the reference function",
             "headers": "headers of the stack", "pixels": "pixels of the stack"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state, and what it belongs to.

    Attributes
    ----------
    state : State
    facts : dict
        See :func:`facts`.
    versions : dict of str to str
    headers : list of int
        Checksums of the poses and classes that may stand in the stack by now, see :func:`pose_checksum`.
    log_bytes : int
        Length of the run's log when the iteration was finished.
    """

    state: State
    facts: dict
    versions: dict
    headers: list
    log_bytes: int


def path_in(outdir):
    """The file of the checkpoint in an output directory."""
    return os.path.join(outdir, "checkpoint", "last")


def save(outdir, checkpoint):
    """Write a checkpoint, whole or not at all; the one before is replaced."""
    state = dict(vars(checkpoint.state))  # not asdict, which would copy what there is of every particle
    arrays = {name: np.ascontiguousarray(state.pop(name), dtype) for name, (dtype, _) in ARRAYS.items()}
    about = {**vars(checkpoint), "state": state, "shapes": {k: a.shape for k, a in arrays.items()}}
    check = 0
    with replacing_durably(path_in(outdir)) as temporary, open(temporary, "wb") as file:
        for piece in (json.dumps(about).encode() + b"\n", *(a.view(np.uint8).reshape(-1) for a in arrays.values())):
            file.write(piece)
            check = zlib.crc32(piece, check)
        file.write(b"%08x" % check)


def load(outdir):
    """The :class:`Checkpoint` in an output directory.

    Raises
    ------
    FileNotFoundError
    InputError
        If it is damaged.
    """
    path = path_in(outdir)
    try:
        with open(path, "rb") as file:
            whole = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{outdir} has no checkpoint, so there is nothing to resume: give a new OUTDIR without "
                                f"--resume") from None
    if whole[-8:] != b"%08x" % zlib.crc32(memoryview(whole)[:-8]):
        raise InputError(f"{path} is damaged, so the run cannot be resumed: start in a new OUTDIR, from the poses in "
                         f"{outdir}/poses.csv and the last averages")
    at = whole.index(b"\n") + 1
    about = json.loads(whole[:at])
    arrays = {}
    for name, (dtype, _) in ARRAYS.items():
        shape = about["shapes"][name]
        arrays[name] = np.frombuffer(whole, dtype, math.prod(shape), at).reshape(shape).copy()
        at += arrays[name].nbytes
    state = about.pop("state") | arrays
    version, numbers, gauss = state["random"]
    state["random"] = version, tuple(numbers), gauss
    del about["shapes"]
    return Checkpoint(**about | {"state": State(**state)})


def facts(plan, options):
    """What decides the result of a run: its options, and checksums of its files.

    Parameters
    ----------
    plan : checks.Plan
    options : checks.Options
        As given.

    Returns
    -------
    dict
        Of numbers and texts, as JSON holds them.
    """
    stack, search = plan.stack, plan.settings.search
    given = {name: value for name, value in dataclasses.asdict(options).items()
             if name not in ("mask", "quiet", "max_memory")}
    function = getattr(plan.settings.function, "__name__", repr(plan.settings.function))
    file = function.rpartition(":")[0]
    with_file = {"function_file": _checksum(_read_bytes(file))} if file.endswith(".py") else {}
    sampled = np.unique(np.linspace(0, stack.n_images - 1, SAMPLED).astype(int)).tolist()
    return {
        **{name: _plain(value) for name, value in given.items()},
        "ou": search.outer_radius, "function": function, **with_file,
        # what the particles make themselves is made of the poses that a resumed run may have replaced
        "references": None if options.reference_free else _checksum(plan.references),
        "mask": None if options.mask is None else _checksum(plan.settings.mask),
        "n_particles": stack.n_images, "box": stack.box, "pixel_size_A": stack.pixel_size_A,
        "headers": _checksum(_headers(stack, sampled), *_ctf(plan.particles)),
        "pixels": _checksum(stack.read_at(sampled)),
    }


def _plain(value):
    """A number or text of an option as JSON gives it back; a tuple, or list, has one number a stage."""
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else getattr(value, "item", lambda: value)()


def _read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def _headers(stack, sampled):
    """All headers of these particles but those that a run writes, as bytes."""
    if stack.read_only:  # a CTF of theirs may have no text as headers have it
        parameters, _ = stack.known_ctf()
        return b"" if parameters is None else parameters[sampled].tobytes()
    texts = []
    for index in sampled:
        header = stack.header(index)
        for name in sorted(header.keys() - set(OURS)):
            texts.append(f"{index} {name} {np.asarray(header[name]).tolist()!r}")
    return "\n".join(texts).encode("utf-8", "surrogateescape")


def _ctf(particles):
    return () if particles.ctf is None else (particles.ctf.parameters, particles.ctf.applied)


def _checksum(*pieces):
    check = 0
    for piece in pieces:
        check = zlib.crc32(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).tobytes(), check)
    return check


def pose_checksum(poses, assign):
    """Of poses and classes as they are read from headers.

    Parameters
    ----------
    poses : (n_particles,) geometry.POSE
    assign : (n_particles,) int or None
    """
    return _checksum(poses, b"" if assign is None else np.asarray(assign, np.int64))


def as_read(poses):
    """Poses as they are read from the headers they were written to, which hold float32 matrices."""
    read = np.empty_like(poses)
    for first in range(0, len(poses), geometry.CONVERTED_AT_ONCE):
        some = slice(first, first + geometry.CONVERTED_AT_ONCE)
        read[some] = geometry.from_matrices(geometry.to_matrices(poses[some]).astype(np.float32).astype(np.float64))
    return read


def check_same(outdir, checkpoint, now, headers):
    """Raise InputError unless a run of the facts ``now`` may go on from ``checkpoint``.

    More iterations may be asked for than at first, or fewer, but not fewer than are finished; auto-stop (``maxit=0``)
    stays as it was, and so does the number where the stage, or the low-pass, of an iteration depends on it.

    Parameters
    ----------
    outdir : str
    checkpoint : Checkpoint
    now : dict
        See :func:`facts`.
    headers : int
        Checksum of the poses and classes in the stack, see :func:`pose_checksum`.
    """
    then = checkpoint.facts
    differing = [CHECKSUMS[name] if name in CHECKSUMS else f"{name}={now.get(name)} (was {then.get(name)})"
                 for name in {**then, **now} if name != "maxit" and then.get(name) != now.get(name)]
    if headers not in checkpoint.headers:
        differing.append("xform.align2d or assign of the stack")
    maxit, finished = now["maxit"], checkpoint.state.number + 1
    fixed = now["lowpass"] is not None or any(isinstance(now[name], list) for name in ("xr", "yr", "ts"))
    if fixed:
        if maxit != then["maxit"]:
            differing.append(f"maxit={maxit} (was {then['maxit']}, and the stages or the low-pass go by it)")
    elif (maxit == 0) != (then["maxit"] == 0) or 0 < maxit < finished:
        differing.append(f"maxit={maxit} (was {then['maxit']}, and {finished} iterations are finished)")
    if differing:
        raise InputError(f"{outdir} cannot be resumed, since these are not as they were: {'; '.join(differing)}: give "
                         "all as it was, or start in a new OUTDIR")
