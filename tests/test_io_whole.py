"""The rule for new files, which all commands that write one share; files that HDF5 has not closed."""

import gc
import os
import sys

import h5py
import numpy as np
import pytest
from test_io_hdf import open_folder, ordinary_user  # noqa: F401

from mrefali.errors import InputError
from mrefali.geometry import identity_poses
from mrefali.io import check_new_file, open_stack, write_stack


def test_a_new_name_in_a_folder_that_may_be_written_is_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.hdf", "A.HDF", tmp_path / "a.hdf"):
        check_new_file(name, ".hdf")
    check_new_file("a")
    assert os.listdir() == []


def test_another_ending_is_refused():
    with pytest.raises(InputError, match=r"^a\.mrcs is not allowed: give a file name that ends in \.hdf$"):
        check_new_file("a.mrcs", ".hdf")


@pytest.mark.parametrize("make", [os.mkdir, lambda path: open(path, "w").close(),
                                  lambda path: os.symlink("nowhere", path)], ids=["directory", "file", "dead-link"])
def test_a_name_that_is_taken_is_refused(tmp_path, make):
    make(tmp_path / "a.hdf")
    with pytest.raises(FileExistsError, match=r"/a\.hdf exists: give another name, or remove it first$"):
        check_new_file(tmp_path / "a.hdf", ".hdf")


def test_a_missing_folder_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError,
                       match=rf"^no/a\.hdf cannot be made: there is no folder {tmp_path}/no, make it first$"):
        check_new_file("no/a.hdf", ".hdf")


def test_a_folder_that_may_not_be_written_is_refused(open_folder):  # noqa: F811
    open_folder.chmod(0o555)
    with ordinary_user(), pytest.raises(PermissionError, match=r"a\.hdf cannot be made: no permission to write into "
                                                               rf"{open_folder}, give a place you may write to$"):
        check_new_file(open_folder / "a.hdf")


def write_new(path):
    write_stack(path.with_name("new.hdf"), np.zeros((3, 16, 16), np.float32))


def write_headers(path):
    open_stack(path).write_columns({"xform.align2d": identity_poses(3), "assign": np.arange(3)}, "journal")


def write_headers_of_a_copy(path):
    open_stack(path).write_columns({"xform.align2d": identity_poses(3), "assign": np.arange(3)}, "copy")


@pytest.mark.parametrize("write", [write_new, write_headers, write_headers_of_a_copy])
def test_a_file_that_a_signal_left_open_to_hdf5_is_forgotten_without_a_word(tmp_path, monkeypatch, write):
    path, unraisable, leave = tmp_path / "stack.hdf", [], h5py.File.__exit__
    write_stack(path, np.ones((3, 16, 16), np.float32))
    before = path.read_bytes()

    def interrupted(file, *error):
        if file.mode == "r":
            return leave(file, *error)
        raise KeyboardInterrupt

    monkeypatch.setattr(h5py.File, "__exit__", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(KeyboardInterrupt) as caught:
        write(path)
    del caught  # and with it the frames that hold the file
    gc.collect()
    assert unraisable == []
    assert os.listdir(tmp_path) == ["stack.hdf"]
    assert path.read_bytes() == before
