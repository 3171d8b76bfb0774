"""The communicator: ranks that share the particles. The only file that imports mpi4py; imports no other of ours
but errors.

``SERIAL`` and ``mpi()`` have the same methods, so there is one loop, and serial is size one.
"""

import atexit
import math
import os
import sys
import time
from contextlib import contextmanager

import numpy as np

from mrefali.errors import REFUSALS, InputError, Stopped, one_line

#: What the launchers of MPICH and Intel MPI, Open MPI, and others say of how many processes they started.
LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")

#: The same of Slurm's srun; it stands in the environment of a shell that srun opened, too.
STEP_SIZE = "SLURM_STEP_NUM_TASKS"


def launched_size():
    """Number of processes that an MPI launcher says it started, 1 without one."""
    # who types at a terminal within a job step starts one process; what srun itself starts has no terminal
    names = LAUNCHER_SIZES if os.isatty(0) else (*LAUNCHER_SIZES, STEP_SIZE)
    sizes = {name: os.environ.get(name) or "1" for name in names}
    for name, size in sizes.items():
        if not (size.isascii() and size.isdigit()):
            raise InputError(f"{name}={size} in the environment, where an MPI launcher puts the number of processes it "
                             f"started, is no number: unset {name}")
    return max(map(int, sizes.values()))


class Serial:
    """One process that has it all."""

    rank, size = 0, 1
    is_root = True

    def share(self, n):
        """First and one past the last of the ``n`` particles of this rank."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def sum_into(self, array):
        """Add up ``array`` (int64) over all ranks, in place on every rank."""

    def gather(self, array):
        """Arrays of all ranks joined in order of rank, at the root; None elsewhere."""
        return array

    def from_root(self, value):
        """The root's ``value`` on every rank."""
        return value

    def all_values(self, value):
        """List of the ``value`` of every rank, on every rank."""
        return [value]

    def each(self, function, items):
        """List of what ``function`` makes of each of the items, on every rank; the ranks share the work.

        Nothing in the function may need another rank. What fails on several ranks is raised on the first of them alone.
        """
        return [function(item) for item in items]

    def barrier(self):
        """Wait until every rank is here."""

    def made_by_root(self, make):
        """What ``make()`` returns at the root, on every rank; what it refuses, all refuse.

        It may take long: the others wait without keeping a core busy.
        """
        with self.agreeing():
            try:
                made = make() if self.is_root else None
            finally:
                self.barrier()
        return self.from_root(made)

    def cores(self):
        """Cores that this process may use, and the number of ranks of this machine that share just these."""
        return len(os.sched_getaffinity(0)), 1

    def leads_machine(self):
        """Whether no rank below this one is on the same machine."""
        return True

    @contextmanager
    def agreeing(self):
        """What one rank refuses within, all refuse; nothing within may need another rank.

        All raise the exception of the first rank that has one; what a file does to it (OSError) is a refusal too.
        Where that is said by the root already, it has the attribute ``said_by_root``.
        """
        with _refusing():
            yield

    @contextmanager
    def ending_together(self):
        """An exception that ends this rank ends the others too, which would wait for it for ever."""
        yield


@contextmanager
def _refusing():
    try:
        yield
    except REFUSALS:
        raise
    except OSError as error:
        raise InputError(one_line(error)) from error


def _status(error):
    """With what status a process ends by an exception."""
    if isinstance(error, Stopped):
        return 128 + error.number
    return 130 if isinstance(error, KeyboardInterrupt) else 1


SERIAL = Serial()

#: Elements of an array that one reduction carries: in pieces of this size it is faster than whole.
REDUCED_AT_ONCE = 1 << 18


#: What a launcher needs to pass on the last words of a rank before it ends everything, in seconds.
FORWARDING_S = 0.5

#: What the root, which got the same signal, has to end everything before another rank does, in seconds.
ROOT_FIRST_S = 3.0

#: How often a rank that waits for a long time looks round, in seconds.
WAITING_S = 0.01


