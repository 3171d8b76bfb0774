"""The main job on files: what it writes back, what it leaves alone, every file of OUTDIR, and what it says."""

import inspect
import json
import logging
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pexpect
import pytest
import small
from test_io_hdf import contents
from threadpoolctl import threadpool_info

import mrefali
from mrefali import average, cli, ctf, geometry, memory, outdir, warmup
from mrefali.checks import use_threads
from mrefali.errors import InputError
from mrefali.io import open_stack, write_stack
from mrefali.particles import Particles
from mrefali.simulation import simulate

SCRIPTS = Path(sys.executable).parent
OURS = ("EMAN.xform.align2d", "EMAN.assign")


class Run:
    """A finished run of the small job."""

    def __init__(self, folder, maxit=2, references=None, **options):
        self.stack, self.refs = small.write(folder)
        if references is not None:
            write_stack(self.refs, references)
        self.before = contents(self.stack)
        self.outdir = folder / "out"
        mrefali.mref_ali2d(self.stack, self.refs, str(self.outdir), maxit=maxit, **small.OPTIONS | options)
        self.after = contents(self.stack)

    def table(self, name):
        return small.read_table(self.outdir / name)

    def poses(self, name="poses.csv"):
        table = self.table(name)
        return geometry.make_poses(*(np.array(table[column]) for column in ("alpha", "sx", "sy", "mirror")))

    def log(self):
        return (self.outdir / "mrefali.log").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def files(tmp_path):
    """Stack, references and an OUTDIR to be, as str."""
    return *small.write(tmp_path), str(tmp_path / "out")


def classes(run, iteration):
    """The rows of history.csv of one iteration, a dict of lists."""
    history = run.table("history.csv")
    rows = [i for i, number in enumerate(history["iteration"]) if number == iteration]
    return {name: [column[i] for i in rows] for name, column in history.items()}


# ---- the call ----------------------------------------------------------------------------------------------

def test_the_call_is_the_originals():
    parameters = inspect.signature(mrefali.mref_ali2d).parameters
    empty = inspect.Parameter.empty
    original = [(name, p.default) for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert original == [
        ("stack", empty), ("refim", empty), ("outdir", empty), ("maskfile", None), ("ir", 1), ("ou", -1), ("rs", 1),
        ("xrng", 0), ("yrng", 0), ("step", 1), ("center", 1), ("maxit", 0), ("CTF", False), ("snr", 1.0),
        ("user_func_name", "ref_ali2d"), ("rand_seed", 1000), ("MPI", False)]
    assert list(parameters)[:len(original)] == [name for name, _ in original]
    ours = list(parameters.values())[len(original):]
    assert {p.name for p in ours} >= {"threads", "quiet", "check"}
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not empty for p in ours)


def test_the_command_has_the_same_parameters_and_its_own_default_of_maxit():
    command = {p.name: p.default for p in inspect.signature(cli.mref_ali2d).parameters.values()}
    python = inspect.signature(mrefali.mref_ali2d).parameters
    python_names = {"refs": "refim", "mask": "maskfile", "xr": "xrng", "yr": "yrng", "ts": "step",
                    "function": "user_func_name"}
    defaults = {name: python[python_names.get(name, name)].default for name in command}
    assert len(command) == len(python)
    assert defaults | {"maxit": 10} == command


# ---- the stack afterwards ----------------------------------------------------------------------------------

def test_the_headers_hold_the_poses_and_classes_of_poses_csv(run):
    stack, table = open_stack(run.stack), run.table("poses.csv")
    assert stack.column("assign") == table["assign"]
    np.testing.assert_array_equal(stack.column("xform.align2d"),
                                  geometry.to_matrices(run.poses()).astype(np.float32))


def test_pixels_and_headers_that_are_not_ours_keep_their_bits(run):
    assert {key[1] for key in run.before} > {"EMAN.ctf", "EMAN.quality", "EMAN.ptcl_source_image", "EMAN.mean"}
    assert {key: value for key, value in run.after.items() if key[1] not in OURS} == {
        key: value for key, value in run.before.items() if key[1] not in OURS}
    changed = {key for key in run.after if run.after[key] != run.before.get(key)}
    assert changed == {(f"MDF/images/{i}", name) for i in range(small.N_PARTICLES) for name in OURS}


