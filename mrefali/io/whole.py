"""Files that are written whole or not at all. Imports errors of ours only."""

import io
import os
import shutil
from contextlib import contextmanager, suppress

from mrefali.errors import InputError


@contextmanager
def replacing(path, temporary=None):
    """The name of a new file beside ``path``, to be written; at the end of the context it takes the place of ``path``.

    If an exception ends the context, the new file is removed and ``path`` stays as it was, there or not. A process
    that is killed leaves ``temporary`` behind, ``.NAME.PID.part`` if it is not given.
    """
    folder, name = os.path.split(path)
    temporary = temporary or os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # whatever ended it, half a file must not stay
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


@contextmanager
def replacing_durably(path, temporary=None):
    """As :func:`replacing`, and not even a power cut leaves less than the old file or the new one."""
    with replacing(path, temporary) as temporary:
        yield temporary
        sync(temporary)
    sync(os.path.dirname(path) or ".")


class UnfailingFile(io.FileIO):
    """A file for HDF5 to write, which never hears that it cannot be written to.

    After a write that failed HDF5 may crash, then or in a later file. So the first failure is kept for :meth:`check`.
    Where a signal ends the writing before HDF5 has closed the file, HDF5 goes on with one that is closed and given up:
    it is let to, or it would report that below the line with which the run ends.
    """

    failure = None

    def seek(self, *where):
        return 0 if self.closed else super().seek(*where)

    def readinto(self, buffer):
        return memoryview(buffer).nbytes if self.closed else super().readinto(buffer)

    def write(self, data):
        data = memoryview(data).cast("B")
        self._try(self._write_all, data)
        return len(data)

    def truncate(self, size=None):
        self._try(super().truncate, size)
        return size

    def flush(self):
        """Nothing: what matters is synced in the end."""

    def check(self):
        """Raise the first failure, if there was one."""
        if self.failure is not None:
            raise self.failure

    def _write_all(self, data):
        while data:
            data = data[super().write(data):]

    def _try(self, call, *arguments):
        if self.closed:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.failure = self.failure or error


def check_new_file(path, ending=""):
    """Raise unless ``path`` can be made: a new file, whose name has this ending, in small letters or capitals.

    Raises
    ------
    InputError, FileExistsError, FileNotFoundError, PermissionError
    """
    path = os.fspath(path)
    if not path.lower().endswith(ending):
        raise InputError(f"{path} is not allowed: give a file name that ends in {ending}")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: give another name, or remove it first")
    check_parent(path)


def check_parent(path):
    """Raise FileNotFoundError or PermissionError unless something new can be made in the folder of ``path``."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path} cannot be made: there is no folder {folder}, make it first")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"{path} cannot be made: no permission to write into {folder}, give a place you may "
                              "write to")


def check_writable(path, stack, needed, purpose):
    """Raise unless headers can be written into the file ``path``; messages speak of ``stack``.

    Parameters
    ----------
    path, stack : str
    needed : int, bytes
        Room that its folder must have.
    purpose : str
        What for.

    Raises
    ------
    FileNotFoundError, PermissionError
    InputError
        If the disk has no such room.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{stack} does not exist")
    folder = os.path.dirname(path) or "."
    for place in (path, folder):
        if not os.access(place, os.W_OK, effective_ids=True):
            raise PermissionError(f"{place} cannot be written to, but the headers of {stack} have to be: allow it with "
                                  f"chmod u+w, or work on a copy")
    check_room(folder, needed, f"headers of {stack} are written into {purpose}", "work where there is more")


def check_room(folder, needed, what, otherwise):
    """Raise InputError if ``folder`` has less than ``needed`` bytes free, which ``what`` takes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{what}, which takes {needed / 2**20:.1f} MB, but {folder} has {free / 2**20:.1f} MB free: "
                         f"make room, or {otherwise}")


def keep_owner(path, copy):
    """Give the file ``copy`` the group and the owner of ``path``, each where this user may."""
    status = os.stat(path)
    for owner, group in ((-1, status.st_gid), (status.st_uid, -1)):
        with suppress(OSError):  # who may not give files away keeps the copy
            os.chown(copy, owner, group)


def sync(path):
    """Have what was written to a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
