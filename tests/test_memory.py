"""Sizes as they are written, and the block that a limit leaves."""

import pytest

from mrefali import memory
from mrefali.errors import InputError
from mrefali.memory import BLOCK_BYTES, BLOCKS_HELD, block_bytes, parse_size, resident_bytes, without_blocks


@pytest.mark.parametrize(("text", "size"), [
    ("4GB", 4 << 30), ("4G", 4 << 30), ("4GiB", 4 << 30), ("500 MB", 500 << 20), ("1.5g", 3 << 29), ("2TB", 2 << 40),
    ("800000k", 800000 << 10), ("123456789", 123456789), (123456789, 123456789), (" 7b ", 7)])
def test_sizes_are_read(text, size):
    assert parse_size("max_memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 X", "-4GB", "0", "0GB", "4GBB", "4,5GB", "1e9", "nan", True, 4.5e300,
                                  "9" * 400, "٤GB", "0.2"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="^max_memory=.* is not allowed: give a size above 0 such as 500MB or 4GB$"):
        parse_size("max_memory", text)


def test_without_a_limit_a_block_is_as_large_as_is_good():
    assert block_bytes(None, 10**12, 64) == BLOCK_BYTES


def test_a_limit_holds_for_all_blocks_together_and_never_makes_them_larger():
    image = 4 * 64**2
    assert block_bytes(1000 + 7 * BLOCKS_HELD * image, 1000, 64) == 7 * image
    assert block_bytes(1 << 50, 1000, 64) == BLOCK_BYTES


def test_a_limit_without_room_for_one_image_is_refused_with_one_that_has_it():
    with pytest.raises(InputError, match=r"^max_memory=100MB is not enough: .* give --max_memory=302MB or more"):
        block_bytes(100 << 20, 300 << 20, 64)
    assert block_bytes(302 << 20, 300 << 20, 64) > 4 * 64**2


def test_memory_grows_with_particles_and_with_the_pixels_of_references(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1000)
    assert without_blocks(10, 3, 8) == (1000 + memory.WORK_BYTES + 10 * memory.PARTICLE_BYTES
                                        + 3 * 64 * memory.REFERENCE_PIXEL_BYTES)


def test_the_root_holds_its_own_peaks_and_under_mpi_those_of_all_beside_them():
    alone, shared = (memory.of_peaks(1_000_000, 100, n_ranks) for n_ranks in (1, 4))
    assert shared - alone == 250_000 * 100 * memory.PEAK_BYTES
    # what a process took beside its peaks, of 300,000 particles and 50 classes of which one was everybody's favourite
    assert 117 << 20 < memory.of_peaks(300_000, 50, 1) < 130 << 20


def test_resident_memory_follows_what_is_taken():
    before = resident_bytes()
    taken = bytearray(b"x") * (64 << 20)
    assert resident_bytes() - before > 60 << 20
    del taken
