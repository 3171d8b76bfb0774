"""The command line: what reaches a command, what is refused, what is printed, and the exit status."""

import inspect
import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pexpect
import pytest

import mrefali
from mrefali import cli, commands
from mrefali.errors import InputError

SCRIPTS = Path(sys.executable).parent
MREF = ["mref_ali2d", "stack.hdf", "refs.hdf", "out"]
HOSTILE_NAMES = ["123", "007", "1e3", "True", "None", "1,2", "{x}", "[a].hdf", "-", "a b", "a=b", "'q'",
                 '"q"', "bdb:dir#stk", "0x10", "größe.hdf", "(1", "./-x", "#c", "a\nb"]


def replace_module(monkeypatch, name, **functions):
    """Put a stand-in for ``mrefali.NAME`` where a command imports it from."""
    monkeypatch.setitem(sys.modules, f"mrefali.{name}", types.SimpleNamespace(**functions))


def raiser(error):
    def fail(*args, **options):
        raise error
    return fail


def refusal(capsys, argv):
    """The one line of stderr with which a call is refused."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mrefali: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def alignment(monkeypatch):
    """The values, by name, with which each call reached ``run.mref_ali2d``."""
    calls = []

    def mref_ali2d(stack, refs, outdir, mask, ir, ou, rs, xr, yr, ts, center, maxit, CTF, snr, function,
                   rand_seed, MPI, *, mirror, subpixel, lowpass, highpass, vanished, center_limit, interpolation,
                   normalize_references, assignment, threads, max_memory, quiet, check, live, resume, save_every,
                   write_back):
        calls.append(dict(zip(names, locals().values(), strict=False)))

    names = list(inspect.signature(mref_ali2d).parameters)
    replace_module(monkeypatch, "run", mref_ali2d=mref_ali2d)
    return calls


# ---- what reaches a command ------------------------------------------------------------------------------

def test_defaults_reach_the_alignment(alignment):
    assert cli.main(MREF) == 0
    assert alignment == [dict(
        stack="stack.hdf", refs="refs.hdf", outdir="out", mask=None, ir=1, ou=-1, rs=1, xr=0.0, yr=0.0,
        ts=1.0, center=1, maxit=10, CTF=False, snr=1.0, function="ref_ali2d", rand_seed=1000, MPI=False,
        mirror=True, subpixel=False, lowpass=None, highpass=None, vanished="random", center_limit=None,
        interpolation="quadratic", normalize_references=False, assignment="best", threads=0, max_memory=None,
        quiet=False, check=False, live=False, resume=False, save_every=0, write_back="journal")]


def test_an_old_script_runs_word_for_word(alignment):
    words = ("stack.hdf refs.hdf out mask.hdf --ir=2 --ou 27 --rs 1 --xr=3 --yr 2.5 --ts=.5 --center -1 "
             "--maxit=5 --CTF --snr 0.3 --function=ref_ali2d --rand_seed 7 --MPI").split()
    assert cli.sxmref_ali2d(words) == 0
    assert alignment == [dict(
        stack="stack.hdf", refs="refs.hdf", outdir="out", mask="mask.hdf", ir=2, ou=27, rs=1, xr=3.0, yr=2.5,
        ts=0.5, center=-1, maxit=5, CTF=True, snr=0.3, function="ref_ali2d", rand_seed=7, MPI=True,
        mirror=True, subpixel=False, lowpass=None, highpass=None, vanished="random", center_limit=None,
        interpolation="quadratic", normalize_references=False, assignment="best", threads=0, max_memory=None,
        quiet=False, check=False, live=False, resume=False, save_every=0, write_back="journal")]


@pytest.mark.parametrize(("words", "name", "value"), [
    (["--ou", "27"], "ou", 27),
    (["--ou=27"], "ou", 27),
    (["--ou", "-1"], "ou", -1),
    (["--ou=+5"], "ou", 5),
    (["--center=-1"], "center", -1),
    (["--center", "-1"], "center", -1),
    (["--snr", "-2.5"], "snr", -2.5),
    (["--snr=-.5"], "snr", -0.5),
    (["--snr", "1e-3"], "snr", 1e-3),
    (["--xr=3"], "xr", 3.0),
    (["--xr=4 2 .5"], "xr", [4.0, 2.0, 0.5]),
    (["--ts=2,1, 0.5"], "ts", [2.0, 1.0, 0.5]),
    (["--subpixel"], "subpixel", True),
    (["--lowpass=.2"], "lowpass", 0.2),
    (["--rand-seed=5"], "rand_seed", 5),
    (["--rand-seed", "5"], "rand_seed", 5),
    (["--function", "True"], "function", "True"),
    (["--function=1e3"], "function", "1e3"),
    (["--function", "-odd"], "function", "-odd"),
    (["--CTF"], "CTF", True),
    *[([f"--CTF={text}"], "CTF", True) for text in ("True", "true", "1", "yes")],
    *[([f"--CTF={text}"], "CTF", False) for text in ("False", "false", "0", "no")],
])
@pytest.mark.parametrize("place", [1, 2, 4], ids=["before", "between", "after"])
def test_an_option_reaches_the_command(alignment, words, name, value, place):
    assert cli.main(MREF[:place] + words + MREF[place:]) == 0
    (call,) = alignment
    assert call[name] == value
    assert type(call[name]) is type(value)
    assert [call[n] for n in ("stack", "refs", "outdir", "mask")] == [*MREF[1:], None]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_file_name_is_never_interpreted(alignment, name):
    assert cli.main(["mref_ali2d", name, name, name, name]) == 0
    (call,) = alignment
    assert [call[n] for n in ("stack", "refs", "outdir", "mask")] == [name] * 4


def test_a_flag_does_not_swallow_the_mask(alignment):
    assert cli.main(MREF + ["--CTF", "mask.hdf", "--MPI"]) == 0
    assert (alignment[0]["CTF"], alignment[0]["mask"], alignment[0]["MPI"]) == (True, "mask.hdf", True)


def test_a_positional_may_be_given_by_name(alignment):
    assert cli.main(["mref_ali2d", "--refs=refs.hdf", "stack.hdf", "--mask", "mask.hdf", "out"]) == 0
    assert [alignment[0][n] for n in ("stack", "refs", "outdir", "mask")] == [*MREF[1:], "mask.hdf"]


def test_a_command_may_be_written_with_a_hyphen(alignment):
    assert cli.main(["mref-ali2d", *MREF[1:]]) == 0
    assert len(alignment) == 1


# ---- what is refused -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (["--ctf"], "unknown option --ctf: did you mean --CTF?"),
    (["--mpi"], "unknown option --mpi: did you mean --MPI?"),
    (["--maxiter=3"], "unknown option --maxiter: did you mean --maxit?"),
    (["--OU=3"], "unknown option --OU: did you mean --ou?"),
    (["--maskfile=m"], "unknown option --maskfile: did you mean --mask?"),
    (["--noCTF"], "unknown option --noCTF: did you mean --CTF?"),
    (["-ou=3"], "unknown option -ou: did you mean --ou?"),
    (["--zzz"], "unknown option --zzz: see mrefali mref_ali2d --help"),
    (["-1"], "unknown option -1: see mrefali mref_ali2d --help"),
    (["--"], "unknown option --: see mrefali mref_ali2d --help"),
    (["--ou=abc"], "--ou=abc is not allowed: give a whole number"),
    (["--ou", "2.5"], "--ou=2.5 is not allowed: give a whole number"),
    (["--ou=2.0"], "--ou=2.0 is not allowed"),
    (["--ou=1e3"], "--ou=1e3 is not allowed"),
    (["--ou=1_0"], "--ou=1_0 is not allowed"),
    (["--ou=٣"], "--ou=٣ is not allowed"),
    (["--ou=" + 5000 * "9"], "is not allowed: give a whole number"),
    (["--ou="], "--ou is empty: give a whole number (px, ir to below n/2 - 1, or -1)"),
    (["--function="], "--function is empty: give a text"),
    (["--ou"], "--ou has no value: give a whole number"),
    (["--ou", "--ir=1"], "--ou has no value"),
    (["--snr=abc"], "--snr=abc is not allowed: give a finite number"),
    (["--snr=nan"], "--snr=nan is not allowed"),
    (["--snr=inf"], "--snr=inf is not allowed"),
    (["--snr", "-inf"], "--snr=-inf is not allowed"),
    (["--snr=1e999"], "--snr=1e999 is not allowed"),
    (["--xr=2 one"], "--xr=2 one is not allowed: give a finite number or one a stage, in quotes"),
    (["--xr=2 1 "], "--xr=2 1  is not allowed"),
    (["--CTF=maybe"], "--CTF=maybe is not allowed: give True or False, yes or no, 1 or 0"),
    (["--CTF="], "--CTF is empty"),
    (["--CTF=2"], "--CTF=2 is not allowed"),
    (["--ou=27", "--ou", "28"], "--ou is given twice, as 27 and 28"),
    (["--rand_seed=1", "--rand-seed=1"], "--rand-seed is given twice"),
    (["--CTF", "--CTF"], "--CTF is given twice"),
    (["mask.hdf", "extra.hdf"], "extra.hdf is one argument too many: the call is mrefali mref_ali2d STACK"),
    (["--mask=m.hdf", "mask.hdf"], "mask.hdf is one argument too many"),
    ([""], "MASK is empty"),
])
def test_a_bad_call_is_refused_before_anything_runs(alignment, capsys, words, message):
    assert message in refusal(capsys, MREF + words)
    assert alignment == []


@pytest.mark.parametrize(("argv", "message"), [
    ([], "a command comes first, one of mref_ali2d, classify, seed, local_ali2d"),
    (["--ou=3"], "a command comes first"),
    (["mref_ali"], "unknown command mref_ali: did you mean mref_ali2d?"),
    (["Info", "x"], "unknown command Info: did you mean info?"),
    (["qqq"], "unknown command qqq: see mrefali --help"),
    (["mref_ali2d"], "STACK, REFS, OUTDIR are missing: the call is mrefali mref_ali2d STACK"),
    (["mref_ali2d", "a", "b"], "OUTDIR is missing"),
    (["mref_ali2d", "a", "--stack=c"], "OUTDIR is missing"),
    (["info"], "FILE is missing: the call is mrefali info FILE"),
    (["info", "a", "b"], "b is one argument too many"),
    (["header", "a"], "--params is missing: the call is mrefali header STACK --params=TEXT"),
])
def test_a_call_without_its_parts_is_refused(alignment, capsys, argv, message):
    assert message in refusal(capsys, argv)
    assert alignment == []


def test_the_old_name_says_its_own_name(capsys):
    assert cli.sxmref_ali2d(["stack.hdf", "--zzz"]) == 2
    assert "see sxmref_ali2d.py --help" in capsys.readouterr().err


# ---- exit status -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "line"), [
    (InputError("ou=70 does not fit"), "ou=70 does not fit"),
    (FileNotFoundError("stack.hdf: no such file"), "stack.hdf: no such file"),
    (FileNotFoundError(2, "No such file or directory", "stack.hdf"), "stack.hdf: No such file or directory"),
    (FileNotFoundError(2, "No such file or directory", b"stack.hdf"), "stack.hdf: No such file or directory"),
    (FileExistsError("out exists"), "out exists"),
    (PermissionError("cannot write"), "cannot write"),
    (IsADirectoryError("a directory"), "a directory"),
    (NotADirectoryError("not a directory"), "not a directory"),
    (InputError("a\nb.hdf"), "a\\nb.hdf"),
])
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, error, line):
    replace_module(monkeypatch, "run", mref_ali2d=raiser(error))
    assert refusal(capsys, MREF) == f"mrefali: error: {line}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5, "Input/output error"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    replace_module(monkeypatch, "run", mref_ali2d=raiser(error))
    with pytest.raises(type(error), match="a bug|Input/output error"):
        cli.main(MREF)


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
    replace_module(monkeypatch, "run", mref_ali2d=raiser(KeyboardInterrupt()))
    assert cli.main(MREF) == 130
    assert capsys.readouterr().err == "mrefali: interrupted\n"


# ---- messages --------------------------------------------------------------------------------------------

def speak(*args, **options):
    logger = logging.getLogger("mrefali.run")
    logger.debug("too much")
    logger.info("iteration 0")
    logger.warning("class 3 vanished")


@pytest.mark.parametrize(("words", "said"), [([], "iteration 0\n"), (["--quiet"], "")])
def test_messages_go_to_stdout_and_warnings_to_stderr(monkeypatch, capsys, words, said):
    replace_module(monkeypatch, "run", mref_ali2d=speak)
    assert cli.main(MREF + words) == 0
    assert capsys.readouterr() == (said, "mrefali: warning: class 3 vanished\n")


def test_messages_come_once_however_often_a_command_ran(monkeypatch, capsys):
    replace_module(monkeypatch, "run", mref_ali2d=speak)
    level = logging.getLogger("mrefali").level
    cli.main(MREF)
    capsys.readouterr()
    cli.main(MREF)
    assert capsys.readouterr().out == "iteration 0\n"
    assert (logging.getLogger("mrefali").handlers, logging.getLogger("mrefali").level) == ([], level)


@pytest.mark.parametrize(("before", "during"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_are_passive_unless_the_user_says_else(monkeypatch, before, during):
    seen = []
    replace_module(monkeypatch, "run",
                   mref_ali2d=lambda *args, **options: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert cli.main(MREF) == 0
    assert seen == [during]


# ---- help ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_names_every_command(capsys, word):
    assert cli.main([word]) == 0
    text = capsys.readouterr().out
    for command in commands.COMMANDS:
        assert re.search(rf"^  {command.__name__} +\w.*\.$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.__name__)
def test_every_parameter_has_one_line_of_help(capsys, command):
    assert cli.main([command.__name__, "some", "words", "--help", "--nonsense"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: mrefali {command.__name__} ")
    for p in inspect.signature(command).parameters.values():
        label = p.name.upper() if p.kind is p.POSITIONAL_OR_KEYWORD else f"--{p.name.removesuffix('_')}"
        (line,) = [line for line in lines if re.match(rf"  {label}\b", line)]
        assert re.fullmatch(rf"  {label}(=INT|=NUMBERS?|=TEXT|=1\|0)?  +\w.*", line)
        if p.annotation in (int, float) and p.default not in (None, p.empty):
            assert line.endswith(f"default {p.default:g})")
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.__name__)
def test_every_docstring_agrees_with_its_signature(command):
    documented = re.findall(r"^    (\w+) : (\w+)", command.__doc__, flags=re.MULTILINE)
    parameters = inspect.signature(command).parameters.values()
    assert documented == [(p.name, p.annotation.__name__) for p in parameters]


def test_help_tells_unit_range_and_default(capsys):
    assert cli.main(["mref_ali2d", "--help"]) == 0
    text = capsys.readouterr().out
    assert "(px, ir to below n/2 - 1, or -1; default -1)" in text
    assert "usage: mrefali mref_ali2d STACK REFS OUTDIR [MASK] [--OPTION=VALUE ...]" in text


@pytest.mark.parametrize("argv", [["--version"], ["mref_ali2d", "--version"], ["info", "x", "--version"]])
def test_version(capsys, argv):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"mrefali {mrefali.__version__}\n"


# ---- the other commands ----------------------------------------------------------------------------------

def test_simulate_hands_on_its_options(monkeypatch, capsys):
    calls = []
    replace_module(monkeypatch, "simulation", simulate=lambda out, **options: calls.append((out, options)))
    assert cli.main(["simulate", "a.hdf", "--n=30", "--views=3", "--sizes=20,10,8", "--mirror=no"]) == 0
    assert calls == [("a.hdf", dict(n_particles=30, n_views=3, box=64, snr=0.3, max_shift=3.0, mirror=False,
                                    sizes=[20.0, 10.0, 8.0], pixel_size=2.0, seed=0,
                                    nearly_symmetric=False, junk=0.0, CTF=False))]
    assert re.findall(r"^\S+(?=:)", capsys.readouterr().out, flags=re.MULTILINE) == [
        "a.hdf", "a_truth.csv", "a_views.hdf"]
    assert cli.main(["simulate", "a.hdf"]) == 0
    assert calls[1][1]["sizes"] is None


@pytest.mark.parametrize("sizes", ["20,,8", "a", "20 10", "1;2"])
def test_simulate_refuses_sizes_that_are_no_numbers(monkeypatch, capsys, sizes):
    replace_module(monkeypatch, "simulation", simulate=raiser(AssertionError("ran")))
    assert f"--sizes={sizes} is not allowed: give one number a view" in refusal(
        capsys, ["simulate", "a.hdf", f"--sizes={sizes}"])


@pytest.mark.parametrize(("words", "outdir", "threads"), [
    ([], "mrefali_demo", 0),
    (["d", "--threads=2"], "d", 2),
])
def test_demo_hands_on_its_options(monkeypatch, words, outdir, threads):
    calls = []
    replace_module(monkeypatch, "demonstration", demo=lambda outdir, **options: calls.append((outdir, options)))
    assert cli.main(["demo", *words]) == 0
    assert calls == [(outdir, {"threads": threads})]


class Stack:
    """A stand-in for a stack: five images, the last without a class."""

    n_images, box, pixel_size_A = 5, 64, 1.5

    def __init__(self, columns):
        self.columns = columns

    def header_names(self):
        return {name: sum(value is not None for value in values) for name, values in self.columns.items()}

    def column(self, name):
        return self.columns[name]


def open_instead(monkeypatch, stack):
    monkeypatch.setattr("mrefali.information.open_stack", lambda path: stack)


def test_info_counts_the_particles_of_each_class(monkeypatch, capsys):
    open_instead(monkeypatch, Stack({"ctf": ["E"] * 5, "assign": [2, 0, 2, 2, None]}))
    assert cli.main(["info", "stack.hdf"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "stack.hdf: 5 images of 64 x 64 px, 1.5 A a pixel".split(),
        "headers and the number of images that have them:".split(),
        ["assign", "4"], ["ctf", "5"],
        "particles of each class:".split(),
        ["0", "1"], ["2", "3"], ["no", "class", "yet", "1"]]


def test_info_counts_what_is_no_class_apart(monkeypatch, capsys):
    open_instead(monkeypatch, Stack({"assign": [1, [1, 2], "one", 0.0, None]}))
    assert cli.main(["info", "stack.hdf"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-5:]] == [
        "particles of each class:".split(), ["0.0", "1"], ["1", "1"], ["no", "class", "yet", "1"],
        ["not", "a", "number", "2"]]


def test_info_tells_the_size_of_each_class_average(monkeypatch, capsys):
    stack = Stack({"ave_n": [7, 0, 3, 4, None]})
    stack.pixel_size_A = None
    open_instead(monkeypatch, stack)
    assert cli.main(["info", "aqm000.hdf"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("pixel size unknown")
    assert [line.split() for line in lines[-6:]] == [
        "particles in each class average:".split(), ["0", "7"], ["1", "0"], ["2", "3"], ["3", "4"],
        ["4", "unknown"]]


HEADER_DEFAULTS = dict(zero=False, one=False, consecutive=False, randomize=False, import_=None, export=None,
                       print_=False, rand_seed=1000)


@pytest.mark.parametrize(("words", "options"), [
    (["--zero"], {"zero": True}),
    (["--import=a.csv"], {"import_": "a.csv"}),
    (["--import", "a.csv"], {"import_": "a.csv"}),
    (["--print"], {"print_": True}),
    (["--export=a.txt", "--consecutive=no"], {"export": "a.txt"}),
    (["--randomize", "--rand-seed=3"], {"randomize": True, "rand_seed": 3}),
])
def test_header_hands_on_its_options(monkeypatch, words, options):
    calls = []
    replace_module(monkeypatch, "headers", header=lambda *values, **options: calls.append((values, options)))
    assert cli.main(["header", "stack.hdf", "--params=a,b", *words]) == 0
    assert cli.sxheader(["stack.hdf", "--params=a,b", *words]) == 0
    assert calls == [(("stack.hdf", "a,b"), HEADER_DEFAULTS | options)] * 2


@pytest.mark.parametrize(("word", "message"), [
    ("--import_=a.csv", "unknown option --import_: did you mean --import?"),
    ("--import", "--import has no value: give a text"),
    ("--prin", "unknown option --prin: did you mean --print?"),
])
def test_a_trailing_underscore_is_none_of_the_command_line(monkeypatch, capsys, word, message):
    replace_module(monkeypatch, "headers", header=raiser(AssertionError("ran")))
    assert message in refusal(capsys, ["header", "stack.hdf", "--params=a", word])


def test_transform2d_hands_on_its_options(monkeypatch):
    calls = []
    replace_module(monkeypatch, "transforms", transform2d=lambda *values, **options: calls.append((values, options)))
    assert cli.main(["transform2d", "a.hdf", "b.hdf"]) == 0
    assert cli.sxtransform2d(["a.hdf", "b.hdf", "--interpolation=fourier"]) == 0
    assert calls == [(("a.hdf", "b.hdf"), {"interpolation": "quadratic"}),
                     (("a.hdf", "b.hdf"), {"interpolation": "fourier"})]


# ---- the installed scripts -------------------------------------------------------------------------------

def run(*words, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **options)


def test_the_scripts_and_the_module_are_one_command_line():
    usages = {run(*call, "--help").stdout.splitlines()[0] for call in (
        [SCRIPTS / "mrefali", "mref_ali2d"], [sys.executable, "-m", "mrefali", "mref_ali2d"])}
    assert usages == {"usage: mrefali mref_ali2d STACK REFS OUTDIR [MASK] [--OPTION=VALUE ...]"}
    for script, arguments in (("sxmref_ali2d.py", "STACK REFS OUTDIR [MASK]"), ("sxtransform2d.py", "STACK OUT"),
                              ("sxheader.py", "STACK --params=TEXT"), ("sxali2d.py", "STACK OUTDIR [MASK]"),
                              ("sxk_means.py", "STACK OUTDIR [MASK] --K=INT"),
                              ("sxk_means_groups.py", "STACK OUTDIR [MASK]")):
        old = run(SCRIPTS / script, "--help")
        assert (old.returncode, old.stderr) == (0, "")
        assert old.stdout.startswith(f"usage: {script} {arguments} [--OPTION=VALUE ...]\n")


def test_a_script_exits_2_with_one_line(tmp_path):
    done = run(SCRIPTS / "sxmref_ali2d.py", "a.hdf", "b.hdf", "out", "--ctf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mrefali: error: unknown option --ctf: did you mean --CTF?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [
    ["--help"], ["mref_ali2d", "--help"], ["--version"], ["mref_ali2d", "--zzz"]])
def test_help_imports_nothing_heavy(words):
    code = (f"import sys; from mrefali.cli import main; main({words!r}); "
            "sys.exit(', '.join({'numpy', 'numba', 'scipy', 'h5py', 'fire'} & set(sys.modules)) or None)")
    assert run(sys.executable, "-c", code).returncode == 0


def test_a_reader_that_leaves_ends_the_program_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([SCRIPTS / "mrefali", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_reader_that_leaves_does_not_end_a_run():
    code = """
import logging, sys, types
from mrefali.cli import main
def work(*args, **options):
    for i in range(3):
        logging.getLogger("mrefali.run").info("iteration %d", i)
    print("done", file=sys.stderr)
sys.modules["mrefali.run"] = types.SimpleNamespace(mref_ali2d=work)
sys.exit(main(["mref_ali2d", "a", "b", "c"]))
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"done\n")


def test_a_name_the_terminal_cannot_show_is_still_printed():
    code = """
import sys, types
from mrefali.cli import main
sys.modules["mrefali.demonstration"] = types.SimpleNamespace(demo=lambda outdir, threads: print(outdir))
sys.exit(main(["demo", "gr\\u00f6\\u00dfe"]))
"""
    done = run(sys.executable, "-c", code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "gr\\xf6\\xdfe\n", "")


def test_help_on_a_terminal_opens_no_pager():
    child = pexpect.spawn(str(SCRIPTS / "mrefali"), ["mref_ali2d", "--help"], timeout=30, dimensions=(5, 80))
    text = child.read().decode()  # to the end of the output: a pager would wait for a key until the timeout
    child.close()
    assert child.exitstatus == 0
    assert text.startswith("usage: mrefali mref_ali2d")
    assert "--check" in text
    assert "\x1b" not in text
