"""Any change of an HDF5 file in place, all or nothing: an overlay, a journal beside the file, and its recovery.

h5py changes an :class:`Overlay`, which leaves the file alone and puts the changed sectors into ``.NAME.journal.part``.
When all is there it is synced and gets the name ``.NAME.journal``: from then on the change counts. Its sectors are
written into the file, that is synced, and the journal removed. Whatever ends the process, or the machine, in
between, :func:`recover` finishes a journal and drops what never became one. Imports errors, lock and whole of ours
only.
"""

import errno
import fcntl
import io
import logging
import os
import stat
import struct
import time
import zlib
from array import array
from bisect import bisect_left
from contextlib import contextmanager, suppress

import numpy as np

from mrefali.errors import InputError, one_line
from mrefali.io import lock
from mrefali.io.whole import sync

logger = logging.getLogger(__name__)

#: Bytes that a disk writes whole or not at all.
SECTOR = 512

#: A journal is its sectors, the table that says where they go, and this, which ends it: magic, size of the file before
#: and after, number of sectors, and the CRC of all before.
FOOTER = struct.Struct("<8s3QI")
MAGIC = b"mrefali1"

#: Of each sector its number in the file, and the CRC of what is there before. After those that the journal has come
#: those that HDF5 wrote as they were: if they are not as they were any more, the others do not fit them.
TABLE = np.dtype([("sector", "<u8"), ("before", "<u4")])

#: How many places are kept where they are found at once, before they are sorted among the others.
RECENT = 1 << 14

#: What flock says on file systems that have no locks; there nobody can be kept out.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

#: How long, in seconds, a reader waits for a writer that is at it, and between two looks.
PATIENCE_S, LOOK_S = 30.0, 0.02


def journal_name(path):
    """The journal of the file ``path``, beside it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.journal")


def forget(path):
    """Remove the journal of a file in whose place another has been put."""
    _remove(journal_name(path))


def copy_name(path):
    """Where a new version of the file ``path`` is written before it takes its place."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.copy")


# --- the change


class Places:
    """Whole numbers, each with its place: 0 for the first that was added. A tenth of the memory of a dict."""

    def __init__(self):
        self._numbers = array("Q")  # in order of place
        self._sorted, self._places = array("Q"), array("Q")  # of all but the recent
        self._recent = {}

    def __len__(self):
        return len(self._numbers)

    def find(self, number):
        """The place of a number; None if it has none."""
        place = self._recent.get(number)
        if place is None:
            i = bisect_left(self._sorted, number)
            if i < len(self._sorted) and self._sorted[i] == number:
                place = self._places[i]
        return place

    def within(self, first, stop):
        """Pairs of number and place of all that are from ``first`` to before ``stop``, in any order."""
        low, high = bisect_left(self._sorted, first), bisect_left(self._sorted, stop)
        yield from zip(self._sorted[low:high], self._places[low:high], strict=True)
        for number in self._recent.keys() & range(first, stop):
            yield number, self._recent[number]

    def add(self, number):
        """The place of a number that had none."""
        self._recent[number] = len(self._numbers)
        self._numbers.append(number)
        if len(self._recent) > RECENT:
            order = np.argsort(self.in_order())
            self._sorted, self._places = (array("Q", a.tobytes()) for a in (self.in_order()[order], order))
            self._recent = {}
        return len(self._numbers) - 1

    def in_order(self):
        """All numbers in order of place, (n,) int64."""
        return np.array(self._numbers, np.int64)


