"""The main job on EMAN2's databases: the original's answer, written back, or into OUTDIR where that cannot be."""

import os
import re
from pathlib import Path

import golden
import numpy as np
import pytest
import small
from test_io_bdb import folder, forget_binding, raise_version  # noqa: F401
from test_io_hdf import contents

import mrefali
from mrefali import cli
from mrefali.io import BdbStack, open_stack, write_stack


@pytest.fixture
def databases(folder):  # noqa: F811
    """The golden databases in ``py2`` and ``py3``, and ``refs.hdf``, in the folder that is entered."""
    write_stack("refs.hdf", golden.load("typical").references)
    return folder


def run(*words, status=0):
    """The main job at the command line, which ends with this status."""
    assert cli.main(["mref_ali2d", *words]) == status


#: Options of a run that is quick, not good.
FEW = ["--ou=12", "--ir=11", "--maxit=1", "--vanished=keep"]

#: Poses of typical after one iteration are expected to agree to this, in px; headers hold float32.
SAME_SHIFT = 2e-3


def assert_originals(assign, poses, expected):
    """``expected`` has the columns assign, alpha, sx, sy, mirror."""
    theirs, alpha, sx, sy, mirror = expected.T
    np.testing.assert_array_equal(assign, theirs)
    np.testing.assert_array_equal(poses["mirror"], mirror)
    assert np.maximum(np.abs(poses["sx"] - sx), np.abs(poses["sy"] - sy)).max() < SAME_SHIFT
    assert np.abs((poses["alpha"] - alpha + 180) % 360 - 180).max() < 0.02


@pytest.mark.jit_only
def test_the_main_job_gives_the_originals_answer(databases, capsys):
    """What it writes into the golden database is what the original wrote there, and the averages are its own."""
    run("bdb:py3#stack", "refs.hdf", "out", "--ou=27", "--xr=3", "--yr=3", "--maxit=1")
    assert capsys.readouterr().err == ""
    expected = golden.load("typical").expected
    stack, original = open_stack("bdb:py3#stack"), BdbStack("bdb:py3_after#stack")
    assert_originals(stack.column("assign"), stack.poses(), expected["params_1"])
    poses = original.poses()
    assert_originals(stack.column("assign"), stack.poses(), np.stack(
        [original.column("assign"), *(poses[name] for name in ("alpha", "sx", "sy", "mirror"))], axis=1))
    averages = open_stack("out/aqm000.hdf").read(0, 3)
    assert np.abs(averages - expected["aqm000"]).max() < 0.01 * expected["aqm000"].std()
    assert not os.path.exists("out/poses.hdf")


@pytest.mark.jit_only
@pytest.mark.parametrize(("prepare", "reason"), [
    (raise_version, "bdb:py3#stack has version 10 of the format, but Berkeley DB 5 writes version 9 only"),
    (forget_binding, r"no Berkeley DB binding can be loaded .*: pip install 'mrefali\[bdb\]'"),
], ids=["version-10", "no-binding"])
def test_what_cannot_be_written_back_goes_into_outdir(databases, monkeypatch, capsys, prepare, reason):
    """And that is said before the run."""
    prepare(databases, monkeypatch, "stack")
    before = small.snapshot(databases / "py3")
    run("bdb:py3#stack", "refs.hdf", "out", "--ou=27", "--xr=3", "--yr=3", "--maxit=1")
    out, err = capsys.readouterr()
    assert re.fullmatch(f"mrefali: warning: the headers of bdb:py3#stack cannot be written back: {reason}; poses and "
                        "classes will go into out\n", err)
    log = Path("out/mrefali.log").read_text()
    assert log.index("cannot be written back") < log.index("iteration 0 (1 of 1)")
    assert "xform.align2d and assign in out/poses.hdf" in out
    assert small.snapshot(databases / "py3") == before
    expected, table = golden.load("typical").expected["params_1"], small.read_table("out/poses.csv")
    poses = open_stack("out/poses.hdf")
    assert_originals(poses.column("assign"), poses.poses(), expected)
    assert_originals(table["assign"], {name: np.array(table[name]) for name in table}, expected)
    np.testing.assert_array_equal(poses.read(0, 120), golden.load("typical").images)
    first, source = poses.header(0), BdbStack("bdb:py3#stack").header(0)
    assert first.keys() >= source.keys() - {"data_path"}
    run("out/poses.hdf", "out/aqm000.hdf", "next", *FEW)  # and a run goes on from there
    assert small.read_table("next/poses_before.csv")["assign"] == table["assign"]


