"""K-means of aligned particles: known classes are found, the files are those of a run, the bits are always the same."""

import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest
import small
from test_io_hdf import contents
from test_mpi import MPIEXEC, launch_python, same_files

import mrefali
from mrefali import accuracy, average, cli, clustering
from mrefali.errors import InputError, RunFailed, Stopped
from mrefali.geometry import disc, identity_poses, to_matrices
from mrefali.io import HdfStack, open_stack, write_mrcs, write_stack
from mrefali.simulation import read_truth, simulate, simulate_particles

OPTIONS = {"K": 2, "ou": 6, "quiet": True}


def images():
    """The views of ``small`` as they are, in noise, (N_PARTICLES, BOX, BOX) float32."""
    rng = np.random.default_rng(2)
    views = small.references()[small_classes()]
    return (2 * views + rng.standard_normal(views.shape)).astype(np.float32)


def small_classes():
    """Every third particle is of view 0, the others of view 1."""
    return (np.arange(small.N_PARTICLES) % 3 != 0).astype(int)


def write(folder):
    """A stack of two classes, every second particle mirrored as its pose says; its path and that of an OUTDIR."""
    folder.mkdir(exist_ok=True)
    turned, poses = images(), identity_poses(small.N_PARTICLES)
    poses["mirror"] = np.arange(small.N_PARTICLES) % 2
    turned[1::2] = np.roll(turned[1::2, :, ::-1], 1, axis=2)  # about pixel n // 2
    stack = str(folder / "stack.hdf")
    write_stack(stack, turned, [{"xform.align2d": m, "quality": i / 7} for i, m in enumerate(to_matrices(poses))], 2.5)
    return stack, str(folder / "out")


def share_in_common(assign, classes, n_classes):
    counts = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(counts, (np.asarray(assign), np.asarray(classes)), 1)
    return accuracy.adjusted_rand(counts)


def aligned(path, made):
    write_stack(path, made.images, [{"xform.align2d": m} for m in to_matrices(made.poses)])
    return path


# --- k_means


@pytest.mark.jit_only
@pytest.mark.parametrize("snr", [1.0, 0.2])
def test_known_classes_are_found(tmp_path, snr):
    made = simulate_particles(150, 3, 32, snr=snr, max_shift=2.0, seed=3)
    stack = aligned(str(tmp_path / "s.hdf"), made)
    assert cli.main(["k_means", stack, str(tmp_path / "out"), "--K=3", "--ou=12", "--quiet"]) == 0
    assert share_in_common(open_stack(stack).column("assign"), made.classes, 3) > 0.95


@pytest.mark.jit_only
def test_known_classes_are_found_under_a_ctf(tmp_path):
    stack = str(tmp_path / "s.hdf")
    simulate(stack, 150, 3, 64, snr=0.3, max_shift=2.0, seed=3, CTF=True)
    classes, poses = read_truth(tmp_path / "s_truth.csv")
    open_stack(stack).write_columns({"xform.align2d": poses})
    mrefali.k_means(stack, str(tmp_path / "out"), K=3, ou=24, CTF=True, snr=0.3, quiet=True)
    assert share_in_common(open_stack(stack).column("assign"), classes, 3) > 0.95
    # the Wiener division gives back what the CTF took: means of the multiplied particles reach 0.83
    averages, views = (open_stack(tmp_path / name).read(0, 3) for name in ("out/multi_ref.hdf", "s_views.hdf"))
    inside = disc(64, 24)
    best = [max(np.corrcoef(image[inside], view[inside])[0, 1] for view in views) for image in averages]
    assert min(best) > 0.95