class Overlay(io.RawIOBase):
    """An open file as h5py wants it, whose changes go into another file until :meth:`commit`.

    Once closed it takes what is written and does nothing: where a signal ends the writing before HDF5 has closed its
    file, HDF5 writes the rest when it is forgotten, and the descriptors may be those of other files by then.

    Parameters
    ----------
    file, part : int
        Descriptors: of the file to change, and of an empty one for the changed sectors.
    """

    def __init__(self, file, part):
        self._file, self._part = file, part
        self._old_size = self._size = os.fstat(file).st_size
        self._position = 0
        self._slots = Places()  # of sectors of the file, in the part
        self._before = array("I")  # CRC of each as it is in the file, in order of place
        self._alike, self._alike_crcs = array("Q"), array("I")  # sectors that were written as they are, and their CRCs
        self.failure = None  # of the disk; HDF5 must not hear of it (whole.UnfailingFile)

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self):
        return self._position

    def flush(self):
        """Nothing: what h5py has flushed is no whole change yet."""

    def truncate(self, size):
        self._size = size
        return size

    def readinto(self, buffer):
        view = memoryview(buffer).cast("B")
        if self.closed:
            return len(view)
        start = self._position
        n_bytes = max(0, min(len(view), self._size - start))
        first, stop = start // SECTOR, -(-(start + n_bytes) // SECTOR)
        view[:n_bytes] = self._read(first, stop)[start - first * SECTOR:][:n_bytes]
        self._position += n_bytes
        return n_bytes

    def write(self, data):
        data = memoryview(data).cast("B")
        if self.closed:
            return len(data)
        start, end = self._position, self._position + len(data)
        first, stop = start // SECTOR, -(-end // SECTOR)
        old = self._read(first, stop)
        new = bytearray(old)
        new[start - first * SECTOR:end - first * SECTOR] = data
        try:
            for i in range(stop - first):
                within = slice(i * SECTOR, (i + 1) * SECTOR)
                if new[within] != old[within]:
                    self._put(first + i, new[within], old[within])
                elif self._slots.find(first + i) is None:
                    self._alike.append(first + i)
                    self._alike_crcs.append(zlib.crc32(old[within]))
        except OSError as error:
            self.failure = self.failure or error
        self._position, self._size = end, max(self._size, end)
        return len(data)

    def _read(self, first, stop):
        """The sectors from ``first`` to before ``stop`` as they are by now; zeros beyond the end of the file."""
        sectors = bytearray(_read_padded(self._file, first, stop))
        # HDF5 reads the names of all images for each, megabytes of a large stack
        for sector, slot in self._slots.within(first, stop):
            at = (sector - first) * SECTOR
            sectors[at:at + SECTOR] = os.pread(self._part, SECTOR, slot * SECTOR)
        return sectors

    def _put(self, sector, new, old):
        slot, before = self._slots.find(sector), None
        if slot is None:
            slot, before = len(self._slots), zlib.crc32(old)
        _write_all(self._part, new, slot * SECTOR)
        if before is not None:  # now that it is there
            self._slots.add(sector)
            self._before.append(before)

    @property
    def changed(self):
        """Whether anything is another than in the file."""
        return len(self._slots) > 0 or self._size != self._old_size

    def commit(self):
        """End the part as a journal: the table of its sectors, and the footer; synced, and room made in the file."""
        changed = self._slots.in_order()
        alike, first = np.unique(np.array(self._alike, np.int64), return_index=True)
        unchanged = ~np.isin(alike, changed)
        table = np.zeros(len(changed) + unchanged.sum(), TABLE)
        table["sector"] = np.concatenate([changed, alike[unchanged]])
        table["before"] = np.concatenate([self._before, np.array(self._alike_crcs, np.uint32)[first[unchanged]]])
        at = len(self._slots) * SECTOR
        _write_all(self._part, table.tobytes(), at)
        at += table.nbytes
        sizes = FOOTER.pack(MAGIC, self._old_size, self._size, len(self._slots), 0)[:-4]
        check = zlib.crc32(sizes, _crc_of(self._part, at))
        _write_all(self._part, sizes + struct.pack("<I", check), at)
        os.fsync(self._part)
        if self._size > self._old_size:  # a disk must not turn out to be full half way
            os.posix_fallocate(self._file, self._old_size, self._size - self._old_size)

    def restore_size(self):
        """Take back what room :meth:`commit` made in the file."""
        if os.fstat(self._file).st_size != self._old_size:
            os.ftruncate(self._file, self._old_size)


