"""Files that are written whole or not at all. Imports errors of ours only."""

import os
import shutil
from contextlib import contextmanager, suppress

from mrefali.errors import InputError


@contextmanager
def replacing(path):
    """The name of a new file beside ``path``, to be written; at the end of the context it takes the place of ``path``.

    If an exception ends the context, the new file is removed and ``path`` stays as it was, there or not. A process
    that is killed leaves ``.NAME.PID.part`` behind.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # whatever ended it, half a file must not stay
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


@contextmanager
def replacing_durably(path):
    """As :func:`replacing`, and not even a power cut leaves less than the old file or the new one."""
    with replacing(path) as temporary:
        yield temporary
        _sync(temporary)
    _sync(os.path.dirname(path) or ".")


def check_replaceable(path, stack):
    """Raise unless a copy of the file ``path`` with other headers can take its place; messages speak of ``stack``.

    Raises
    ------
    FileNotFoundError, PermissionError
    InputError
        If the disk has no room for a copy.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{stack} does not exist")
    folder = os.path.dirname(path) or "."
    for place in (path, folder):
        if not os.access(place, os.W_OK, effective_ids=True):
            raise PermissionError(f"{place} cannot be written to, but the headers of {stack} have to be: allow it with "
                                  f"chmod u+w, or work on a copy")
    needed, free = os.path.getsize(path), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"headers of {stack} are written into a copy of it, which takes {needed / 2**20:.1f} MB, but "
                         f"{folder} has {free / 2**20:.1f} MB free: make room, or work where there is more")


def keep_owner(path, copy):
    """Give the file ``copy`` the group and the owner of ``path``, each where this user may."""
    status = os.stat(path)
    for owner, group in ((-1, status.st_gid), (status.st_uid, -1)):
        with suppress(OSError):  # who may not give files away keeps the copy
            os.chown(copy, owner, group)


def _sync(path):
    """Have what was written to a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
