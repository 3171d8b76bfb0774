"""The main job on files that are never written to: the same result, and where it goes."""

import io
import logging
import os

import formats
import mrcfile
import numpy as np
import pytest
import small
from test_mpi import MPIEXEC, launch

import mrefali
from mrefali import cli, fourier
from mrefali.geometry import disc, identity_poses, to_matrices
from mrefali.io import open_stack, write_stack

N = small.N_PARTICLES


@pytest.fixture
def files(tmp_path, monkeypatch):
    """``stack.hdf`` in the identity pose, ``refs.hdf``, and the same stack in ``a.*``; in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_stack("stack.hdf", small.particles(), [
        {"xform.align2d": matrix, "ctf": f"E{1 + i / 10} 0 0 50 10 300 2 2.5 0 0 0"}
        for i, matrix in enumerate(to_matrices(identity_poses(N)))], small.PIXEL_SIZE_A)
    write_stack("refs.hdf", small.references(), None, small.PIXEL_SIZE_A)
    for name in ("a.star", "a.spi", "a.npy", "refs.mrcs"):
        mrefali.convert("refs.hdf" if name == "refs.mrcs" else "stack.hdf", name)
    return tmp_path


def run(stack, outdir, refs="refs.hdf", **options):
    mrefali.mref_ali2d(stack, refs, outdir, maxit=2, **small.OPTIONS, **options)
    return outdir


@pytest.mark.parametrize("stack", ["a.star", "a.mrcs", "a.spi", "a.npy"])
def test_the_result_is_that_of_the_hdf_stack_and_the_input_stays(files, stack):
    before = small.snapshot(files)
    run(stack, "out", "refs.mrcs")
    after = small.snapshot(files)
    assert {path: after[path] for path in before} == before
    run("stack.hdf", "expected")
    for name in ("poses.csv", "drm0010001.txt"):
        assert (files / "out" / name).read_bytes() == (files / "expected" / name).read_bytes()
    expected, found = open_stack("stack.hdf"), open_stack("out/particles.star")
    np.testing.assert_allclose(to_matrices(found.poses()), to_matrices(expected.poses()), rtol=0, atol=1e-6)
    assert found.column("assign") == expected.column("assign")
    assert found.poses()["mirror"].any()
    np.testing.assert_array_equal(found.read(0, N), expected.read(0, N))
    assert found.pixel_size_A == (1.0 if stack == "a.npy" else 2.5)
    assert os.path.exists("out/particles.mrcs") == (stack in ("a.npy", "a.spi"))


def test_class_averages_are_there_as_mrcs_too(files):
    run("a.star", "out")
    averages = open_stack("out/multi_ref.hdf")
    with mrcfile.open("out/class_averages.mrcs") as file:
        np.testing.assert_array_equal(file.data, averages.read(0, 2))
        assert float(file.voxel_size.x) == 2.5
    said = io.StringIO()
    assert mrcfile.validate("out/class_averages.mrcs", said), said.getvalue()
    run("out/particles.star", "next", "out/class_averages.mrcs")  # a run goes on from there


def test_an_hdf_stack_gets_its_headers_and_no_star(files):
    run("stack.hdf", "out")
    assert not {"particles.star", "class_averages.mrcs"} & set(os.listdir("out"))


def test_particles_of_the_star_moved_by_their_poses_are_the_averages(files):
    """Whoever reads the STAR, with mirrors, sees the classes."""
    run("a.star", "out")
    stack = open_stack("out/particles.star")
    moved = fourier.transform(stack.read(0, N), stack.poses())
    assign, references = np.array(stack.column("assign")), open_stack("out/multi_ref.hdf").read(0, 2)
    inside = disc(small.BOX, small.OPTIONS["ou"])
    for k, reference in enumerate(references):
        mirrored = stack.poses()["mirror"][assign == k] != 0
        assert mirrored.any()
        for some in (moved[assign == k], moved[assign == k][mirrored]):
            right, flipped = (np.corrcoef(image[inside], reference[inside])[0, 1]
                              for image in (some.mean(axis=0), some.mean(axis=0)[:, ::-1]))
            expected = (1 + 1 / (len(some) * small.references()[k][inside].var())) ** -0.5  # the noise has variance 1
            assert right > max(expected - 0.15, flipped + 0.1)


def test_all_columns_and_the_optics_of_a_star_are_carried_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path)
    write_stack("refs.hdf", formats.IMAGES[:1], None, 2.5)
    mrefali.mref_ali2d("Select/particles.star", "refs.hdf", "out", ou=5, maxit=1, CTF=True)
    before, after = open_stack("Select/particles.star").table(), open_stack("out/particles.star").table()
    assert after.particles.keys() >= before.particles.keys()
    for label in ("rlnImageName", "rlnMicrographName", "rlnCoordinateX", "rlnDefocusU", "rlnPhaseShift"):
        assert list(after.particles[label]) == list(before.particles[label])
    for label, column in before.optics.items():
        assert list(after.optics[label]) == list(column)
    assert set(after.particles["rlnClassNumber"]) == {"1"}


def test_a_run_weighs_by_the_ctf_of_a_star_as_by_that_of_headers(files):
    run("a.star", "out", CTF=True, snr=0.5)
    run("stack.hdf", "expected", CTF=True, snr=0.5)
    found, expected = (open_stack(f"{name}/multi_ref.hdf").read(0, 2) for name in ("out", "expected"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())


def test_lines_say_where_poses_come_from_and_go_to(files, capsys):
    words = ["mref_ali2d", "a.mrcs", "refs.hdf", "out", "--maxit=1", *small.WORDS]
    assert cli.main([*words, "--check"]) == 0
    said = capsys.readouterr()
    assert "a.mrcs stays as it is; poses and classes will go into out/particles.star" in said.out
    assert "a.mrcs has no poses: the search starts from the identity" in said.out
    assert not (files / "out").exists()
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "poses and classes in out/particles.star" in said.out
    assert "particles are mirrored, which is rot = tilt = 180 and mrefaliMirror = 1 there" in said.out


def test_a_cs_of_sign_minus_1_is_aligned_inverted(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    formats.write_cs(tmp_path)
    write_stack("refs.hdf", -formats.IMAGES[:1], None, 2.5)
    mrefali.mref_ali2d("J12/particles.cs", "refs.hdf", "out", ou=5, maxit=1)
    found = open_stack("out/particles.star")
    assert "it names the images as they are in their files, not inverted though their blob/sign is -1" in caplog.text
    np.testing.assert_array_equal(found.read(0, 3), formats.IMAGES[[2, 0, 1]])


@pytest.mark.parametrize("command", ["info", "header", "transform2d"])
def test_the_other_commands_take_these_files(files, capsys, command):
    run("a.star", "out")
    words = {"info": ["out/particles.star"],
             "header": ["out/particles.star", "--params=xform.align2d,assign,ctf", "--print"],
             "transform2d": ["out/particles.star", "moved.hdf"]}[command]
    capsys.readouterr()
    assert cli.main([command, *words]) == 0
    said = capsys.readouterr().out
    if command == "info":
        assert f"{N} images of 20 x 20 px, 2.5 A a pixel" in said
        assert "particles of each class:" in said
    elif command == "header":
        assert len(said.splitlines()) == N
        assert len(said.split()) == N * (5 + 1 + 8)
    else:
        assert open_stack("moved.hdf").pixel_size_A == 2.5


def test_headers_of_a_star_cannot_be_set(files, capsys):
    before = small.snapshot(files)
    assert cli.main(["header", "a.star", "--params=xform.align2d", "--zero"]) == 2
    assert "a.star is never written to, as no file but HDF and bdb is: mrefali convert a.star NEW.hdf" in (
        capsys.readouterr().err)
    assert small.snapshot(files) == before


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_two_ranks_read_one_star(files):
    """The table is read by the first rank alone; the result is that of one process, to the bit."""
    run("a.star", "alone")
    done = launch("a.star", "refs.mrcs", "out", "--maxit=2", "--threads=1", "--MPI", *small.WORDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has no poses") == 0
    for name in ("poses.csv", "particles.star"):
        assert (files / "out" / name).read_bytes() == (files / "alone" / name).read_bytes()


@pytest.mark.skipif(not MPIEXEC.exists(), reason="needs pip install 'mrefali[mpi]'")
def test_two_ranks_refuse_a_star_without_its_images_once(files):
    os.remove("a.mrcs")
    done = launch("a.star", "refs.mrcs", "out", "--maxit=2", "--threads=1", "--MPI", *small.WORDS)
    assert done.returncode == 2
    assert done.stderr.count("mrefali: error: particle 0 of a.star is in a.mrcs, which does not exist") == 1


def test_without_mirrors_no_particle_is_mirrored(files):
    words = ["a.star", "refs.hdf", "out", "--mirror=0", "--maxit=1", "--quiet"]
    assert cli.main(["mref_ali2d", *words, *small.WORDS]) == 0
    found = open_stack("out/particles.star")
    assert not found.poses()["mirror"].any()
    run("a.star", "mirrored")
    assert open_stack("mirrored/particles.star").poses()["mirror"].any()