def test_the_references_are_only_read(files):
    before = Path(files[1]).read_bytes()
    mrefali.mref_ali2d(*files, maxit=1, **small.OPTIONS)
    assert Path(files[1]).read_bytes() == before


# ---- OUTDIR ------------------------------------------------------------------------------------------------

def test_the_output_directory_holds_these_files_and_no_other(run):
    assert sorted(os.listdir(run.outdir)) == [
        "aqm000.hdf", "aqm001.hdf", "checkpoint", "drm0000000.txt", "drm0000001.txt", "drm0010000.txt",
        "drm0010001.txt",
        "history.csv", "mrefali.log", "multi_ref.hdf", "parameters.json", "poses.csv", "poses_before.csv",
        "report.html"]


def test_poses_before_holds_where_the_search_began(run):
    began = run.poses("poses_before.csv")
    assert list(run.table("poses_before.csv")) == ["index", "alpha", "sx", "sy", "mirror"]  # no class before
    np.testing.assert_array_equal(began["mirror"], small.poses()["mirror"])
    for field in ("alpha", "sx", "sy"):
        np.testing.assert_allclose(began[field], small.poses()[field], rtol=0, atol=1e-4)


def test_poses_holds_every_particle_once(run):
    table = run.table("poses.csv")
    assert list(table) == ["index", "assign", "alpha", "sx", "sy", "mirror", "peak", "changed"]
    assert table["index"] == list(range(small.N_PARTICLES))
    assert set(table["mirror"]) == {0, 1}
    assert set(table["assign"]) == {0, 1}
    assert min(table["peak"]) > 0
    assert sum(table["changed"]) == sum(classes(run, 1)["changed"])