def test_what_is_left_is_that_of_a_run_and_only_the_classes_of_the_stack_change(tmp_path, capsys):
    stack, out = write(tmp_path)
    before = contents(stack)
    assert cli.main(["k_means", stack, out, "--K=2", "--ou=6"]) == 0
    said = capsys.readouterr().out
    assert "24 particles of 20 x 20 px, 113 pixels under the mask" in said
    assert "classes 8/12/16 (smallest/median/largest)" in said
    assert f"done: averages and FRC curves in {out}, assign in the headers of {stack}" in said
    found = open_stack(stack)
    assert found.column("assign") == (1 - small_classes()).tolist()  # the larger class is the first
    found.write_columns({"assign": np.zeros(small.N_PARTICLES, np.int32)})
    open_stack(write(tmp_path / "again")[0]).write_columns({"assign": np.zeros(small.N_PARTICLES, np.int32)})
    assert contents(stack) == contents(tmp_path / "again/stack.hdf") != before
    run = mrefali.open_run(out)
    assert (run.state, run.n_iterations, run.n_references, run.parameters["K"]) == ("finished", 1, 2, 2)
    assert run.counts.tolist() == [[16, 8]]
    assert run.parameters["scikit-learn"]
    assert open_stack(os.path.join(out, "aqm000.hdf")).column("ave_n") == [16, 8]
    assert open_stack(os.path.join(out, "multi_ref.hdf")).header(1)["members"].tolist() == list(range(0, 24, 3))
    assert "K-means by the poses that there were" in (tmp_path / "out/report.html").read_text("utf-8")
    mrefali.montage(out, str(tmp_path / "m.png"))
    assert mrefali.select(out, str(tmp_path / "chosen.hdf"), classes=[1]) == [1]
    assert open_stack(tmp_path / "chosen.hdf").n_images == 8
    assert cli.main(["watch", out, "--once"]) == 0


def test_averages_are_means_of_the_members_and_peaks_their_correlations(tmp_path):
    stack, out = write(tmp_path)
    mrefali.k_means(stack, out, **OPTIONS)
    particles, inside = open_stack(stack).read(0, small.N_PARTICLES), disc(small.BOX, 6)
    average.normalize_particles(particles, inside)
    moved = average.transform(particles, open_stack(stack).poses())
    averages = open_stack(os.path.join(out, "multi_ref.hdf")).read(0, 2)
    peaks = small.read_table(os.path.join(out, "poses.csv"))["peak"]
    for k in (0, 1):
        members = np.flatnonzero(small_classes() == 1 - k)
        mean = moved[members].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(averages[k], (mean - mean[inside].mean()) * inside, atol=1e-6)
        for i in members:
            assert peaks[i] == pytest.approx(np.corrcoef(moved[i][inside], mean[inside])[0, 1], abs=1e-5)


def test_a_class_too_small_for_halves_keeps_its_mean(tmp_path):
    stack, out = write(tmp_path)
    particles = open_stack(stack).read(0, small.N_PARTICLES)
    particles[:2] = 20 * np.indices((small.BOX, small.BOX))[0]
    write_stack(stack, particles, [open_stack(stack).header(i) for i in range(small.N_PARTICLES)])
    mrefali.k_means(stack, out, K=3, ou=6, quiet=True)
    run = mrefali.open_run(out)
    assert run.counts.tolist()[0][2] == 2
    assert run.vanished.tolist() == [False, False, True]
    assert open_stack(os.path.join(out, "multi_ref.hdf")).header(2)["members"].tolist() == [0, 1]
    gradient = run.averages[2][disc(small.BOX, 6)]
    assert np.corrcoef(gradient, particles[0][disc(small.BOX, 6)])[0, 1] > 0.999


def test_a_mask_says_which_pixels_are_compared(tmp_path, capsys):
    stack, out = write(tmp_path)
    mask = np.zeros((small.BOX, small.BOX), np.float32)
    mask[6:15, 6:15], mask[9, 9] = 0.6, 0.4
    write_stack(tmp_path / "mask.hdf", mask[None])
    assert cli.sxk_means([stack, out, str(tmp_path / "mask.hdf"), "--K=2"]) == 0
    assert " 80 pixels under the mask" in capsys.readouterr().out


