"""A run that was ended goes on after its last finished iteration, to the same bits, or is refused with what differs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from test_io_hdf import contents

import mrefali
from mrefali import checkpoint, cli, outdir, refine
from mrefali.errors import InputError, RunFailed
from mrefali.io import open_stack, write_stack

MPIEXEC = Path(sys.executable).parent / "mpiexec"
MAXIT = 4


def files(folder):
    """Stack, references that are too faint but for one, so that classes vanish and draws are made, and OUTDIR."""
    folder.mkdir()
    stack, refs = small.write(folder)
    write_stack(refs, np.concatenate([small.references()[:1], 1e-3 * small.references()]), None, small.PIXEL_SIZE_A)
    return stack, refs, str(folder / "out")


def run(folder, *words, ranks=0, maxit=MAXIT):
    """Run the main job on files that are there; its status."""
    call = ["mref_ali2d", str(folder / "stack.hdf"), str(folder / "refs.hdf"), str(folder / "out"), *small.WORDS,
            f"--maxit={maxit}", *words]
    if not ranks:
        return cli.main(call)
    launcher = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "mrefali"]
    return subprocess.run([*launcher, *call, "--MPI", "--quiet"], timeout=600, capture_output=True).returncode


@pytest.fixture(scope="module")
def never_ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    files(folder)
    assert run(folder) == 0
    drawn = [line for line in (folder / "out/mrefali.log").read_text().splitlines() if "replaces it" in line]
    assert len(drawn) > 3  # so that the state of the generator counts
    return folder


LINE = re.compile(r"^[-0-9]+ [0-9:,]+ (.*?)(; [0-9.]+ s, [0-9]+ particles/s)?$", flags=re.MULTILINE)


def log_lines(folder):
    """What the log says of the iterations, without times."""
    said = [match[1] for match in LINE.finditer((folder / "out/mrefali.log").read_text())]
    return [line for line in said if re.search("class [0-9]+:|iteration [0-9]+", line)]


def assert_same(one, other, log=True):
    """Two folders hold the same results, to the bit but for times and the calls themselves."""
    assert sorted(os.listdir(one / "out")) == sorted(os.listdir(other / "out"))
    for file in (one / "out").iterdir():
        if file.suffix in (".csv", ".txt", ".hdf"):
            assert file.read_bytes() == (other / "out" / file.name).read_bytes(), file.name
    assert contents(one / "stack.hdf") == contents(other / "stack.hdf")
    if log:
        assert log_lines(one) == log_lines(other)


class Crash(Exception):
    """Stands for whatever ends a process."""


def end_within(monkeypatch, place, owner, method, number):
    """Have call ``number`` of a method raise, before or after its work."""
    calls, whole = [], getattr(owner, method)

    def wrapped(*arguments, **options):
        calls.append(1)
        if place == "before" and len(calls) == number:
            raise Crash
        result = whole(*arguments, **options)
        if place == "after" and len(calls) == number:
            raise Crash
        return result

    monkeypatch.setattr(owner, method, wrapped)


#: Where a run is ended: a name, and how often it gets there before.
PLACES = {
    "searching": (refine, "_search_and_sum"), "writing-averages": (outdir.OutputDirectory, "_write_averages"),
    "writing-history": (outdir.OutputDirectory, "_write_history"),
    "writing-poses": (outdir.OutputDirectory, "_write_poses"),
    "keeping": (checkpoint, "save"), "the-end": (outdir.OutputDirectory, "write_end"),
}


@pytest.mark.jit_only
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "number"), [
    ("searching", 1), ("searching", 3), ("writing-averages", 2), ("writing-history", 2), ("writing-poses", 3),
    ("keeping", 2), ("keeping", 5), ("the-end", 1)])
def test_a_run_ended_anywhere_goes_on_as_if_it_never_was(tmp_path, never_ended, name, number, when):
    folder = tmp_path / "run"
    files(folder)
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, when, *PLACES[name], number)
        with pytest.raises(Crash):
            run(folder)
    assert run(folder, "--resume") == 0
    assert_same(folder, never_ended)


def test_a_run_ended_again_and_again_goes_on(tmp_path, never_ended):
    folder = tmp_path / "run"
    files(folder)
    words = []
    for _ in range(MAXIT - 1):
        with pytest.MonkeyPatch.context() as patch:
            end_within(patch, "before", outdir.OutputDirectory, "_write_poses", 2 if words else 3)
            with pytest.raises(Crash):
                run(folder, *words)
        words = ["--resume"]
    assert run(folder, "--resume") == 0
    assert_same(folder, never_ended)


def test_a_run_ended_within_the_write_back_goes_on(tmp_path, never_ended):
    from mrefali.io import hdf

    folder = tmp_path / "run"
    files(folder)
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", hdf, "_write_header", 20)
        with pytest.raises(Crash):
            run(folder)
    assert run(folder, "--resume") == 0
    assert_same(folder, never_ended)


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, never_ended):
    shutil.copytree(never_ended, tmp_path / "run")
    assert run(tmp_path / "run", "--resume") == 0
    assert_same(tmp_path / "run", never_ended)


@pytest.mark.jit_only
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3), (3, 1)])
def test_the_number_of_ranks_may_change(tmp_path, never_ended, before, after):
    """Two iterations on so many ranks, the others on as many."""
    folder = tmp_path / "run"
    files(folder)
    assert run(folder, maxit=2, ranks=before) == 0
    assert run(folder, "--resume", ranks=after) == 0
    assert_same(folder, never_ended, log=False)  # which says of how many


@pytest.mark.jit_only
def test_the_number_of_threads_may_change(tmp_path, never_ended):
    folder = tmp_path / "run"
    files(folder)
    assert run(folder, "--threads=1", maxit=2) == 0
    assert run(folder, "--resume") == 0
    assert_same(folder, never_ended, log=False)  # which says of how many


@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_headers_saved_in_between_change_nothing(tmp_path, never_ended, write_back):
    folder = tmp_path / "run"
    files(folder)
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", outdir.OutputDirectory, "_write_poses", 5)  # the fourth iteration's
        with pytest.raises(Crash):
            run(folder, "--save_every=2", f"--write_back={write_back}")
    saved = open_stack(folder / "stack.hdf")
    table = small.read_table(folder / "out/poses.csv")  # of the third iteration
    assert saved.column("assign") != [None] * small.N_PARTICLES
    assert table["index"] == list(range(small.N_PARTICLES))
    assert run(folder, "--resume", "--save_every=3") == 0
    assert_same(folder, never_ended)


def test_save_every_writes_after_every_so_many_iterations(tmp_path, monkeypatch):
    files(tmp_path / "run")
    written, whole = [], mrefali.io.HdfStack.write_columns

    def watch(self, columns, write_back):
        whole(self, columns, write_back)
        written.append((len(list((tmp_path / "run/out").glob("aqm*"))), write_back))

    monkeypatch.setattr(mrefali.io.HdfStack, "write_columns", watch)
    assert run(tmp_path / "run", "--save_every=2", "--write_back=copy", maxit=5) == 0
    assert written == [(2, "copy"), (4, "copy"), (5, "copy")]


def test_a_run_with_auto_stop_stops_where_it_would_have(tmp_path, monkeypatch):
    """The criterion falls in the third iteration; a run ended right then does not begin another."""
    values = iter([1.0, 2.0, 1.5, 1.0, 2.0, 1.5])
    monkeypatch.setattr(refine.average, "criterion", lambda *arguments: next(values))
    for name in ("whole", "ended"):
        files(tmp_path / name)
    assert run(tmp_path / "whole", maxit=0) == 0
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "after", checkpoint, "save", 4)
        with pytest.raises(Crash):
            run(tmp_path / "ended", maxit=0)
    assert run(tmp_path / "ended", "--resume", maxit=0) == 0
    assert len(list((tmp_path / "ended/out").glob("aqm*"))) == 3
    assert_same(tmp_path / "ended", tmp_path / "whole")


#: Two stages of two iterations, all that depends on the number of an iteration, and the local refinement.
STAGES = ["--xr=1 0", "--yr=1", "--ts=1 0.5", "--subpixel", "--lowpass=0.2", "--highpass=0.02", "--mirror=0"]


def run_words(folder, command, *words):
    return cli.main([command, *(str(folder / name) for name in ("stack.hdf", "refs.hdf", "out")), *words])


@pytest.mark.parametrize("number", [2, 3, 4])
def test_stages_and_the_low_pass_go_on_where_they_were(tmp_path, number):
    words = ["mref_ali2d", "--ou=6", "--maxit=2", *STAGES]
    for name in ("whole", "ended"):
        files(tmp_path / name)
    assert run_words(tmp_path / "whole", *words) == 0
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", refine, "_search_and_sum", number)
        with pytest.raises(Crash):
            run_words(tmp_path / "ended", *words)
    assert run_words(tmp_path / "ended", *words, "--resume") == 0
    assert len(list((tmp_path / "ended/out").glob("aqm*"))) == 4
    assert_same(tmp_path / "ended", tmp_path / "whole")


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_stages_with_auto_stop_end_where_they_would_have(tmp_path, monkeypatch, number):
    """The criterion falls in the second iteration of the first stage, and in the third of the second."""
    values = [1.0, 0.5, 0.25, 2.0, 1.5]
    words = ["mref_ali2d", "--ou=6", "--maxit=0", "--xr=1 0", "--yr=0", "--ts=1"]
    for name in ("whole", "ended"):
        files(tmp_path / name)
        told = iter(values)
        monkeypatch.setattr(refine.average, "criterion", lambda *arguments, told=told: next(told))
        if name == "ended":
            with pytest.MonkeyPatch.context() as patch:
                end_within(patch, "after", checkpoint, "save", number)
                with pytest.raises(Crash):
                    run_words(tmp_path / name, *words)
        assert run_words(tmp_path / name, *words, *["--resume"] * (name == "ended")) == 0
        assert len(list((tmp_path / name / "out").glob("aqm*"))) == 5
    assert_same(tmp_path / "ended", tmp_path / "whole")


def test_a_local_refinement_goes_on(tmp_path):
    words = ["local_ali2d", "--ou=6", "--maxit=3", "--lowpass=0.3"]
    for name in ("whole", "ended"):
        stack = files(tmp_path / name)[0]
        open_stack(stack).write_columns({"assign": np.arange(small.N_PARTICLES) % 3})
    assert run_words(tmp_path / "whole", *words) == 0
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", refine, "_search_and_sum", 3)
        with pytest.raises(Crash):
            run_words(tmp_path / "ended", *words, "--save_every=1")
    assert run_words(tmp_path / "ended", *words, "--resume") == 0
    assert_same(tmp_path / "ended", tmp_path / "whole")


@pytest.mark.parametrize("words", [["--lowpass=0.3"], ["--xr=1 0", "--yr=0", "--ts=1"]], ids=["low-pass", "stages"])
def test_the_number_of_iterations_stays_where_stages_or_the_low_pass_go_by_it(tmp_path, capsys, words):
    files(tmp_path / "run")
    assert run_words(tmp_path / "run", "mref_ali2d", "--ou=6", "--maxit=1", *words) == 0
    capsys.readouterr()
    assert run_words(tmp_path / "run", "mref_ali2d", "--ou=6", "--maxit=2", *words, "--resume") == 2
    assert "maxit=2 (was 1, and the stages or the low-pass go by it): give all as it was" in capsys.readouterr().err


def test_the_log_says_that_the_run_was_resumed_and_keeps_no_line_of_what_was_not_finished(tmp_path):
    folder = tmp_path / "run"
    files(folder)
    with pytest.MonkeyPatch.context() as patch:
        end_within(patch, "before", checkpoint, "save", 3)  # the second iteration is written, and not kept
        with pytest.raises(Crash):
            run(folder)
    assert "iteration 1 (2 of 4)" in (folder / "out/mrefali.log").read_text()
    assert run(folder, "--resume") == 0
    log = (folder / "out/mrefali.log").read_text()
    assert log.count("iteration 1 (2 of 4)") == 1
    assert log.count(" INFO    resumed after 1 finished iterations\n") == 1


# ---- refused


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, folder, words, message, maxit=MAXIT):
    before = small.snapshot(folder)
    capsys.readouterr()
    assert run(folder, "--resume", *words, maxit=maxit) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"mrefali: error: {message}\n", err), err
    assert small.snapshot(folder) == before


@pytest.mark.parametrize(("words", "differing"), [
    (["--xr=2"], r"xr=2\.0 \(was 1\.0\)"), (["--ts=0.5"], r"ts=0\.5 \(was 1\.0\)"), (["--rs=2"], r"rs=2 \(was 1\)"),
    (["--vanished=keep"], r"vanished=keep \(was random\)"), (["--rand_seed=7"], r"rand_seed=7 \(was 1000\)"),
    (["--center_limit=3"], r"center_limit=3\.0 \(was None\)"), (["--snr=2"], r"snr=2\.0 \(was 1\.0\)"),
    (["--function=ref_unfiltered"], r"function=ref_unfiltered \(was ref_ali2d\)"),
    (["--ir=2", "--yr=0"], r"ir=2 \(was 1\); yr=0\.0 \(was 1\.0\)"),
    (["--CTF"], r"CTF=True \(was False\); headers of .*"),
])
def test_changed_parameters_are_refused_with_what_differs(tmp_path, never_ended, capsys, monkeypatch, words, differing):
    monkeypatch.setattr("test_checkpoint.small.WORDS", [word for word in small.WORDS if word.split("=")[0] not in
                                                       {w.split("=")[0] for w in words}])
    folder = copy_of(never_ended, tmp_path)
    refused(capsys, folder, words, f"{folder}/out cannot be resumed, since these are not as they were: {differing}: "
                                   "give all as it was, or start in a new OUTDIR")


@pytest.mark.parametrize("maxit", [1, 3, 0])
def test_fewer_iterations_than_are_finished_are_refused_and_auto_stop(tmp_path, never_ended, capsys, maxit):
    folder = copy_of(never_ended, tmp_path)
    refused(capsys, folder, [], f".*: maxit={maxit} \\(was 4, and 4 iterations are finished\\): .*", maxit)


def change_pixel(folder):
    stack = open_stack(folder / "stack.hdf")
    images = stack.read(0, stack.n_images)
    images[17, 3, 4] += 1e-3
    headers = [stack.header(i) for i in range(stack.n_images)]
    write_stack(folder / "stack.hdf", images, headers)


def change_references(folder):
    write_stack(folder / "refs.hdf", open_stack(folder / "refs.hdf").read(0, 3) * np.float32(1.001), None, 2.5)


@pytest.mark.parametrize(("change", "differing"), [
    (change_pixel, "headers of the stack; pixels of the stack"),  # the statistics are in the headers
    (change_references, "the references"),
    (lambda folder: open_stack(folder / "stack.hdf").write_columns({"quality": np.arange(24) / 5}),
     "headers of the stack"),
    (lambda folder: open_stack(folder / "stack.hdf").write_columns({"assign": np.arange(24)}),
     "xform.align2d or assign of the stack"),
    (lambda folder: cli.main(["header", str(folder / "stack.hdf"), "--params=xform.align2d", "--zero"]),
     "xform.align2d or assign of the stack"),
    (lambda folder: write_stack(folder / "stack.hdf", small.particles()[:20], [
        open_stack(folder / "stack.hdf").header(i) for i in range(20)]),
     r"n_particles=20 \(was 24\); headers of the stack; pixels of the stack; xform.align2d or assign of the stack"),
])
def test_a_changed_stack_is_refused_with_what_differs(tmp_path, never_ended, capsys, change, differing):
    folder = copy_of(never_ended, tmp_path)
    change(folder)
    refused(capsys, folder, [], f".*/out cannot be resumed, since these are not as they were: {differing}: give all .*")


def test_a_changed_mask_or_function_file_is_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    files(folder)
    mask, own = str(folder / "mask.hdf"), folder / "own.py"
    write_stack(mask, np.ones((1, small.BOX, small.BOX)))
    own.write_text("from mrefali.reference import ref_ali2d as own\n")
    words = [mask, f"--function={own}:own"]
    assert cli.main(["mref_ali2d", *(str(folder / name) for name in ("stack.hdf", "refs.hdf", "out")), *words,
                     *small.WORDS, "--maxit=1"]) == 0
    own.write_text("from mrefali.reference import ref_unfiltered as own\n")
    write_stack(mask, np.full((1, small.BOX, small.BOX), 0.9))
    capsys.readouterr()
    assert cli.main(["mref_ali2d", *(str(folder / name) for name in ("stack.hdf", "refs.hdf", "out")), *words,
                     *small.WORDS, "--maxit=2", "--resume"]) == 2
    assert "not as they were: the file of the reference function; the mask: give" in capsys.readouterr().err


def test_there_must_be_something_to_resume(tmp_path, capsys):
    folder = tmp_path / "run"
    files(folder)
    refused(capsys, folder, [], ".*/out is no directory, so there is nothing to resume: leave --resume out")
    (folder / "out").mkdir()
    refused(capsys, folder, [], ".*/out has no checkpoint, so there is nothing to resume: give a new OUTDIR without .*")


def test_a_new_run_does_not_touch_the_old_and_says_how_to_go_on(tmp_path, never_ended, capsys):
    folder = copy_of(never_ended, tmp_path)
    before = small.snapshot(folder)
    assert run(folder) == 2
    assert "out: the output directory exists already: give a new name, remove it, or go on with the run in it by " \
        "--resume\n" in capsys.readouterr().err
    assert small.snapshot(folder) == before


def test_a_damaged_checkpoint_is_refused(tmp_path, never_ended, capsys):
    folder = copy_of(never_ended, tmp_path)
    path = Path(checkpoint.path_in(folder / "out"))
    whole = path.read_bytes()
    for data in (b"", whole[:10], whole[:-1], whole[:-8], whole + b"x", whole[:200] + b"X" + whole[201:]):
        path.write_bytes(data)
        refused(capsys, folder, [], ".*/last is damaged, so the run cannot be resumed: start in a new OUTDIR, from .*")


def test_a_history_of_fewer_columns_that_an_older_version_began_is_filled_up(tmp_path, never_ended):
    folder = tmp_path / "run"
    files(folder)
    assert run(folder, maxit=2) == 0
    name = folder / "out/history.csv"
    old = [line.split(",")[:11] for line in name.read_text().splitlines()]
    name.write_text("".join(",".join(row) + "\r\n" for row in old))
    assert run(folder, "--resume") == 0
    rows, whole = ([line.split(",") for line in path.read_text().splitlines()]
                   for path in (name, never_ended / "out/history.csv"))
    n_old = len(old) - 1
    assert rows[0] == whole[0]
    assert rows[1:1 + n_old] == [[*row, "", "", "", "", ""] for row in old[1:]]
    assert rows[1 + n_old:] == whole[1 + n_old:]


def test_another_version_is_said_and_goes_on(tmp_path, never_ended, monkeypatch, capsys):
    folder = copy_of(never_ended, tmp_path)
    monkeypatch.setattr(mrefali, "__version__", "9.9")
    assert run(folder, "--resume") == 0
    assert "warning: resumed with mrefali 9.9 (was 0.1.0): the result may differ in its last digits" in \
        capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--save_every=-1"], "save_every=-1 is not allowed: give a number of iterations, or 0 for the end only"),
    (["--write_back=fast"], "write_back=fast is not allowed: give journal or copy")])
def test_how_headers_are_saved_is_checked_first(tmp_path, capsys, words, message):
    folder = tmp_path / "run"
    files(folder)
    before = small.snapshot(folder)
    assert run(folder, *words) == 2
    assert capsys.readouterr().err == f"mrefali: error: {message}\n"
    assert small.snapshot(folder) == before


def test_a_state_is_read_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(2)
    state = refine.first_state(rng.standard_normal((2, 5, 5)).astype(np.float32), small.poses(),
                               type("Settings", (), {"rand_seed": 4}))
    (tmp_path / "checkpoint").mkdir()
    checkpoint.save(tmp_path, checkpoint.Checkpoint(state, {"a": 1.25}, {"numpy": "2"}, [3, 4], 77))
    back = checkpoint.load(tmp_path)
    for name in ("references", "poses", "assign"):
        found, expected = getattr(back.state, name), getattr(state, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert (back.state.number, back.state.criterion, back.state.random, back.state.stopped) == (
        -1, -np.inf, state.random, False)
    assert (back.facts, back.versions, back.headers, back.log_bytes) == ({"a": 1.25}, {"numpy": "2"}, [3, 4], 77)


def test_a_file_that_fails_within_a_run_says_how_to_go_on(tmp_path, monkeypatch):
    stack, refs, out = files(tmp_path / "run")

    def fail(*arguments):
        raise OSError(28, "No space left on device", "history.csv")

    monkeypatch.setattr(outdir.OutputDirectory, "_write_history", fail)
    message = (f"history.csv: No space left on device; 0 of 2 iterations are finished in {out}, and {stack} is as it "
               "was; the same call with --resume goes on from there")
    with pytest.raises(RunFailed, match=f"^{message}$"):
        mrefali.mref_ali2d(stack, refs, out, maxit=2, **small.OPTIONS)
    monkeypatch.undo()
    with pytest.raises(InputError, match="maxit=0"):
        mrefali.mref_ali2d(stack, refs, out, maxit=0, resume=True, **small.OPTIONS)
    mrefali.mref_ali2d(stack, refs, out, maxit=2, resume=True, **small.OPTIONS)