class Mpi(Serial):
    """The ranks of an mpi4py communicator; ``module`` is ``mpi4py.MPI``."""

    def __init__(self, communicator, module):
        self._communicator, self._mpi = communicator, module
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self.is_root = self.rank == 0
        self._refusal = None  # that all ranks agreed upon
        self._last_words = None  # on a signal, unless the root is heard

    def sum_into(self, array):
        flat = array.reshape(-1)
        for start in range(0, flat.size, REDUCED_AT_ONCE):
            piece = flat[start:start + REDUCED_AT_ONCE]
            total = np.empty_like(piece)
            self._communicator.Allreduce(piece, total, op=self._mpi.SUM)
            piece[:] = total

    def gather(self, array):
        # straight into one array: pickled, the pieces would be there three times
        lengths = self.all_values(len(array))
        row = array.shape[1:]
        joined = np.empty((sum(lengths), *row), array.dtype) if self.is_root else None
        # counted in these, 2^31 is far away
        item = self._mpi.BYTE.Create_contiguous(array.itemsize * math.prod(row)).Commit()
        try:
            self._communicator.Gatherv([np.ascontiguousarray(array), len(array), item], [joined, lengths, item])
        finally:
            item.Free()
        return joined

    def from_root(self, value):
        return self._communicator.bcast(value)

    def all_values(self, value):
        return self._communicator.allgather(value)

    def each(self, function, items):
        mine, problem = None, None
        try:
            mine = [function(item) for item in items[self.rank::self.size]]
        except Exception as error:
            problem = error
        shares = self.all_values(mine)
        if None in shares:
            if shares.index(None) == self.rank:
                raise problem
            self.barrier()  # for ever: the first that failed says why, and ends all
        return [shares[i % self.size][i // self.size] for i in range(len(items))]

    def barrier(self):
        request = self._communicator.Ibarrier()
        while not request.Test():  # who waits in a Barrier keeps a core busy
            time.sleep(WAITING_S)

    def cores(self):
        # those of other machines have cores of the same numbers
        everyone = self.all_values((os.uname().nodename, os.sched_getaffinity(0)))
        return len(os.sched_getaffinity(0)), everyone.count(everyone[self.rank])

    def leads_machine(self):
        return self.all_values(os.uname().nodename).index(os.uname().nodename) == self.rank

    @contextmanager
    def agreeing(self):
        problem = None
        try:
            with _refusing():
                yield
        except REFUSALS as error:
            problem = error
        everyone = self.all_values(problem)
        everyone[self.rank] = problem  # with its traceback
        self._refusal = next((p for p in everyone if p is not None), None)
        if self._refusal is not None:
            if not self.is_root:
                self._refusal.said_by_root = True
            raise self._refusal

    @contextmanager
    def ending_together(self):
        try:
            yield
        except BaseException as error:
            if self.size > 1 and error is not self._refusal:
                if isinstance(error, Stopped) and not self.is_root:
                    error.said_by_root, self._last_words = True, f"mrefali: rank {self.rank} was {error}\n"
                # not here and now: whoever called may say first what happened, and with what status it ends
                atexit.register(self._abort, _status(error))
            raise

    def _abort(self, status):
        if self._last_words:
            time.sleep(ROOT_FIRST_S)
            sys.stderr.write(self._last_words)
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(FORWARDING_S)
        self._communicator.Abort(status)


def mpi():
    """The communicator of all MPI ranks.

    Raises
    ------
    InputError
        mpi4py or an MPI library is missing, or the launcher belongs to another MPI than the library.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
        raise InputError(f"MPI=True needs mpi4py and an MPI library ({error}): "
                         "pip install 'mrefali[mpi]', or leave MPI off") from error
    communicator = MPI.COMM_WORLD
    if launched_size() > 1 and communicator.Get_size() == 1:
        raise InputError(f"the launcher started {launched_size()} processes but each finds itself alone: its MPI is "
                         "not the library that mpi4py loads; use the mpiexec that belongs to it")
    return Mpi(communicator, MPI)


def communicator(use_mpi):
    """``mpi()`` or ``SERIAL``; refuses N processes that would each do the same run."""
    if use_mpi:
        return mpi()
    if launched_size() > 1:
        raise InputError(f"MPI=False, but a launcher started {launched_size()} processes, which would all do the same "
                         "run: give --MPI (in Python MPI=True), or start one process")
    return SERIAL