@contextmanager
def changing(path):
    """An :class:`Overlay` of the file ``path``, whose changes are in the file at the end of the context, all or none.

    If an exception ends the context, or the journal cannot be written, the file is as it was. The caller holds the
    file's lock, and has it recovered.

    Raises
    ------
    OSError
        Also where the file cannot be written once the change counts: then the journal stays, for :func:`recover`, and
        the exception has the attribute ``pending``, its name.
    """
    journal = journal_name(path)
    part = f"{journal}.part"
    with _opened(path, os.O_RDWR) as file:
        mode = stat.S_IMODE(os.fstat(file).st_mode)
        with _opened(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode) as descriptor:
            overlay = Overlay(file, descriptor)
            try:
                yield overlay
                if overlay.failure is not None:
                    raise overlay.failure
                if not overlay.changed:
                    os.unlink(part)
                    return
                overlay.commit()
                os.replace(part, journal)
                sync(os.path.dirname(path) or ".")
            except BaseException as error:
                overlay.close()
                overlay.restore_size()
                for name in (part, journal):
                    _remove(name)
                if overlay.failure not in (None, error):  # what came of it
                    raise overlay.failure from error
                raise
        _finish(file, journal)


def _finish(file, journal):
    """Write a committed journal into the open ``file``; who interrupts it has to wait."""
    try:
        try:
            _apply(file, journal)
        except KeyboardInterrupt:
            if os.path.exists(journal):
                _apply(file, journal)
            raise
    except OSError as error:
        error.pending = journal
        raise


def _apply(file, journal):
    with _opened(journal, os.O_RDONLY) as part:
        _, new_size, n_sectors, table = _load(part, journal)
        order = np.argsort(table["sector"][:n_sectors])
        sectors = table["sector"][order].astype(np.int64)
        # neighbours in both files are written at once
        starts = np.flatnonzero((np.diff(sectors, prepend=-2) != 1) | (np.diff(order, prepend=-2) != 1)).tolist()
        for first, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            at = int(sectors[first]) * SECTOR
            n_bytes = min((stop - first) * SECTOR, max(0, new_size - at))  # the last sector may be no whole one
            _write_all(file, os.pread(part, n_bytes, int(order[first]) * SECTOR), at)
    os.ftruncate(file, new_size)
    os.fsync(file)
    os.unlink(journal)
    sync(os.path.dirname(journal) or ".")


# --- recovery


def recover(path, name):
    """Finish the change of the file ``path`` that a process did not live to finish, or drop it.

    A change that another process is at is waited for.

    Parameters
    ----------
    path : str
        No symbolic link.
    name : str
        What messages call the stack.

    Raises
    ------
    InputError
        If the file may hold half a change that cannot be finished: it cannot be written to, the journal is damaged, or
        the file was changed since.
    """
    if not any(map(os.path.lexists, _leftovers(path))):
        return
    journal = journal_name(path)
    if not all(os.access(place, os.W_OK, effective_ids=True) for place in (path, os.path.dirname(path) or ".")):
        if os.path.exists(journal):
            raise InputError(f"{name} may hold half of a change of its headers, which {journal} completes, but it "
                             f"cannot be written to: have somebody who may run mrefali info {name}")
        return
    while not _wait_for_writer(path, name):
        try:
            with lock.held(path, name), _failing_as_input(name), flocked(path, name):
                _finish_or_drop(path, journal, name)
                return
        except lock.Held:  # somebody else was as quick
            continue


def _finish_or_drop(path, journal, name):
    unready = [_remove(leftover) for leftover in _leftovers(path) if leftover != journal]
    if any(unready):
        logger.warning("%s: a process ended before its change of the headers was ready; they are as they were", name)
    if os.path.exists(journal):
        _replay(path, journal, name)


def _leftovers(path):
    return journal_name(path), f"{journal_name(path)}.part", copy_name(path)


