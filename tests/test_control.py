"""The noise control: noise that has the particles' spectrum, aligned to the same references, beside the particles."""

import numpy as np
import pytest
import small
from test_io_hdf import contents
from test_mpi import MPIEXEC, launch_python

from mrefali import cli, null
from mrefali.control import NoiseStack
from mrefali.errors import InputError
from mrefali.io import ArrayStack, open_stack, write_stack
from mrefali.simulation import simulate

OPTIONS = {"ou": 6, "xr": 1, "yr": 1, "center": 0}


def ring_power(images):
    n = images.shape[1]
    frequency = np.fft.fftfreq(n, 1 / n)
    ring = np.rint(np.hypot(frequency[:, None], frequency)).astype(int).ravel()
    power = (np.abs(np.fft.fft2(images)) ** 2).mean(axis=0).ravel()
    return np.bincount(ring, power) / np.bincount(ring), np.bincount(ring)


@pytest.mark.parametrize("box", [20, 21])
def test_noise_has_the_spectrum_of_the_stack(box):
    rng = np.random.default_rng(3)
    images = np.cumsum(rng.standard_normal((1000, box, box)), axis=2)  # more power at low frequency
    wanted, counts = ring_power(images)
    got, _ = ring_power(NoiseStack(ArrayStack(images, "x"), 1).read(0, 1000).astype(float))
    # the mean power of c coefficients, half of them free, in 1000 images is known to sqrt(2/(1000 c)); at five times
    np.testing.assert_allclose((got / wanted)[1:], 1.0, atol=5 * np.sqrt(2 / (1000 * counts[1:].min())))
    assert got[0] == pytest.approx(0, abs=1e-6 * wanted[1])


def test_noise_depends_on_its_index_alone():
    noise = NoiseStack(ArrayStack(small.particles(), "x"), 5)
    np.testing.assert_array_equal(noise.read(3, 9)[2], noise.read_at(np.array([7, 5]))[1])
    assert abs(np.corrcoef(noise.read(0, 2).reshape(2, -1))[0, 1]) < 5 / small.BOX


def test_bias_alone_is_found_and_less_than_what_signal_gives(tmp_path):
    stack, refs = str(tmp_path / "s.hdf"), str(tmp_path / "s_views.hdf")
    simulate(stack, 80, 2, 32, snr=1.0, max_shift=1.0, seed=4)
    before = small.snapshot(tmp_path)
    rows = null(stack, refs, str(tmp_path / "out"), ou=12, xr=1, yr=1)
    assert {path: state for path, state in small.snapshot(tmp_path).items() if path in before} == before
    assert [row["class"] for row in rows] == [0, 1]
    for row in rows:
        assert 0.1 < row["correlation_noise"] < row["correlation"]
        assert row["peak_noise"] < row["peak"]
    assert sum(row["count_noise"] for row in rows) == 80
    table = small.read_table(tmp_path / "out/null.csv")
    assert table["correlation"] == [row["correlation"] for row in rows]
    for name in ("particles", "noise"):
        assert open_stack(tmp_path / "out" / name / "multi_ref.hdf").n_images == 2


def test_references_bring_correlation_out_of_pure_noise(tmp_path):
    # a stack of noise is no better than its own control
    rng = np.random.default_rng(1)
    images = rng.standard_normal((200, 20, 20)).astype(np.float32)
    pose = np.eye(3, 4)
    write_stack(tmp_path / "s.hdf", images, [{"xform.align2d": pose} for _ in images], None)
    write_stack(tmp_path / "r.hdf", small.references()[:1], None, None)
    row, = null(str(tmp_path / "s.hdf"), str(tmp_path / "r.hdf"), str(tmp_path / "out"), **OPTIONS)
    assert row["correlation"] > 0.5
    assert row["correlation"] == pytest.approx(row["correlation_noise"], abs=0.2)
    assert row["peak"] == pytest.approx(row["peak_noise"], rel=0.1)


def test_it_prints_a_line_a_class(tmp_path, capsys):
    stack, refs = small.write(tmp_path)
    assert cli.main(["null", stack, refs, str(tmp_path / "out"), "--ou=6", "--xr=1", "--yr=1"]) == 0
    said = capsys.readouterr().out
    assert "class 1: " in said
    assert "null.csv" in said


