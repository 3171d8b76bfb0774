"""What a run takes of memory: the estimate, and the size of a block under a limit. Imports errors only."""

import os
import re

from mrefali.errors import InputError

#: Pixels read and searched at a time, as bytes of float32, where no limit asks for fewer.
BLOCK_BYTES = 64 << 20

#: Blocks in memory at a time: the one that is searched, its particles moved by their poses, and the next one.
BLOCKS_HELD = 3

#: Of a particle: its poses, classes and peaks before and after, and what is made of them for tables and headers.
PARTICLE_BYTES = 200

#: Where classes are of limited size: of a particle and a reference the peak; of a particle what is made of its peaks;
#: of two references what it costs to go from one to the other; and what a search keeps before peaks are taken from it.
PEAK_BYTES, WEIGHED_BYTES, MOVE_BYTES, FOUND_BYTES = 4, 150, 64, 12 << 20

#: Of a pixel of a reference: ring spectra and what they are made of, sums of two halves, averages.
REFERENCE_PIXEL_BYTES = 48

#: What the search works in, and libraries take when they are first used.
WORK_BYTES = 24 << 20

#: The units of a size; B and iB may follow.
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(name, value):
    """Bytes of a size such as 4GB or 500 MB, a power of 1024 each; ``name`` is whose it is, for the error.

    Parameters
    ----------
    name : str
    value : str or int
        A whole number is bytes.

    Returns
    -------
    int

    Raises
    ------
    InputError
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*", str(value), flags=re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if size < 1:
        raise InputError(f"{name}={value!s:.40} is not allowed: give a size above 0 such as 500MB or 4GB")
    return size


def resident_bytes():
    """Memory that this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def without_blocks(n_particles, n_references, box):
    """Bytes that a run takes at its peak beside blocks of pixels, all that is loaded by now included.

    Parameters
    ----------
    n_particles, n_references : int
    box : int, px
    """
    return (resident_bytes() + WORK_BYTES + PARTICLE_BYTES * n_particles
            + REFERENCE_PIXEL_BYTES * n_references * box**2)


def of_peaks(n_particles, n_references, n_ranks):
    """Bytes that the root takes to assign all particles together: its own peaks, and those of all ranks.

    Parameters
    ----------
    n_particles, n_references, n_ranks : int
    """
    held = n_particles if n_ranks == 1 else n_particles + n_particles // n_ranks
    queued = n_particles * n_references // 2
    return (PEAK_BYTES * held * n_references + queued + WEIGHED_BYTES * n_particles + MOVE_BYTES * n_references**2
            + FOUND_BYTES)


def block_bytes(limit, others, box):
    """Pixels to be read at a time, as bytes of float32.

    Parameters
    ----------
    limit : int or None
        Bytes that this process may take.
    others : int
        What :func:`without_blocks` says.
    box : int, px

    Raises
    ------
    InputError
        If not even one image would stay within the limit.
    """
    if limit is None:
        return BLOCK_BYTES
    image = 4 * box**2
    if limit < others + BLOCKS_HELD * image:
        needed = -(-(others + BLOCKS_HELD * image) // UNITS["M"]) + 1
        raise InputError(f"max_memory={limit / UNITS['M']:.0f}MB is not enough: this run takes {needed} MB a process "
                         f"even with one image at a time; give --max_memory={needed}MB or more, or fewer references")
    return min(BLOCK_BYTES, (limit - others) // BLOCKS_HELD)
