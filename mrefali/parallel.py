"""The communicator: ranks that share the particles. The only file that imports mpi4py; imports no other of ours
but errors.

``SERIAL`` and ``mpi()`` have the same methods, so there is one loop, and serial is size one.
"""

import os

import numpy as np

from mrefali.errors import InputError

#: What the launchers of MPICH and Intel MPI, Open MPI, and Slurm's srun say of how many processes they started.
LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")


def launched_size():
    """Number of processes that an MPI launcher says it started, 1 without one."""
    return max(int(os.environ.get(name) or 1) for name in LAUNCHER_SIZES)


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


SERIAL = Serial()

#: Elements of an array that one reduction carries: in pieces of this size it is faster than whole.
REDUCED_AT_ONCE = 1 << 18


class Mpi(Serial):
    """The ranks of an mpi4py communicator."""

    def __init__(self, communicator, sum_operation):
        self._communicator, self._sum = communicator, sum_operation
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self.is_root = self.rank == 0

    def sum_into(self, array):
        flat = array.reshape(-1)
        for start in range(0, flat.size, REDUCED_AT_ONCE):
            piece = flat[start:start + REDUCED_AT_ONCE]
            total = np.empty_like(piece)
            self._communicator.Allreduce(piece, total, op=self._sum)
            piece[:] = total

    def gather(self, array):
        pieces = self._communicator.gather(array)
        return np.concatenate(pieces) if self.is_root else None

    def from_root(self, value):
        return self._communicator.bcast(value)

    def all_values(self, value):
        return self._communicator.allgather(value)


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
    return Mpi(communicator, MPI.SUM)


def communicator(use_mpi):
    """``mpi()`` or ``SERIAL``; refuses N processes that would each do the same run."""
    if use_mpi:
        return mpi()
    if launched_size() > 1:
        raise InputError(f"MPI=False, but a launcher started {launched_size()} processes, which would all do the same "
                         "run: give --MPI (in Python MPI=True), or start one process")
    return SERIAL