@pytest.mark.parametrize("prepare", [raise_version, forget_binding])
def test_check_says_so_too(databases, monkeypatch, capsys, prepare):
    prepare(databases, monkeypatch, "stack")
    before = small.snapshot(databases)
    run("bdb:py3#stack", "refs.hdf", "out", *FEW, "--check")
    assert "the headers of bdb:py3#stack cannot be written back" in capsys.readouterr().err
    assert small.snapshot(databases) == before


def test_chosen_images_are_aligned_and_no_other_is_changed(databases, capsys):
    """``odd`` has a hole and an image of another size; keys 0, 3 and 4 can be used."""
    before = {key: BdbStack("bdb:py3#odd").header(row) for row, key in enumerate(BdbStack("bdb:py3#odd").keys)}
    run("bdb:py3#odd?0,3,4", "refs.hdf", "out", *FEW)
    assert len(small.read_table("out/poses.csv")["index"]) == 3
    chosen = open_stack("bdb:py3#odd?0,3,4")
    assert chosen.column("assign") == small.read_table("out/poses.csv")["assign"]
    after = {key: BdbStack("bdb:py3#odd").header(row) for row, key in enumerate(BdbStack("bdb:py3#odd").keys)}
    assert [key for key in after if "assign" in after[key]] == [0, 3, 4]
    assert str(after[1]) == str(before[1])
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("3 of 3 classes have fewer than four particles") == 1  # of three particles


def test_references_may_stand_in_a_database(databases, tmp_path):
    """The same as from a file of the same images; the database is only read."""
    write_stack("stack.hdf", golden.load("typical").images[:12], golden.load("typical").headers[:12])
    write_stack("same.hdf", golden.load("ctf").images[[4, 0]])
    before = small.snapshot(databases / "py2")
    run("stack.hdf", "bdb:py2#ctfstack?4,0", "out", *FEW)
    assert small.snapshot(databases / "py2") == before
    mrefali.header("stack.hdf", "xform.align2d", zero=True)
    run("stack.hdf", "same.hdf", "same", *FEW)
    for name in ("aqm000.hdf", "multi_ref.hdf"):
        assert contents(f"out/{name}") == contents(f"same/{name}")
    assert small.read_table("out/poses.csv") == small.read_table("same/poses.csv")


@pytest.mark.jit_only
def test_a_run_on_a_database_is_undone_by_one_command(databases):
    before = BdbStack("bdb:py3#stack").column("xform.align2d")
    run("bdb:py3#stack", "refs.hdf", "out", "--ou=27", "--xr=3", "--yr=3", "--maxit=1")
    assert not np.array_equal(BdbStack("bdb:py3#stack").column("xform.align2d"), before)
    assert cli.main(["header", "bdb:py3#stack", "--params=xform.align2d", "--import=out/poses_before.csv"]) == 0
    np.testing.assert_array_equal(BdbStack("bdb:py3#stack").column("xform.align2d"), before)


@pytest.mark.parametrize(("words", "message"), [
    (["bdb:py3#odd", "bdb:py3#ctfstack?0,1"], "bdb:py3#odd has no image 2 of 0 to 4"),
    (["bdb:py3#odd?0,1", "refs.hdf"], r"bdb:py3#odd\?0,1 has images of 2 sizes, .* under key"),
    (["bdb:py3#ctfstack", "bdb:py3#odd?1,3"], r"bdb:py3#odd\?1,3 has images of 2 sizes"),
    (["bdb:py3_after#stack", "bdb:py3#ctfstack?0,1"], "stack_64x64x1, with the pixels of keys 0, 1"),
    (["bdb:py3#none", "refs.hdf"], r"py3/EMAN2DB/none\.bdb"),
])
def test_what_cannot_be_aligned_is_refused_by_its_keys(databases, capsys, words, message):
    before = small.snapshot(databases)
    run(*words, "out", "--ou=27", status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert small.snapshot(databases) == before
