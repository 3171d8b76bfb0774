"""What a stack holds, as data."""

import numpy as np
import pytest
import small

import mrefali
from mrefali.io import open_stack, write_stack


def test_a_stack_without_classes(tmp_path):
    stack, _ = small.write(tmp_path)
    found = mrefali.info(stack)
    assert (found.path, found.n_images, found.box, found.pixel_size_A) == (stack, small.N_PARTICLES, small.BOX, 2.5)
    assert (found.obstacle, found.classes, found.averages) == (None, None, None)
    assert found.headers == open_stack(stack).header_names()


def test_classes_are_counted_in_order_and_so_is_who_has_none(tmp_path):
    path = tmp_path / "stack.hdf"
    headers = [{"assign": value} for value in (7, 0, 7, 2)] + [{}, {"assign": "x"}]
    write_stack(path, np.random.default_rng(0).random((6, 16, 16)), headers)
    found = mrefali.info(path)
    assert list(found.classes.items()) == [(0, 1), (2, 1), (7, 2)]
    assert (found.without_class, found.not_a_class) == (1, 1)
    assert found.path == str(path)


def test_averages_have_their_counts(tmp_path):
    path = str(tmp_path / "aqm000.hdf")
    write_stack(path, np.random.default_rng(0).random((3, 16, 16)), [{"ave_n": 5}, {}, {"ave_n": 0}])
    assert mrefali.info(path).averages == [5, None, 0]


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.hdf does not exist"):
        mrefali.info(str(tmp_path / "none.hdf"))
