"""Who writes to a stack: a lock file beside it, so that two runs never write to one. Imports errors of ours only.

The file is made exclusively and names host, process and the process's start, which tells a lock whose process has
ended from one that is held. No lock of the operating system is asked for here: network disks lose those.
"""

import datetime
import json
import logging
import os
import sys
import time
from contextlib import contextmanager, suppress

from mrefali.errors import InputError

logger = logging.getLogger(__name__)

#: How often, and how long each time, in seconds, an empty lock file is given time to be filled.
ROUNDS, ROUND_S = 100, 0.01


class Held(InputError):
    """Another process holds the lock."""


def lock_name(path):
    """The lock file of the file ``path``, beside it; of a symbolic link, beside its target."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.lock")


@contextmanager
def held(path, name=None):
    """Keep other processes of ours from writing to the file ``path`` as long as the context lasts.

    Where this process holds the lock already it is left to the outer context. Where the folder cannot be written to,
    the stack's headers cannot either, and there is no lock.

    Parameters
    ----------
    path : str
    name : str, optional
        What messages call the stack.

    Raises
    ------
    Held
        At once, if another process holds the lock; the message names it.
    InputError
        If a lock does not say whose it is.
    """
    lock, name = lock_name(path), name or path
    folder = os.path.dirname(lock)
    if not os.path.exists(path) or not os.access(folder, os.W_OK, effective_ids=True):
        yield
        return
    mine = _take(lock, name)
    try:
        yield
    finally:
        if mine:
            with suppress(OSError):  # one that stays is known to be stale; what else is wrong must be heard
                os.unlink(lock)


def holder(path, name):
    """The living process, other than this one, that holds the lock of ``path``; a text for messages, or None."""
    owner = _read(lock_name(path), name)
    return None if owner in (None, _myself()) or _has_ended(owner) else _describe(owner)


def _take(lock, name):
    """Make the lock file; whether it was made, and not held by this process already."""
    while True:
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            owner = _read(lock, name)
            if owner is not None:
                if owner == _myself():
                    return False
                _take_over(lock, owner, name)
            continue
        try:
            about = _myself() | {
                "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
                "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:200]}
            text = json.dumps(about).encode()
            while text:
                text = text[os.write(descriptor, text):]
        except BaseException:  # a lock that names nobody would stay for ever
            os.unlink(lock)
            raise
        finally:
            os.close(descriptor)
        return True


def _take_over(lock, owner, name):
    """Remove the lock of a process that has ended; Held if it has not."""
    if not _has_ended(owner):
        end = ("wait for it, or end it" if owner.get("host") == _host() else
               f"wait for it, or, if it does not run there any more, remove {lock}")
        raise Held(f"{name} is in use by {_describe(owner)}: {end}")
    # of two that find it at once, one moves away what the other has just made: whoever sees that puts it back
    aside = f"{lock}.{os.getpid()}"
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if _read(aside, name) != owner:
        os.rename(aside, lock)
        return
    os.unlink(aside)
    logger.warning("%s: the lock of %s, which has ended, was taken over", name, _describe(owner))


def _read(lock, name):
    """Host, process and start in a lock file; None if there is none.

    Raises
    ------
    InputError
        If it says nothing of the kind.
    """
    try:
        about = json.loads(_read_filled(lock))
        if not isinstance(about, dict) or type(about.get("pid")) is not int:
            raise ValueError("no pid")
    except FileNotFoundError:
        return None
    except ValueError:
        raise InputError(f"{name} is locked by {lock}, which does not say by what process: if no other mrefali runs on "
                         f"it, remove {lock}") from None
    return _Owner(about)


def _read_filled(lock):
    """The text of a lock file, which its maker may be about to write."""
    for _ in range(ROUNDS):
        with open(lock, encoding="utf-8") as file:
            text = file.read()
        if text:
            break
        time.sleep(ROUND_S)
    return text


class _Owner(dict):
    """What a lock says; equal to another of the same process."""

    def __eq__(self, other):
        return isinstance(other, dict) and all(self.get(key) == other.get(key) for key in ("host", "pid", "started"))

    __hash__ = None


def _myself():
    return _Owner(host=_host(), pid=os.getpid(), started=_start_of(os.getpid()))


def _host():
    """The name of this machine, and of the world of processes on it, which containers have of their own."""
    with suppress(OSError):
        return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename


def _start_of(pid):
    """When a process began, in clock ticks since the machine did; None where that is not told.

    -1 for one that has ended, and waits for its parent to ask how.
    """
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        state, *fields = file.read().rpartition(b")")[2].split()
        return -1 if state in (b"Z", b"X") else int(fields[18])
    return None


def _has_ended(owner):
    """Whether a process of this machine is there no more; never of one on another."""
    if owner.get("host") != _host():
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's
        pass
    started = _start_of(owner["pid"])
    return started is not None and started != owner.get("started")


def _describe(owner):
    host = str(owner.get("host")).split(" ")[0]
    return f"process {owner['pid']} on {host} since {owner.get('since')} ({owner.get('command')})"