def test_files_of_other_formats_stay_as_they_are(tmp_path, capsys):
    write_mrcs(tmp_path / "s.mrcs", [images()], small.N_PARTICLES, small.BOX, 2.5)
    before = (tmp_path / "s.mrcs").read_bytes()
    assert cli.main(["k_means", str(tmp_path / "s.mrcs"), str(tmp_path / "out"), "--K=2", "--ou=6"]) == 0
    said = capsys.readouterr()
    assert "s.mrcs has no poses: its particles are compared as they are" in said.err
    assert f"poses and classes in {tmp_path}/out/particles.star" in said.out
    assert (tmp_path / "s.mrcs").read_bytes() == before
    assert {"particles.star", "class_averages.mrcs"} <= set(os.listdir(tmp_path / "out"))


def test_where_headers_cannot_be_written_the_stack_is_copied_with_its_classes(tmp_path, monkeypatch, capsys):
    stack, out = write(tmp_path)
    before = Path(stack).read_bytes()
    monkeypatch.setattr(HdfStack, "write_back_obstacle", lambda self: "it is engraved in stone")
    assert cli.main(["k_means", stack, out, "--K=2", "--ou=6"]) == 0
    assert f"the headers of {stack} cannot be written back: it is engraved in stone" in capsys.readouterr().err
    assert Path(stack).read_bytes() == before
    copy = open_stack(os.path.join(out, "poses.hdf"))
    assert copy.column("assign") == (1 - small_classes()).tolist()
    assert copy.poses().tobytes() == open_stack(stack).poses().tobytes()


# --- the same however it is run