def test_check_says_ranges_and_the_time_of_both_runs_and_touches_nothing(tmp_path, capsys, monkeypatch):
    stack, refs = small.write(tmp_path)
    monkeypatch.setattr("mrefali.run._search_and_sum_few", lambda plan, n: 3.0 if plan.stack.path == stack else 4.0)
    before = small.snapshot(tmp_path)
    words = ["null", stack, refs, str(tmp_path / "out"), "--ou=6", "--xr=1", "--yr=1", "--maxit=4"]
    assert cli.main([*words, "--check"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "24 particles of 20 x 20 px, 2 references, rings 1 to 6 px" in out
    assert "x -1 to 1 px, y -1 to 1 px" in out
    assert "MB of memory a rank" in out
    assert "about 7 s an iteration, 28 s for 4" in out
    assert len(out.splitlines()) == 3
    assert small.snapshot(tmp_path) == before


def test_check_refuses_what_the_run_would(tmp_path, capsys):
    stack, refs = small.write(tmp_path)
    assert cli.main(["null", stack, refs, str(tmp_path), "--ou=6", "--check"]) == 2
    assert f"{tmp_path}: the output directory exists already" in capsys.readouterr().err


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_ranks_check_once_and_touch_nothing(tmp_path):
    stack, refs = small.write(tmp_path)
    before = small.snapshot(tmp_path)
    done = launch_python("-m", "mrefali", "null", stack, refs, str(tmp_path / "out"), "--ou=6", "--threads=1", "--MPI",
                         "--check", ranks=2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("MB of memory a rank") == 1
    assert "2 ranks" in done.stdout
    assert small.snapshot(tmp_path) == before


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_two_ranks_write_what_one_does(tmp_path):
    stack, refs = small.write(tmp_path)
    words = ["null", stack, refs, "--ou=6", "--xr=1", "--yr=1", "--center=-1", "--maxit=2", "--quiet"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*words[:3], str(one), *words[3:]]) == 0
    done = launch_python("-m", "mrefali", *words[:3], str(two), *words[3:], "--MPI", "--threads=1", ranks=2)
    assert (done.returncode, done.stdout) == (0, "")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    compared = [file for file in files if file.suffix in (".csv", ".txt", ".hdf")]
    assert {"null.csv", "particles/poses.csv", "noise/aqm001.hdf"} <= {str(file) for file in compared}
    for file in compared:
        read = contents if file.suffix == ".hdf" else type(file).read_bytes
        assert read(one / file) == read(two / file), file


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_all_ranks_refuse_a_directory_that_is_there(tmp_path):
    stack, refs = small.write(tmp_path)
    done = launch_python("-m", "mrefali", "null", stack, refs, str(tmp_path), "--ou=6", "--threads=1", "--MPI", ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("mrefali: error: ") == 1
    assert f"{tmp_path}: the output directory exists already" in done.stderr


def test_mirror_and_subpixel_reach_both_runs(tmp_path):
    stack, refs = small.write(tmp_path)
    runs = {"plain": {}, "straight": {"mirror": False}, "refined": {"subpixel": True}}
    for name, options in runs.items():
        null(stack, refs, str(tmp_path / name), **OPTIONS, **options)
    for part in ("particles", "noise"):
        plain, straight, refined = (small.read_table(tmp_path / name / part / "poses.csv") for name in runs)
        assert 0 < sum(plain["mirror"])
        assert sum(straight["mirror"]) == 0
        assert refined["mirror"] == plain["mirror"]
        assert refined["sx"] != plain["sx"]


@pytest.mark.parametrize(("options", "message"), [
    ({"rand_seed": -1}, "rand_seed=-1 is not allowed"),
    ({"ou": 60}, "ou=60 does not fit"),
])
def test_a_bad_option_is_refused_and_nothing_made(tmp_path, options, message):
    stack, refs = small.write(tmp_path)
    with pytest.raises(InputError, match=message):
        null(stack, refs, str(tmp_path / "out"), **(OPTIONS | options))
    assert not (tmp_path / "out").exists()