def test_history_has_one_row_an_iteration_and_class(run):
    history = run.table("history.csv")
    assert list(history) == [
        "iteration", "class", "count", "changed", "resolution_0.5_px", "resolution_0.143_px", "filter_cutoff",
        "filter_falloff", "center_x", "center_y", "criterion", "mean_peak", "like", "likeness", "detail",
        "detail_error"]
    assert (history["iteration"], history["class"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert classes(run, 0)["changed"] == classes(run, 0)["count"]  # nobody had a class before
    assert classes(run, 1)["count"] == np.bincount(np.array(run.table("poses.csv")["assign"], int)).tolist()
    assert all(0.12 <= cutoff <= 0.4 for cutoff in history["filter_cutoff"])
    assert all(0 < falloff <= 0.2 for falloff in history["filter_falloff"])


def test_changed_counts_those_whose_class_is_another(tmp_path, run):
    """References that favour one class at first make particles change in the second iteration."""
    views = small.references() * np.array([1.0, 0.75], np.float32)[:, None, None]
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (Run(folder, maxit, views) for maxit, folder in enumerate(folders, start=1))
    before, after = (np.array(r.table("poses.csv")["assign"], int) for r in (one, two))
    changed = before != after
    assert changed.any()
    assert two.table("poses.csv")["changed"] == changed.tolist()
    assert classes(two, 1)["changed"] == np.bincount(after[changed], minlength=2).tolist()


def test_the_centre_is_the_mean_shift_of_the_members(tmp_path):
    """``center=-1``: the pose that is kept is the one found minus this mean, so the mean that is left is zero."""
    run = Run(tmp_path, maxit=1)
    poses, assign = run.poses(), np.array(run.table("poses.csv")["assign"])
    sign = np.where(poses["mirror"] == 1, -1.0, 1.0)
    centre = np.array([classes(run, 0)["center_x"], classes(run, 0)["center_y"]]).T
    for k in range(2):
        assert np.abs(centre[k]).max() > 0.01
        left = [(sign * poses["sx"])[assign == k].mean(), poses["sy"][assign == k].mean()]
        np.testing.assert_allclose(left, 0, atol=1e-9)


def test_resolutions_are_where_the_frc_file_crosses(run):
    for k in range(2):
        frequency, frc, _ = np.loadtxt(run.outdir / f"drm001{k:04d}.txt").T
        for threshold, name in ((0.5, "resolution_0.5_px"), (0.143, "resolution_0.143_px")):
            i = np.flatnonzero(frc[1:] < threshold)[0] + 1
            assert i > 1
            crossing = np.interp(-threshold, -frc[i - 1:i + 1], frequency[i - 1:i + 1])
            assert classes(run, 1)[name][k] == pytest.approx(1 / crossing, rel=1e-4)


def test_criterion_is_that_of_the_averages_written(run):
    core = geometry.disc(small.BOX, 6)
    for iteration in range(2):
        averages = open_stack(run.outdir / f"aqm{iteration:03d}.hdf").read(0, 2)
        assert classes(run, iteration)["criterion"] == [average.criterion(averages, core)] * 2


def test_averages_know_their_members_and_pixel_size(run):
    stack = open_stack(run.outdir / "aqm001.hdf")
    assign = np.array(run.table("poses.csv")["assign"])
    assert stack.column("ave_n") == classes(run, 1)["count"]
    assert stack.column("apix_x") == [small.PIXEL_SIZE_A] * 2
    for k, members in enumerate(stack.column("members")):
        np.testing.assert_array_equal(members, np.flatnonzero(assign == k))


def test_multi_ref_is_the_last_averages(run):
    assert contents(run.outdir / "multi_ref.hdf") == contents(run.outdir / "aqm001.hdf")
    assert contents(run.outdir / "multi_ref.hdf") != contents(run.outdir / "aqm000.hdf")


def test_parameters_holds_every_option_what_it_came_to_and_the_versions(tmp_path):
    run = Run(tmp_path, maxit=1, ou=-1, ir=2, rs=2, xrng=0, yrng=0, step=0.5, rand_seed=7, threads=1)
    parameters = json.loads((run.outdir / "parameters.json").read_text())
    assert parameters.keys() >= inspect.signature(mrefali.mref_ali2d).parameters.keys()
    expected = {"stack": run.stack, "refim": run.refs, "outdir": str(run.outdir), "maskfile": None, "ou": -1, "ir": 2,
                "rs": 2, "step": 0.5, "center": -1, "maxit": 1, "rand_seed": 7, "threads": 1, "outer_radius": 8,
                "inner_radius": 2, "n_particles": 24, "n_references": 2, "box": 20, "pixel_size_A": 2.5, "ranks": 1,
                "threads_used": 1, "mrefali": mrefali.__version__, "numba": numba.__version__,
                "numpy": np.__version__}
    assert {name: parameters[name] for name in expected} == expected


def test_the_log_holds_parameters_ranges_counts_and_criteria(run):
    log = run.log()
    for name, value in json.loads((run.outdir / "parameters.json").read_text()).items():
        assert f" {name}: {value}\n" in log
    assert "rings 1 to 6 px in steps of 1" in log
    assert "search for a centred particle: x -1 to 1 px, y -1 to 1 px, in steps of 1 px" in log
    history = run.table("history.csv")
    for k, count, cutoff in zip(history["class"], history["count"], history["filter_cutoff"], strict=True):
        assert f"class {k:.0f}: {count:.0f} particles; filter cutoff {cutoff:.3f}" in log
    for iteration in range(2):
        criterion = classes(run, iteration)["criterion"][0]
        assert f"iteration {iteration} ({iteration + 1} of 2): criterion {criterion:.7g}" in log


# ---- the course of a run -----------------------------------------------------------------------------------

@pytest.mark.jit_only
def test_a_run_with_twice_as_many_references_as_views_ends_with_a_warning_that_names_the_pairs(tmp_path, capsys):
    """Four views, each a reference twice, the second of them turned or mirrored."""
    simulate(tmp_path / "stack.hdf", 400, 4, 32, 0.5, 2.0, seed=1)
    views = mrefali.open_stack(tmp_path / "stack_views.hdf").read(0, 4)
    again = np.stack([views[0, :, ::-1], *np.rot90(views[1:], 1, (1, 2))])
    references = np.concatenate([views, again]) + np.random.default_rng(0).normal(0, 0.2 * views.std(), (8, 32, 32))
    references = references.astype(np.float32)
    average.normalize_particles(references, geometry.disc(32, 13))
    mrefali.write_stack(tmp_path / "refs.hdf", references)
    out = tmp_path / "out"
    words = [str(tmp_path / "stack.hdf"), str(tmp_path / "refs.hdf"), str(out), "--ou=13", "--xr=2", "--yr=2"]
    assert cli.main(["mref_ali2d", *words, "--maxit=3", "--quiet"]) == 0
    said, = [line for line in capsys.readouterr().err.splitlines() if "same view" in line]
    assert said.startswith("mrefali: warning: Classes show the same view: 0 and 4; 1 and 5; 2 and 6; 3 and 7. Aligned ")
    assert said.endswith(f"mrefali select {out} one.star --classes=0,4.")
    assert re.search(r"class 0: \d+ particles; .*; mean peak [\d.]+; like class 4 \([01]\.\d\d\); detail [\d.]+$",
                     (out / "mrefali.log").read_text(), flags=re.MULTILINE)


def test_a_run_goes_on_from_the_last_averages_and_headers(tmp_path, run):
    """1 + 1 iterations find what 2 in one go find, but for what float32 headers round."""
    first = Run(tmp_path, maxit=1)
    out = tmp_path / "more"
    mrefali.mref_ali2d(first.stack, str(first.outdir / "aqm000.hdf"), str(out), maxit=1, **small.OPTIONS)
    before, found = small.read_table(out / "poses_before.csv"), small.read_table(out / "poses.csv")
    left = first.table("poses.csv")
    assert before["assign"] == left["assign"]
    np.testing.assert_allclose(before["sx"], left["sx"], atol=1e-5)
    whole = run.table("poses.csv")
    assert (found["assign"], found["mirror"]) == (whole["assign"], whole["mirror"])
    np.testing.assert_allclose(found["alpha"], whole["alpha"], rtol=0, atol=0.01)
    np.testing.assert_allclose(found["sx"], whole["sx"], rtol=0, atol=1e-3)


def test_auto_stop_ends_with_the_iteration_whose_criterion_falls_and_keeps_it(tmp_path):
    run = Run(tmp_path, maxit=0)
    criteria = run.table("history.csv")["criterion"][::2]
    assert 2 < len(criteria) < 10
    assert (np.diff(criteria[:-1]) >= 0).all()
    assert criteria[-1] < criteria[-2]
    last = open_stack(run.outdir / f"aqm{len(criteria) - 1:03d}.hdf")
    np.testing.assert_array_equal(last.read(0, 2), open_stack(run.outdir / "multi_ref.hdf").read(0, 2))
    fixed = Run(_folder(tmp_path, "fixed"), maxit=len(criteria))
    assert fixed.table("poses.csv") == run.table("poses.csv")


def test_a_class_that_vanishes_is_replaced_by_the_particle_drawn(tmp_path):
    """The negative of a view attracts nobody."""
    run = Run(tmp_path, maxit=1, references=np.stack([*small.references(), -small.references()[0]]), rand_seed=11)
    averages = open_stack(run.outdir / "aqm000.hdf")
    drawn = random.Random(11).randint(0, small.N_PARTICLES - 1)
    members = averages.column("members")
    assert averages.column("ave_n") == [*classes(run, 0)["count"][:2], 0]
    assert members[2] == drawn
    np.testing.assert_array_equal(np.sort(np.concatenate(members[:2])), np.arange(small.N_PARTICLES))
    particle = small.particles()[[drawn]]
    average.normalize_particles(particle, geometry.disc(small.BOX, 6))
    np.testing.assert_array_equal(averages.read(2, 3), particle)
    assert sorted(file.name for file in run.outdir.glob("drm*")) == ["drm0000000.txt", "drm0000001.txt"]
    assert [row[2] for row in list(classes(run, 0).values())[4:10]] == [None] * 6
    assert f"class 2: vanished with 0 particles; particle {drawn} replaces it" in run.log()
    assert 2 not in run.table("poses.csv")["assign"]


def test_a_small_class_keeps_its_true_count_though_it_vanished(tmp_path):
    """A class of one to three particles: ave_n counts them, members names the drawn particle alone."""
    references = np.stack([*small.references(), 0.01 * small.particles()[4]])
    run = Run(tmp_path, maxit=3, references=references, center=0, rand_seed=3)
    history = run.table("history.csv")
    small_ones = [(int(i), int(k), count) for i, k, count in zip(
        history["iteration"], history["class"], history["count"], strict=True) if 0 < count < 4]
    assert small_ones
    for iteration, k, count in small_ones:
        averages = open_stack(run.outdir / f"aqm{iteration:03d}.hdf")
        assert averages.column("ave_n")[k] == count
        assert np.size(averages.column("members")[k]) == 1
        assert not (run.outdir / f"drm{iteration:03d}{k:04d}.txt").exists()


def test_arrays_give_what_files_give(run):
    stack, references = small.particles(), small.references()
    began = run.poses("poses_before.csv")
    found = mrefali.align(stack, references, began, ou=6, xr=1, yr=1, center=-1, maxit=2)
    table = run.table("poses.csv")
    assert found.assign.tolist() == table["assign"]
    assert found.peak.tolist() == table["peak"]
    for field in geometry.POSE.names:
        assert found.poses[field].tolist() == table[field]
    np.testing.assert_array_equal(found.averages, open_stack(run.outdir / "multi_ref.hdf").read(0, 2))
    assert [i.criterion for i in found.iterations] == run.table("history.csv")["criterion"][::2]
    np.testing.assert_array_equal(stack, small.particles())
    np.testing.assert_array_equal(references, small.references())


def test_arrays_take_a_mask_as_files_do(tmp_path):
    mask = geometry.disc(small.BOX, 7).astype(np.float32)
    write_stack(tmp_path / "mask.hdf", mask[None])
    run = Run(tmp_path, maxit=1, maskfile=str(tmp_path / "mask.hdf"))
    found = mrefali.align(small.particles(), small.references(), run.poses("poses_before.csv"), mask, ou=6, xr=1,
                          yr=1, center=-1, maxit=1)
    np.testing.assert_array_equal(found.averages, open_stack(run.outdir / "multi_ref.hdf").read(0, 2))
    assert found.poses["sx"].tolist() == run.table("poses.csv")["sx"]


def test_a_reference_function_may_be_given_itself(tmp_path):
    def own(mask, center, average, frc):
        return average * mask, np.zeros(2)

    run = Run(tmp_path, maxit=1, user_func_name=own)
    found = mrefali.align(small.particles(), small.references(), run.poses("poses_before.csv"), ou=6, xr=1, yr=1,
                          center=-1, maxit=1, function=own)
    np.testing.assert_array_equal(found.averages, open_stack(run.outdir / "multi_ref.hdf").read(0, 2))
    assert (found.averages[:, ~geometry.disc(small.BOX, 6)] == 0).all()
    assert json.loads((run.outdir / "parameters.json").read_text())["user_func_name"].endswith(".own")


def test_parameters_holds_paths_and_numbers_of_any_kind(tmp_path):
    stack, refs = map(Path, small.write(tmp_path))
    mrefali.mref_ali2d(stack, refs, tmp_path / "out", geometry.disc(small.BOX, 6), ou=np.int64(6), maxit=1)
    parameters = json.loads((tmp_path / "out/parameters.json").read_text())
    expected = {"stack": str(stack), "refim": str(refs), "outdir": str(tmp_path / "out"), "maskfile": "array", "ou": 6}
    assert {name: parameters[name] for name in expected} == expected


# ---- a run that fails --------------------------------------------------------------------------------------

FAULTS = """
import fcntl, os, shutil
from mrefali.reference import ref_ali2d

def lock(*arguments):  # as another program would
    if "LOCK" not in os.environ:
        lock = os.open(os.environ["STACK"], os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.environ["LOCK"] = str(lock)
    return ref_ali2d(*arguments)

def remove(*arguments):
    shutil.rmtree(os.environ["OUTDIR"], ignore_errors=True)
    return ref_ali2d(*arguments)

def cut(*arguments):
    os.truncate(os.environ["STACK"], 1000)
    return ref_ali2d(*arguments)
"""


def fail(files, monkeypatch, capsys, fault):
    """The one line of stderr of a run to which something happens within its first iteration, and its stdout."""
    folder = Path(files[0]).parent
    (folder / "own.py").write_text(FAULTS)
    monkeypatch.setenv("STACK", files[0])
    monkeypatch.setenv("OUTDIR", files[2])
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=2", f"--function={folder}/own.py:{fault}"]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "done:" not in out
    return err


def test_headers_that_cannot_be_written_after_all_can_be_imported(tmp_path, monkeypatch, capsys):
    folder = _folder(tmp_path, "a b")  # a name that a shell would part
    files = *small.write(folder), str(folder / "out")
    before = contents(files[0])
    err = fail(files, monkeypatch, capsys, "lock")
    table = f"{files[2]}/poses.csv"
    assert " is open in another program, which locked it: " in err
    assert f"; but the run is done, its result in {table}: mrefali header " in err
    assert err[len("mrefali: error: "):-1] in (Path(files[2]) / "mrefali.log").read_text().splitlines()[-1]
    assert contents(files[0]) == before
    program, *words = shlex.split(re.search("mrefali header .* puts", err)[0].removesuffix(" puts"))
    assert words[1:] == [files[0], "--params=xform.align2d,assign", f"--import={table}"]
    os.close(int(os.environ.pop("LOCK")))
    assert cli.main(words) == 0
    found = small.read_table(table)
    assert open_stack(files[0]).column("assign") == found["assign"]
    np.testing.assert_allclose(open_stack(files[0]).poses()["sx"], found["sx"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", ["remove", "cut"])
def test_a_file_that_is_lost_within_the_run_is_one_line(files, monkeypatch, capsys, fault):
    err = fail(files, monkeypatch, capsys, fault)
    stack, _, outdir = files
    lost = {"remove": outdir, "cut": stack}[fault]
    assert re.match(f"mrefali: error: .*{lost}.*; [01] of 2 iterations are finished in {outdir}, and {stack} is as it "
                    "was; the same call with --resume goes on from there\n", err)


# ---- the CTF -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("held", "times"), [(3, 1), (1, 3)], ids=["all-held", "one-held"])
def test_a_kernel_is_computed_once_a_run_or_if_they_are_too_many_once_a_pass(tmp_path, monkeypatch, held, times):
    """Three micrographs; a pass each for the check of all pixels and for two iterations."""
    computed = []

    class Counting(ctf.CtfKernels):
        def __init__(self, box):
            super().__init__(box, n_bytes=held * 4 * 2 * box * (box + 1))

        def _compute(self, values):
            computed.append(values)
            return super()._compute(values)

    monkeypatch.setattr("mrefali.particles.CtfKernels", Counting)
    files = *small.write(tmp_path), str(tmp_path / "out")
    stack = open_stack(files[0])
    stack.write_columns({"ctf": [f"E{1 + i // 8} 0 0 50 10 300 2 2.5 0 0 0" for i in range(small.N_PARTICLES)]})
    mrefali.mref_ali2d(*files, maxit=2, CTF=True, vanished="keep", **small.OPTIONS)
    assert Counter(values[0] for values in computed) == {1.0: times, 2.0: times, 3.0: times}


# ---- threads -----------------------------------------------------------------------------------------------

def test_the_number_of_threads_changes_no_bit(tmp_path, run):
    one = Run(tmp_path, threads=1)
    assert json.loads((one.outdir / "parameters.json").read_text())["threads_used"] == 1
    assert one.after == run.after
    for name in ("aqm000.hdf", "aqm001.hdf"):
        assert contents(one.outdir / name) == contents(run.outdir / name)
    assert one.table("poses.csv") == run.table("poses.csv")


def test_threads_are_set_for_the_run_only(files):
    before = numba.get_num_threads()
    mrefali.mref_ali2d(*files, maxit=1, threads=1, **small.OPTIONS)
    assert numba.get_num_threads() == before


@pytest.mark.parametrize("threads", [-1, 100_000])
def test_threads_that_are_not_there_are_refused(files, threads):
    with pytest.raises(InputError, match=f"threads={threads} is not allowed: give 1 to [0-9]+ .*, or 0 for all"):
        mrefali.mref_ali2d(*files, threads=threads)
    assert not os.path.exists(files[2])


def test_blas_has_one_thread_beside_those_of_numba():
    before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    with use_threads(0):
        during = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert len(during) >= 2  # numpy's and scipy's
    assert set(during) == {1}
    assert [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"] == before


# ---- what is said ------------------------------------------------------------------------------------------

def test_a_range_that_ou_cuts_is_said_with_the_ou_that_would_not(files, capsys):
    assert cli.main(["mref_ali2d", *files, "--ou=8", "--xr=3", "--yr=1", "--maxit=1"]) == 0
    out, err = capsys.readouterr()
    assert re.match("mrefali: warning: xr=3 is cut to 1 .* ou=8 .* 20-pixel image.* ou=6 would leave it whole\n", err)
    assert err.count("is cut to") == 1
    assert "search for a centred particle: x -1 to 1 px, y -1 to 1 px" in out
    assert "xr=3 is cut to 1" in (Path(files[2]) / "mrefali.log").read_text()


def test_the_ou_that_is_advised_leaves_the_range_whole(files, capsys):
    assert cli.main(["mref_ali2d", *files, "--ou=6", "--xr=3", "--yr=1", "--maxit=1"]) == 0
    out, err = capsys.readouterr()
    assert "is cut to" not in err
    assert "x -3 to 3 px" in out


@pytest.mark.parametrize(("words", "said", "warning"), [
    (["--xr=0.3", "--ts=0.1"], "x -0.3 to 0.3 px", ""),
    (["--xr=0.35", "--ts=0.1"], "x -0.3 to 0.3 px",
     "mrefali: warning: xr=0.35 is no whole number of steps of ts=0.1: the search ends at 0.3\n"),
    (["--xr=1", "--ts=2"], "x 0 to 0 px",
     "mrefali: warning: xr=1 is no whole number of steps of ts=2: the search ends at 0\n"),
])
def test_a_range_that_steps_do_not_fill_is_said(files, capsys, words, said, warning):
    assert cli.main(["mref_ali2d", *files, "--ou=6", *words, "--maxit=1", "--center=0"]) == 0
    out, err = capsys.readouterr()
    assert err == warning
    assert said in out


def test_each_iteration_is_one_line(files, capsys):
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=2"]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("iteration ")]
    assert [line.split(":")[0] for line in lines] == ["iteration 0 (1 of 2)", "iteration 1 (2 of 2)"]
    for word in ("criterion ", "classes 8/12/16 (smallest/median/largest)", "changed class", " s, ", "particles/s"):
        assert word in lines[1]
    assert "100.0% changed class" in lines[0]
    assert "\r" not in out + err
    assert err == ""


def test_quiet_says_nothing_but_logs_all_the_same(files, capsys):
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=1", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert "iteration 0 (1 of 1)" in (Path(files[2]) / "mrefali.log").read_text()


def test_python_calls_print_nothing_and_leave_logging_as_it_was(files, capfd):
    package = logging.getLogger("mrefali")
    before = package.level, list(package.handlers)
    mrefali.mref_ali2d(*files, maxit=1, **small.OPTIONS)
    assert capfd.readouterr() == ("", "")
    assert (package.level, package.handlers) == before


def test_check_says_ranges_and_estimates_and_touches_nothing(files, tmp_path, capsys):
    before = small.snapshot(tmp_path)
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=4", "--check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "24 particles of 20 x 20 px, 2 references, rings 1 to 6 px" in out
    assert "x -1 to 1 px, y -1 to 1 px" in out
    assert "an iteration" in out
    assert "for 4, on" in out
    assert "MB of memory" in out
    assert len(out.splitlines()) == 3
    assert small.snapshot(tmp_path) == before


@pytest.mark.jit_only
def test_the_estimate_counts_the_reading_of_the_particles(files, capsys, monkeypatch):
    read = Particles.read

    def slow(self, indices):
        time.sleep(0.05 * (indices.stop - indices.start))
        return read(self, indices)

    monkeypatch.setattr(Particles, "read", slow)
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=4", "--check"]) == 0
    iteration, run = map(float, re.search(r"about ([\d.]+) s an iteration, ([\d.]+) s for 4", capsys.readouterr().out)
                         .groups())
    assert 1.1 < iteration < 5  # 24 times 0.05 s, and the search
    assert run == pytest.approx(4 * iteration, rel=0.1)


def test_a_run_says_what_memory_it_takes_before_it_starts(files, capsys, monkeypatch):
    """24 particles and two references of 20 px take 43,200 bytes; three blocks of three particles, 14,400."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: -memory.WORK_BYTES)
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=1", "--max_memory=57kB"]) == 0
    said = capsys.readouterr().out
    assert "estimate: about 0 MB of memory a rank; 3 particles are read at a time\n" in said
    assert said.index("estimate") < said.index("iteration 0")


@pytest.mark.parametrize(("size", "message"), [
    ("1MB", "max_memory=1MB is not enough: this run takes .* MB a process even with one image at a time; give "
            "--max_memory=.*MB or more, or fewer references"),
    ("lots", "max_memory=lots is not allowed: give a size above 0 such as 500MB or 4GB")])
def test_a_limit_of_memory_that_cannot_be_kept_is_refused(files, capsys, size, message):
    before = small.snapshot(Path(files[2]).parent)
    assert cli.main(["mref_ali2d", *files, *small.WORDS, f"--max_memory={size}"]) == 2
    assert re.fullmatch(f"mrefali: error: {message}\n", capsys.readouterr().err)
    assert small.snapshot(Path(files[2]).parent) == before


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_compilation_is_announced_while_it_lasts(files, capsys, monkeypatch, seconds):
    monkeypatch.setattr(warmup, "COMPILING_S", 0.2)
    monkeypatch.setattr(warmup, "_run_all", lambda: time.sleep(seconds))
    assert cli.main(["mref_ali2d", *files, *small.WORDS, "--maxit=1"]) == 0
    out, _ = capsys.readouterr()
    line = "compiling the search, once an installation: it takes about half a minute\n"
    assert out.startswith(line) is (seconds > 0)
    assert out.count("compiling") == (seconds > 0)


def test_check_refuses_what_a_run_refuses(files, tmp_path, capsys):
    before = small.snapshot(tmp_path)
    assert cli.main(["mref_ali2d", *files, "--ou=70", "--check"]) == 2
    assert "ou=70 does not fit a 20-pixel image" in capsys.readouterr().err
    assert small.snapshot(tmp_path) == before


@pytest.mark.parametrize(("words", "shown"), [([], True), (["--quiet"], False)])
def test_a_progress_bar_runs_where_a_person_watches(files, words, shown):
    child = pexpect.spawn(str(SCRIPTS / "mrefali"), ["mref_ali2d", *files, *small.WORDS, "--maxit=1", *words],
                          timeout=600)
    text = child.read().decode()
    child.close()
    assert child.exitstatus == 0
    assert (" particles" in text and "iteration 0:" in text) is shown


def test_a_file_or_a_pipe_sees_no_progress_bar(files):
    done = subprocess.run([SCRIPTS / "mrefali", "mref_ali2d", *files, *small.WORDS, "--maxit=1"],
                          capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\r" not in done.stdout
    assert b"iteration 0 (1 of 1)" in done.stdout


def test_files_may_have_the_names_of_numbers(tmp_path, monkeypatch, capsys):
    small.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    os.rename("stack.hdf", "123")
    os.rename("refs.hdf", "1e3")
    write_stack("007", geometry.disc(small.BOX, 6)[None].astype(np.float32))
    assert cli.main(["mref_ali2d", "123", "1e3", "4.0", "007", *small.WORDS, "--maxit=1"]) == 0
    assert capsys.readouterr().err == ""
    assert sorted(os.listdir()) == ["007", "123", "1e3", "4.0"]
    assert os.path.isfile("4.0/aqm000.hdf")
    assert None not in open_stack("123").column("assign")


def _folder(parent, name):
    (parent / name).mkdir()
    return parent / name


# ---- what a run refuses, and warns of ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pose_that_is_no_number_names_its_image(value):
    poses = small.poses()
    poses["sx"][5] = value
    with pytest.raises(InputError, match="images: image 5 has a pose with NaN or infinity: .*"):
        mrefali.align(small.particles(), small.references(), poses, ou=6)


def test_poses_of_another_type_are_refused():
    with pytest.raises(InputError, match="poses has the shape .24,. and the type float64: give one geometry.POSE"):
        mrefali.align(small.particles(), small.references(), np.zeros(24), ou=6)


def test_more_references_than_particles_are_taken_for_swapped_files():
    with pytest.raises(InputError, match="24 references for the 2 particles of images: give the particles first"):
        mrefali.align(small.references(), small.particles(), ou=6)


def test_many_vanished_classes_are_warned_of_with_the_way_out(files, capsys):
    references = np.concatenate([small.references()[:1], 1e-3 * small.references()])
    write_stack(files[1], references, pixel_size_A=2.5)
    assert cli.main(["mref_ali2d", *files, "--ou=6", "--maxit=1", "--center=0"]) == 0
    assert capsys.readouterr().err == (
        "mrefali: warning: iteration 0: 2 of 3 classes have fewer than four particles; references of unequal contrast "
        "do this: try --normalize_references or --vanished=split or --assignment=capped or fewer classes\n")


def test_poses_csv_is_there_after_each_iteration(files, monkeypatch):
    seen = []
    write = outdir.OutputDirectory.write_iteration

    def watch(self, iteration):
        write(self, iteration)
        seen.append(Path(self.path, "poses.csv").read_text().count("\n"))

    monkeypatch.setattr(outdir.OutputDirectory, "write_iteration", watch)
    assert cli.main(["mref_ali2d", *files, "--ou=6", "--maxit=2"]) == 0
    assert seen == [25, 25]