def test_blocks_and_threads_change_no_bit(tmp_path, monkeypatch):
    for name, threads, block in (("one", 1, 1 << 20), ("two", min(2, len(os.sched_getaffinity(0))), 5)):
        monkeypatch.setattr("mrefali.particles.BLOCK_BYTES", block * 4 * small.BOX**2)
        monkeypatch.setattr("mrefali.memory.BLOCK_BYTES", block * 4 * small.BOX**2)
        mrefali.k_means(*write(tmp_path / name), K=5, ou=6, threads=threads, quiet=True)
    same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_change_no_bit(tmp_path, ranks):
    done = launch_python("-m", "mrefali", "k_means", *write(tmp_path / "mpi"), "--K=5", "--ou=6", "--MPI",
                         "--threads=1", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1
    mrefali.k_means(*write(tmp_path / "serial"), K=5, ou=6, quiet=True)
    same_files(tmp_path / "mpi", tmp_path / "serial")


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_ranks_refuse_together_and_say_it_once(tmp_path):
    stack, out = write(tmp_path)
    for command, words in (("k_means", ["--K=99"]), ("k_means_groups", ["--K1=5", "--K2=4"])):
        done = launch_python("-m", "mrefali", command, stack, out, *words, "--MPI", "--threads=1", ranks=2)
        assert done.returncode == 2
        assert done.stderr.count("mrefali: error: K") == 1
        assert "Traceback" not in done.stderr
    assert not os.path.exists(out)


def test_the_seed_decides_and_the_best_trial_counts(tmp_path):
    pixels = images()[:, disc(small.BOX, 6)]
    same = [clustering.cluster(pixels.copy(), 6, 100, 1, 7).assign for _ in range(2)]
    np.testing.assert_array_equal(*same)
    alone = [clustering.cluster(pixels, 6, 100, 1, seed, keep=True).within for seed in range(8)]
    assert len(set(alone)) > 1
    assert clustering.cluster(pixels, 6, 100, 30, 0, keep=True).within <= min(alone) * (1 + 1e-6)


def test_pixels_that_are_kept_are_not_touched():
    pixels = images()[:, disc(small.BOX, 6)]
    before = pixels.copy()
    kept = clustering.cluster(pixels, 4, 100, 3, 1, keep=True)
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(clustering.cluster(pixels, 4, 100, 3, 1).assign, kept.assign)


# --- k_means_groups


def test_criteria_are_those_of_their_formulas():
    pixels = images()[:, disc(small.BOX, 6)]
    found = clustering.cluster(pixels, 3, 100, 5, 1, keep=True)
    x, labels, n, k = pixels.astype(float), found.assign, len(pixels), 3
    means = np.array([x[labels == i].mean(axis=0) for i in range(k)])
    within = ((x - means[labels]) ** 2).sum()
    between = (np.bincount(labels)[:, None] * (means - x.mean(axis=0)) ** 2).sum()
    scatter = np.array([np.linalg.norm(x[labels == i] - means[i], axis=1).mean() for i in range(k)])
    ratios = [max((scatter[i] + scatter[j]) / np.linalg.norm(means[i] - means[j]) for j in range(k) if j != i)
              for i in range(k)]
    got = clustering.criteria(pixels, found)
    # float32 sums of 24 x 113 numbers
    assert got == pytest.approx({"coleman": between * within, "between": between, "within": within,
                                 "calinski_harabasz": between / (k - 1) / (within / (n - k)),
                                 "davies_bouldin": np.mean(ratios)}, rel=1e-4)


def test_each_criterion_prefers_its_own_end():
    rows = [{"K": k, "coleman": c, "calinski_harabasz": h, "davies_bouldin": d}
            for k, c, h, d in ((2, 1, 5, 2.0), (3, 4, 5, 0.5), (4, 3, 1, 0.7))]
    assert clustering.preferred(rows) == {"coleman": 3, "calinski_harabasz": 2, "davies_bouldin": 3}


@pytest.mark.jit_only
@pytest.mark.parametrize("n_views", [3, 5])
def test_the_number_of_classes_is_found_where_they_stand_apart(tmp_path, capsys, n_views):
    made = simulate_particles(200, n_views, 32, snr=5.0, max_shift=2.0, seed=8)
    stack, out = aligned(str(tmp_path / "s.hdf"), made), tmp_path / "out"
    before = Path(stack).read_bytes()
    assert cli.main(["k_means_groups", stack, str(out), "--K1=2", "--K2=7", "--ou=12"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^K=(\d)", said, flags=re.MULTILINE) == list("234567")
    assert f"Calinski-Harabasz prefers K={n_views}, Davies-Bouldin prefers K={n_views}; {stack} is as it was" in said
    assert Path(stack).read_bytes() == before
    assert sorted(os.listdir(out)) == ["groups.csv", "groups.png", "mrefali.log"]
    table = small.read_table(out / "groups.csv")
    assert table["K"] == [2, 3, 4, 5, 6, 7]
    assert np.argmax(table["calinski_harabasz"]) == np.argmin(table["davies_bouldin"]) == n_views - 2
    assert (np.diff(table["within"]) < 0).all()
    assert f"K={n_views}: " in (out / "mrefali.log").read_text()


def test_groups_and_k_means_find_the_same_classes(tmp_path):
    stack, out = write(tmp_path)
    rows = mrefali.k_means_groups(stack, out, K1=2, K2=5, ou=6, quiet=True)
    mrefali.k_means(stack, str(tmp_path / "five"), K=5, ou=6, quiet=True)
    counts = mrefali.open_run(str(tmp_path / "five")).counts[0]
    assert (counts[0], counts[-1]) == (rows[-1]["largest"], rows[-1]["smallest"])


def test_without_viz_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "missing_for_pictures", lambda: ["matplotlib"])
    stack, out = write(tmp_path)
    assert cli.sxk_means_groups([stack, out, "--K2=3", "--ou=6"]) == 0
    assert sorted(os.listdir(out)) == ["groups.csv", "mrefali.log"]


# --- what is refused, and what fails


@pytest.mark.parametrize(("options", "message"), [
    ({"K": 1}, "K=1 is not allowed: give 2 to 24 classes for the 24 particles of "),
    ({"K": 25}, "K=25 is not allowed: give 2 to 24 classes"),
    ({"K": 2.5}, "K=2.5 is not allowed: give a whole number"),
    ({"maxit": 0}, "maxit=0 is not allowed: give a whole number of at least 1"),
    ({"trials": 0}, "trials=0 is not allowed"),
    ({"rand_seed": -1}, "rand_seed=-1 is not allowed: give 0 to 4294967295"),
    ({"ou": 60}, "ou=60 does not fit"),
    ({"write_back": "x"}, "write_back=x is not allowed"),
    ({"max_memory": "2MB"}, r"max_memory=2MB is not enough for the 113 pixels under the mask of 24 particles: give "
                            r"--max_memory=\d+MB or more"),
    ({"max_memory": "much"}, "max_memory=much is not allowed"),
    ({"CTF": True}, "image 0 has no header ctf"),
])
def test_k_means_refuses_what_cannot_be_and_makes_nothing(tmp_path, options, message):
    stack, out = write(tmp_path)
    before = small.snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        mrefali.k_means(stack, out, **(OPTIONS | options))
    assert small.snapshot(tmp_path) == before


@pytest.mark.parametrize(("options", "message"), [
    ({"K1": 1}, "K1=1 is not allowed: give 2 to 23 classes"),
    ({"K2": 24}, "K2=24 is not allowed: give 2 to 23 classes"),
    ({"K1": 5, "K2": 4}, "K1=5 is above K2=4: give the fewest classes as K1, the most as K2"),
])
def test_k_means_groups_refuses_what_cannot_be_and_makes_nothing(tmp_path, options, message):
    stack, out = write(tmp_path)
    with pytest.raises(InputError, match=message):
        mrefali.k_means_groups(stack, out, ou=6, quiet=True, **options)
    assert not os.path.exists(out)


def test_the_memory_that_is_asked_for_is_enough(tmp_path):
    stack, out = write(tmp_path)
    with pytest.raises(InputError, match="is not enough") as refused:
        mrefali.k_means(stack, out, max_memory="2MB", **OPTIONS)
    mrefali.k_means(stack, out, max_memory=re.search(r"--max_memory=(\d+MB)", str(refused.value))[1], **OPTIONS)


@pytest.mark.parametrize(("command", "words"), [("k_means", ["--K=2"]), ("k_means_groups", [])])
def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch, capsys, command, words):
    stack, out = write(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert cli.main([command, stack, out, *words]) == 2
    assert capsys.readouterr().err == f"mrefali: error: {command} needs scikit-learn: pip install 'mrefali[classify]'\n"
    assert not os.path.exists(out)


def test_an_outdir_that_is_there_is_refused(tmp_path):
    stack, out = write(tmp_path)
    os.mkdir(out)
    for call in (lambda: mrefali.k_means(stack, out, **OPTIONS), lambda: mrefali.k_means_groups(stack, out, ou=6)):
        with pytest.raises(FileExistsError, match="directory exists already: give a new name, or remove it$"):
            call()
    assert os.listdir(out) == []


@pytest.mark.parametrize(("error", "kind", "message"), [
    (OSError(5, "Input/output error", "stack.hdf"), RunFailed, "stack.hdf: Input/output error; nothing was created"),
    (Stopped(15), Stopped, "stopped by SIGTERM: nothing was created or changed"),
])
@pytest.mark.parametrize("place", ["aligned_pixels", "cluster", "_averaged"])
def test_what_ends_before_all_is_found_leaves_nothing(tmp_path, monkeypatch, place, error, kind, message):
    stack, out = write(tmp_path)
    before = small.snapshot(tmp_path)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(clustering, place, fail)
    calls = [lambda: mrefali.k_means(stack, out, **OPTIONS)]
    if place != "_averaged":
        calls.append(lambda: mrefali.k_means_groups(stack, out, ou=6, quiet=True))
    for call in calls:
        with pytest.raises(kind, match=message):
            call()
        assert small.snapshot(tmp_path) == before


def test_headers_that_cannot_be_written_after_all_can_be_imported(tmp_path, monkeypatch, capsys):
    stack, out = write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HdfStack, "write_columns", lambda *arguments: open("/gone/stack.hdf"))
        assert cli.main(["k_means", stack, out, "--K=2", "--ou=6"]) == 1
    line = capsys.readouterr().err
    command = re.search(r"mrefali (header .*) puts it into the headers$", line, flags=re.MULTILINE)[1]
    assert cli.main(command.split()) == 0
    assert open_stack(stack).column("assign") == (1 - small_classes()).tolist()
    assert mrefali.open_run(out).n_iterations == 1
