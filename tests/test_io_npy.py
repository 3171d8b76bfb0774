"""Stacks in numpy's files."""

import numpy as np
import pytest
from formats import IMAGES

from mrefali.errors import InputError
from mrefali.io import NpyStack, open_stack
from mrefali.io.npy import write_npy


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4", np.int16])
def test_images_are_read(tmp_path, dtype):
    np.save(tmp_path / "a.npy", IMAGES.astype(dtype))
    stack = open_stack(tmp_path / "a.npy")
    assert isinstance(stack, NpyStack)
    assert (stack.n_images, stack.box, stack.pixel_size_A, stack.has_poses()) == (7, 16, None, False)
    np.testing.assert_array_equal(stack.read_at([3, 1]), IMAGES.astype(dtype).astype(np.float32)[[3, 1]])
    assert stack.read(0, 1).dtype == np.float32
    assert stack.poses().tolist() == [(0, 0, 0, 0)] * 7


def test_one_image_and_an_array_in_columns_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(IMAGES[0]))
    np.testing.assert_array_equal(open_stack(tmp_path / "a.npy").read(0, 1), IMAGES[:1])


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((2, 4, 5)), r"holds float64 of the shape \(2, 4, 5\)"), (np.zeros((0, 4, 4)), "shape"),
    (np.zeros((2, 4, 4), complex), "holds complex128"), (np.zeros(3, [("a", "f4")]), "holds"),
    (np.array([[None]]), r"is no \.npy file that can be read \(Array can't be memory-mapped: Python objects")])
def test_what_is_no_stack_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        open_stack(tmp_path / "a.npy")


@pytest.mark.parametrize("n_bytes", [7, 60, 1000])
def test_a_file_cut_short_is_refused(tmp_path, n_bytes):
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:n_bytes])
    with pytest.raises(InputError, match=r"a\.npy is no \.npy file that can be read"):
        open_stack(tmp_path / "a.npy")


def test_numpy_reads_what_is_written(tmp_path):
    write_npy(tmp_path / "a.npy", [IMAGES[:4], IMAGES[4:]], 7, 16)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), IMAGES)


def test_what_is_beyond_the_array_is_not_lost_without_a_word(tmp_path):
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, IMAGES[:4])
        np.save(file, IMAGES[4:])
    with pytest.raises(InputError, match=r"two.npy has 3200 bytes beyond the array of shape \(4, 16, 16\)"):
        open_stack(tmp_path / "two.npy")
