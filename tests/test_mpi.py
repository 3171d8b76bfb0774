"""The main job on two MPI ranks: the same bits as one process; started without --MPI it is refused."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import small
from test_io_hdf import contents

import mrefali
from mrefali import cli
from mrefali.io import open_stack

MPIEXEC = Path(sys.executable).parent / "mpiexec"

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")


def same_files(one, other):
    """Hold what two runs left in their folders against each other, to the bit but for log and times."""
    assert sorted(os.listdir(one / "out")) == sorted(os.listdir(other / "out"))
    for file in (one / "out").iterdir():
        if file.suffix in (".csv", ".txt"):
            assert file.read_bytes() == (other / "out" / file.name).read_bytes()
        elif file.suffix == ".hdf":
            assert contents(file) == contents(other / "out" / file.name)
    assert contents(one / "stack.hdf") == contents(other / "stack.hdf")


def launch(*words, ranks=2):
    """The finished ``mpiexec -n RANKS mrefali mref_ali2d ...``; a hang fails the test."""
    return launch_python("-m", "mrefali", "mref_ali2d", *words, ranks=ranks)


def launch_python(*words, ranks):
    return subprocess.run([MPIEXEC, "-n", str(ranks), sys.executable, *words], capture_output=True, text=True,
                          timeout=600)


CORES = len(os.sched_getaffinity(0))


def crowded(ranks, threads=1):
    """What is said where the ranks have more threads than cores."""
    if ranks * threads <= CORES:
        return ""
    return (f"mrefali: warning: {ranks} ranks of {threads} threads share {CORES} cores, which takes longer than "
            f"{CORES} threads in all: give fewer ranks, or --threads={max(1, CORES // ranks)}\n")


def write(folder):
    folder.mkdir()
    return *small.write(folder), str(folder / "out")


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "mpi")


@pytest.mark.parametrize(("ranks", "vanishing"), [(1, False), (2, True), (3, False), (4, True)])
def test_ranks_find_what_one_process_finds_to_the_bit(tmp_path, files, ranks, vanishing):
    _, refs, outdir = files
    one = write(tmp_path / "serial")
    if vanishing:
        for path in (refs, one[1]):
            mrefali.write_stack(path, np.stack([*small.references(), -small.references()[0]]))
    done = launch(*files, *small.WORDS, "--maxit=2", "--MPI", ranks=ranks)
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines(keepends=True) if "have fewer than four particles" not in line]
    assert "".join(said) == crowded(ranks)
    mrefali.mref_ali2d(*one, maxit=2, **small.OPTIONS)
    same_files(tmp_path / "mpi", tmp_path / "serial")
    assert (0 in open_stack(Path(outdir) / "aqm000.hdf").column("ave_n")) is vanishing


#: The main job at the command line, so many bytes of pixels at a time.
IN_BLOCKS = """
import sys
from mrefali import cli, memory
memory.BLOCK_BYTES = int(sys.argv[1])
sys.exit(cli.main(["mref_ali2d", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(("ranks", "threads", "particles_a_block"), [(1, 2, 5), (2, 1, 3), (3, 2, 1), (4, 1, 4)])
def test_ranks_threads_and_blocks_change_no_bit(tmp_path, files, ranks, threads, particles_a_block):
    threads = min(threads, CORES)
    done = launch_python("-c", IN_BLOCKS, str(particles_a_block * 4 * small.BOX**2), *files, *small.WORDS, "--maxit=2",
                         "--MPI", f"--threads={threads}", ranks=ranks)
    assert (done.returncode, done.stderr) == (0, crowded(ranks, threads))
    assert f"; {particles_a_block} particles are read at a time\n" in done.stdout
    mrefali.mref_ali2d(*write(tmp_path / "serial"), maxit=2, **small.OPTIONS)
    same_files(tmp_path / "mpi", tmp_path / "serial")


#: Arrays of as many numbers as the rank, none of rank 0, gathered; one of them of several fields.
GATHER = """
import numpy as np
from mrefali.geometry import make_poses
from mrefali.parallel import mpi
comm = mpi()
some = comm.rank + np.arange(comm.rank)
whole, poses = comm.gather(some), comm.gather(make_poses(some, 0.5, -some, 1))
if comm.is_root:
    assert whole.tolist() == [1, 2, 3, 3, 4, 5] and whole.dtype == np.int64
    assert poses.tobytes() == make_poses(whole, 0.5, -whole, 1).tobytes()
    print("gathered")
else:
    assert whole is None and poses is None
"""


def test_arrays_of_any_length_and_type_are_gathered_in_order_of_rank():
    done = launch_python("-c", GATHER, ranks=4)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gathered\n", "")


#: Five items shared by four ranks, and fewer than there are ranks.
EACH = """
from mrefali.parallel import mpi
comm = mpi()
made = [comm.each(lambda item: (item, comm.rank), list(range(n))) for n in (5, 2, 0)]
assert made == [[(0, 0), (1, 1), (2, 2), (3, 3), (4, 0)], [(0, 0), (1, 1)], []]
print("made")
"""


def test_each_item_is_made_by_one_rank_and_all_ranks_have_all_in_order():
    done = launch_python("-c", EACH, ranks=4)
    assert (done.returncode, done.stdout.count("made"), done.stderr) == (0, 4, "")  # ranks print into one another


#: Ranks of which two are on each machine, so their names say.
MACHINES = """
import os
from types import SimpleNamespace
from mrefali import parallel, warmup
comm = parallel.mpi()
os.uname = lambda: SimpleNamespace(nodename=f"machine{comm.rank // 2}")
warmup._run_all = lambda: print(f"rank {comm.rank} compiles", flush=True)
warmup.compile_kernels(comm)
"""


def test_one_rank_of_each_machine_compiles():
    done = launch_python("-c", MACHINES, ranks=4)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["rank 0 compiles", "rank 2 compiles"]


@pytest.mark.parametrize("policy", ["split", "keep", "reseed"])
def test_ranks_replace_a_vanished_class_as_one_process_does(tmp_path, files, policy):
    one = write(tmp_path / "serial")
    for path in (files[1], one[1]):
        mrefali.write_stack(path, np.stack([*small.references(), -small.references()[0]]))
    done = launch(*files, *small.WORDS, "--maxit=2", "--MPI", f"--vanished={policy}")
    assert done.returncode == 0
    mrefali.mref_ali2d(*one, maxit=2, vanished=policy, **small.OPTIONS)
    same_files(tmp_path / "mpi", tmp_path / "serial")
    assert open_stack(Path(files[2]) / "aqm000.hdf").column("ave_n")[2] == 0


@pytest.mark.jit_only
def test_ranks_weight_by_the_ctf_as_one_process_does(tmp_path):
    case = golden.load("ctf")
    words = [f"--{golden.WORDS.get(name, name)}={value}" for name, value in case.call.items()]
    done = launch(*case.write(tmp_path / "mpi"), *words, "--maxit=2", "--MPI")
    assert (done.returncode, done.stderr) == (0, crowded(2))
    mrefali.mref_ali2d(*case.write(tmp_path / "serial"), maxit=2, **case.call)
    same_files(tmp_path / "mpi", tmp_path / "serial")


def test_averages_that_center_limit_leaves_are_in_the_log_whichever_rank_made_them(tmp_path, files):
    words, logs = [*small.WORDS, "--center_limit=0.05", "--maxit=1"], []
    assert launch(*files, *words, "--MPI").returncode == 0
    assert cli.main(["mref_ali2d", *write(tmp_path / "serial"), *words]) == 0
    same_files(tmp_path / "mpi", tmp_path / "serial")
    for folder in ("mpi", "serial"):
        lines = (tmp_path / folder / "out/mrefali.log").read_text().splitlines()
        logs.append([line[line.index("class "):] for line in lines if "the average stays where it is" in line])
    assert logs[0] == logs[1]
    assert [line.split(":")[0] for line in logs[0]] == ["class 0", "class 1"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_reference_function_that_fails_ends_all_ranks(tmp_path, files, ranks):
    """It fails on two ranks; one says so, and none waits for ever."""
    (tmp_path / "own.py").write_text("def fails(mask, center, average, frc):\n    raise ValueError('no')\n")
    before = contents(files[0])
    done = launch(*files, *small.WORDS, "--maxit=1", "--MPI", f"--function={tmp_path / 'own.py'}:fails", ranks=ranks)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 2  # of the function, and of its call: one rank's
    assert "own.py:fails failed for class 0: ValueError: no\n" in done.stderr
    assert contents(files[0]) == before


def test_a_reference_function_that_fails_on_another_rank_is_reported_as_on_the_first(tmp_path, files):
    (tmp_path / "own.py").write_text("""
def fails(mask, center, average, frc):
    from mpi4py import MPI
    if MPI.COMM_WORLD.Get_rank() == 1:
        raise ValueError("no")
    return average, (0, 0)
""")
    before = contents(files[0])
    done = launch(*files, *small.WORDS, "--maxit=1", "--MPI", f"--function={tmp_path / 'own.py'}:fails")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 2
    assert "own.py:fails failed for class 1: ValueError: no\n" in done.stderr
    assert contents(files[0]) == before


#: The main job at the command line, but one rank has another stack, or cannot search, or is killed, or loses its stack.
ODD_RANK = """
import os, signal, sys
from mpi4py import MPI
from mrefali import cli, refine
from mrefali.io import HdfStack
search = refine.Aligner.__call__
rank, fault, stack, *words = int(sys.argv[1]), sys.argv[2], *sys.argv[3:]
def no_search(*arguments):
    raise OSError(5, "Input/output error", stack)
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def lose_stack(*arguments):
    HdfStack._read = lambda self, indices: open("gone.hdf")
    return search(*arguments)
if rank == MPI.COMM_WORLD.Get_rank():
    if fault == "missing":
        stack = "none.hdf"
    else:
        refine.Aligner.__call__ = {"search": no_search, "killed": killed, "gone": lose_stack}[fault]
sys.exit(cli.main(["mref_ali2d", stack, *words]))
"""


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_what_one_cannot_find(files, rank, ranks):
    done = launch_python("-c", ODD_RANK, str(rank), "missing", *files, *small.WORDS, "--MPI", ranks=ranks)
    assert (done.returncode, done.stderr) == (2, crowded(ranks) + "mrefali: error: none.hdf does not exist\n")
    assert not os.path.exists(files[2])


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_fails_in_the_run_says_so_and_ends_all(files, ranks):
    before = contents(files[0])
    done = launch_python("-c", ODD_RANK, "1", "search", *files, *small.WORDS, "--MPI", ranks=ranks)
    assert done.returncode == 1
    assert f"mrefali: error: {files[0]}: Input/output error; {files[0]} is as it was\n" in done.stderr
    assert done.stderr.count("error:") == 1
    assert contents(files[0]) == before


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 3)])
def test_a_killed_rank_takes_all_others_with_it(files, rank, ranks):
    """Nobody is left to say why; the launcher says that a signal ended it."""
    before = contents(files[0])
    done = launch_python("-c", ODD_RANK, str(rank), "killed", *files, *small.WORDS, "--MPI", ranks=ranks)
    assert done.returncode not in (0, 2)
    assert "iteration 0 (" not in done.stdout
    assert contents(files[0]) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_is_lost_to_one_rank_in_the_run_is_named_and_ends_all(files, rank):
    done = launch_python("-c", ODD_RANK, str(rank), "gone", *files, *small.WORDS, "--maxit=9", "--MPI", ranks=2)
    assert done.returncode == 1
    assert "mrefali: error: gone.hdf: No such file or directory; " in done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout.count("(1 of 9)") == 1
    assert "(2 of 9)" not in done.stdout


def test_ranks_share_the_cores_and_a_crowd_is_said_once(files, tmp_path):
    assert launch(*files, *small.WORDS, "--maxit=1", "--MPI").stderr == crowded(2)
    assert f" threads_used: {max(1, CORES // 2)}\n" in (Path(files[2]) / "mrefali.log").read_text()
    done = launch(*files[:2], str(tmp_path / "more"), *small.WORDS, "--maxit=1", "--MPI", f"--threads={CORES}")
    assert (done.returncode, done.stderr) == (0, crowded(2, CORES))
    assert f" threads_used: {CORES}\n" in (tmp_path / "more/mrefali.log").read_text()


def test_ranks_report_once_and_say_how_many_they_are(files):
    done = launch(*files, *small.WORDS, "--maxit=1", "--MPI")
    assert done.stdout.count("iteration 0 (1 of 1)") == 1
    assert done.stdout.count("search for a centred particle") == 1
    assert " ranks: 2\n" in (Path(files[2]) / "mrefali.log").read_text()


def test_the_root_alone_writes_the_live_page(files):
    done = launch(*files, *small.WORDS, "--maxit=2", "--MPI", "--threads=1", "--live")
    assert (done.returncode, done.stderr) == (0, crowded(2))
    assert done.stdout.count("the page of the run: ") == 1
    assert "finished after 2 iterations" in Path(files[2], "report.html").read_text("utf-8")
    assert [name for name in os.listdir(files[2]) if name.endswith(".part")] == []


def test_ranks_check_once_and_touch_nothing(files):
    before = Path(files[0]).read_bytes()
    done = launch(*files, *small.WORDS, "--MPI", "--check")
    assert (done.returncode, done.stderr) == (0, crowded(2))
    assert done.stdout.count("MB of memory a rank") == 1
    assert "2 ranks" in done.stdout
    assert Path(files[0]).read_bytes() == before
    assert not os.path.exists(files[2])


def test_ranks_without_mpi_are_refused(files):
    before = Path(files[0]).read_bytes()
    done = launch(*files, *small.WORDS)
    assert done.returncode == 2
    assert "MPI=False, but a launcher started 2 processes" in done.stderr
    assert "give --MPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert Path(files[0]).read_bytes() == before
    assert not os.path.exists(files[2])


@pytest.mark.parametrize("index", [0, small.N_PARTICLES - 1], ids=["of-rank-0", "of-rank-1"])
def test_all_ranks_refuse_a_bad_pixel_of_any(files, index):
    particles = small.particles()
    particles[index, 2, 3] = np.nan
    stack = open_stack(files[0])
    mrefali.write_stack(files[0], particles, [stack.header(i) for i in range(stack.n_images)])
    done = launch(*files, *small.WORDS, "--MPI")
    assert done.returncode == 2
    assert f"image {index} has a NaN or infinite pixel" in done.stderr
    assert done.stderr.count("error") == len(done.stderr.removeprefix(crowded(2)).splitlines()) == 1
    assert not os.path.exists(files[2])


def test_all_ranks_refuse_an_outdir_that_exists(files):
    os.mkdir(files[2])
    done = launch(*files, *small.WORDS, "--MPI")
    assert done.returncode == 2
    assert "out: the output directory exists already" in done.stderr
    assert done.stderr.count("error") == len(done.stderr.removeprefix(crowded(2)).splitlines()) == 1
    assert os.listdir(files[2]) == []
