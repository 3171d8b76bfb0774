"""What stands in an output directory when a run fails."""

import logging
import os
import re

import numpy as np
import pytest

from mrefali import outdir
from mrefali.geometry import make_poses
from mrefali.outdir import OutputDirectory


@pytest.mark.parametrize("error", [ValueError("first\nsecond"), KeyboardInterrupt(), OSError(28, "No space", "x.hdf")])
def test_what_ends_a_run_is_the_last_line_of_its_log(tmp_path, capfd, error):
    def run():
        with OutputDirectory(str(tmp_path / "out"), None) as output:
            output.has_begun()
            logging.getLogger("mrefali.details").debug("at work")
            raise error

    with pytest.raises(type(error), match="^" + re.escape(str(error)) + "$"):
        run()
    first, last = (tmp_path / "out" / "mrefali.log").read_text("utf-8").splitlines()
    assert first.endswith("DEBUG   at work")
    text = " ".join(str(error).split())
    assert re.search(rf" ERROR +the run ended by {type(error).__name__}: {re.escape(text)}$", last)
    assert capfd.readouterr() == ("", "")


def test_a_run_that_ends_well_logs_no_error(tmp_path):
    with OutputDirectory(str(tmp_path / "out"), None):
        pass
    assert (tmp_path / "out" / "mrefali.log").read_text("utf-8") == ""


def test_the_log_takes_any_name_whatever_the_locale(tmp_path, monkeypatch):
    with OutputDirectory(str(tmp_path / "out"), None):
        logging.getLogger("mrefali").warning("stack μ\udcff.hdf")
    assert (tmp_path / "out" / "mrefali.log").read_text("utf-8").endswith("stack μ\\udcff.hdf\n")


def test_a_table_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    class Writer:
        def __init__(self, file):
            self._file = file

        def writerow(self, row):
            self._file.write("index,assign")
            self._file.flush()
            raise Interrupted("here")

    monkeypatch.setattr(outdir.csv, "writer", Writer)
    def run():
        with OutputDirectory(str(tmp_path / "out"), None) as output:
            output.has_begun()
            output.write_start(np.array([0, 1]), make_poses([0.0, 1.0]))

    with pytest.raises(Interrupted, match="here"):
        run()
    assert os.listdir(tmp_path / "out") == ["mrefali.log"]


def test_parameters_that_cannot_be_written_leave_no_half_file(tmp_path):
    def run():
        with OutputDirectory(str(tmp_path / "o"), None) as output:
            output.has_begun()
            output.write_parameters({"fine": 1, "odd": object()})

    with pytest.raises(TypeError, match="not JSON serializable"):
        run()
    assert os.listdir(tmp_path / "o") == ["mrefali.log"]


def test_a_run_that_fails_before_it_began_leaves_no_directory(tmp_path):
    def run():
        with OutputDirectory(str(tmp_path / "out"), None) as output:
            output.begin({"fine": 1}, None, make_poses([0.0]))
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run()
    assert os.listdir(tmp_path) == []


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    def run():
        with OutputDirectory(str(tmp_path / "out"), None) as output:
            output.has_begun()
            output._log.close()
            output._log.stream = open("/dev/full", "w")
            logging.getLogger("mrefali").warning("at work")

    with pytest.raises(OSError, match="No space"):
        run()