def _wait_for_writer(path, name):
    """Whether the file is whole although somebody lives who may write to it."""
    give_up = time.monotonic() + PATIENCE_S
    while (owner := lock.holder(path, name)) is not None:
        if not os.path.exists(journal_name(path)):
            return True
        if time.monotonic() > give_up:
            raise InputError(f"{name} is being written to by {owner}: wait for it")
        time.sleep(LOOK_S)
    return False


def _replay(path, journal, name):
    """Write a journal that was left into the file, if it is the file's and nothing else was written since."""
    with _opened(path, os.O_RDWR) as file:
        with _opened(journal, os.O_RDONLY) as part:
            old_size, new_size, n_sectors, table = _load(part, journal)
            fits = _fits(file, part, n_sectors, table)
        if not fits or not min(old_size, new_size) <= os.fstat(file).st_size <= max(old_size, new_size):
            raise InputError(f"{name} may hold half of a change of its headers, and was changed by another program "
                             f"since, or is another file: restore it from a backup, or take it as it is by removing "
                             f"{journal}")
        _finish(file, journal)
        logger.warning("%s: a process ended within a change of the headers, which is finished now", name)


def _load(part, journal):
    """``old_size, new_size, n_sectors, table`` of a journal; InputError unless it is whole."""
    size = os.fstat(part).st_size
    data = os.pread(part, FOOTER.size, max(0, size - FOOTER.size))
    if len(data) == FOOTER.size:
        magic, old_size, new_size, n_sectors, check = FOOTER.unpack(data)
        n_bytes = size - FOOTER.size - n_sectors * SECTOR  # of the table
        if (magic == MAGIC and n_bytes >= n_sectors * TABLE.itemsize and n_bytes % TABLE.itemsize == 0
                and check == zlib.crc32(data[:-4], _crc_of(part, size - FOOTER.size))):
            table = np.frombuffer(os.pread(part, n_bytes, n_sectors * SECTOR), TABLE)
            return old_size, new_size, n_sectors, table
    raise InputError(f"{journal} is damaged, so the headers of its stack may be half new: restore the stack from a "
                     f"backup, or take the stack as it is by removing {journal}")


def _fits(file, part, n_sectors, table):
    """Whether each sector of the file is as it was, or as it is in the journal, as far as the file goes."""
    size = os.fstat(file).st_size
    for slot, (sector, before) in enumerate(table.tolist()):
        there = _read_padded(file, sector, sector + 1)
        if zlib.crc32(there) != before:
            # of the old file's last sector the new bytes can be there, and the new length not yet
            within = min(SECTOR, max(0, size - sector * SECTOR))
            new = os.pread(part, within, slot * SECTOR) if slot < n_sectors else None
            if new is None or there != new.ljust(SECTOR, b"\0"):
                return False
    return True


# --- bytes


@contextmanager
def _opened(path, flags, mode=0o644):
    """The descriptor of a file, as long as the context lasts."""
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_padded(file, first, stop):
    """The sectors from ``first`` to before ``stop`` of an open file, with zeros beyond its end."""
    return os.pread(file, (stop - first) * SECTOR, first * SECTOR).ljust((stop - first) * SECTOR, b"\0")


def _write_all(file, data, at):
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _crc_of(file, size, piece=1 << 22):
    """The CRC of the first ``size`` bytes of an open file."""
    check = 0
    for at in range(0, size, piece):
        check = zlib.crc32(os.pread(file, min(piece, size - at), at), check)
    return check


def _remove(name):
    """Whether the file was there to be removed."""
    with suppress(FileNotFoundError):
        os.unlink(name)
        return True
    return False


@contextmanager
def _failing_as_input(name):
    try:
        yield
    except OSError as error:
        raise InputError(f"{name} may hold half of a change of its headers, which could not be finished "
                         f"({one_line(error)}): see to the disk, then run mrefali info {name}") from error


@contextmanager
def flocked(path, name):
    """Keep other programs that lock as HDF5 does from writing to ``path``, as long as the context lasts."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{name} is open in another program, which locked it: close it there and run "
                             "again") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        yield
