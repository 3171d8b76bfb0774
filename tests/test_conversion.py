"""Between all formats: what goes along, what a line says is lost, and that averages stay what they were."""

import json
import logging
import re
from itertools import product

import formats
import mrcfile
import numpy as np
import pytest
import small
from formats import IMAGES, OPTICS, PARTICLES, STAR_IMAGES
from test_io_hdf import contents

import mrefali
from mrefali import cli, fourier, geometry
from mrefali.ctf import CTF_PARAMETERS, ctf, format_ctf
from mrefali.errors import InputError
from mrefali.geometry import make_poses, to_matrices
from mrefali.io import open_stack, write_stack
from mrefali.outdir import HISTORY_COLUMNS
from mrefali.simulation import Views, render

#: Three blobs that no turn or mirror leaves as they are, well inside the box.
BLOBS = np.array([[(-3.0, 1.0), (2.5, 3.5), (4.0, -2.0)]]), np.array([1.7, 1.6, 1.8]), np.array([1, 0.8, 0.6])

POSES = make_poses([0, 30, 100, 200, 355.5], [0, 2, -1.5, 0.25, 1], [0, -1, 0.5, 2, 1], [0, 1, 0, 1, 1])

PIXEL_SIZE_A = 1.31


def write_known(folder, box, name="known.hdf"):
    """Particles of one view moved by the inverse of ``POSES``, in the headers, with CTFs of two microscopes."""
    parameters = np.zeros(len(POSES), CTF_PARAMETERS)
    i = np.arange(len(POSES))
    parameters["defocus_um"], parameters["dfdiff_um"], parameters["dfang_deg"] = 1 + i / 10, 0.1 * (i - 2), 10 * i
    parameters["bfactor_A2"], parameters["ampcont_percent"] = 20, 10
    parameters["voltage_kV"], parameters["cs_mm"] = np.where(i < 3, 300, 200), np.where(i < 3, 2.7, 1.4)
    parameters["pixel_size_A"] = PIXEL_SIZE_A
    path = str(folder / name)
    write_stack(path, render(Views(box, *BLOBS), np.zeros(len(POSES), int), POSES), [
        {"xform.align2d": matrix, "assign": k, "ctf": format_ctf(one), "ctf_applied": 0}
        for matrix, k, one in zip(to_matrices(POSES), (4, 0, 4, 1, 1), parameters, strict=True)], PIXEL_SIZE_A)
    return path


def average(stack, poses):
    """The mean of the particles moved by their poses, band-limited."""
    return fourier.transform(stack.read(0, stack.n_images), poses).mean(axis=0)


KEEPING = ("a.hdf", "bdb:a", "a.star")
PIXELS_ONLY = ("a.mrcs", "a.spi", "a.npy")


@pytest.mark.parametrize("ctf", [True, False])
def test_a_line_says_when_relion_will_not_open_a_star(tmp_path, monkeypatch, caplog, ctf):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    if ctf:
        write_known(tmp_path, 32)
    else:
        write_stack("known.hdf", np.ones((2, 32, 32), np.float32), None, PIXEL_SIZE_A)
    mrefali.convert("known.hdf", "a.star")
    mrefali.convert("a.star", "b.star")  # of a STAR the columns count, whatever becomes of its CTF
    said = "without a CTF it has no rlnVoltage and no rlnSphericalAberration, which RELION 3.1 asks of any STAR"
    assert lines(caplog).count(said) == (0 if ctf else 2)


@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize(("first", "second"), [*product(KEEPING, KEEPING)])
def test_particles_land_on_the_same_average_wherever_they_have_been(tmp_path, monkeypatch, box, first, second):
    monkeypatch.chdir(tmp_path)
    source = open_stack(write_known(tmp_path, box))
    mrefali.convert("known.hdf", first)
    mrefali.convert(first, second.replace("a", "b", 1) if second != "bdb:a" else "bdb:b")
    stack = open_stack(second.replace("a", "b", 1) if second != "bdb:a" else "bdb:b")
    view = render(Views(box, *BLOBS), np.zeros(1, int), geometry.identity_poses(1))[0]
    assert np.abs(average(stack, stack.poses()) - view).max() < 1e-4 * view.max()
    np.testing.assert_allclose(to_matrices(stack.poses()), to_matrices(source.poses()), rtol=0, atol=1e-6)
    assert stack.pixel_size_A == pytest.approx(PIXEL_SIZE_A, rel=1e-6)
    assert list(stack.column("assign")) == [4, 0, 4, 1, 1]
    for one, other in zip(stack.ctf()[0], source.ctf()[0], strict=True):
        np.testing.assert_allclose(ctf(one, 32), ctf(other, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [*product(PIXELS_ONLY, KEEPING + PIXELS_ONLY),
                                               *product(KEEPING, PIXELS_ONLY)])
def test_pixels_go_unchanged_through_formats_that_hold_no_more(tmp_path, monkeypatch, first, second):
    monkeypatch.chdir(tmp_path)
    pixels = open_stack(write_known(tmp_path, 33)).read(0, 5)
    mrefali.convert("known.hdf", first)
    out = re.sub(r"\ba\b", "b", second)
    mrefali.convert(first, out)
    stack = open_stack(out)
    np.testing.assert_array_equal(stack.read(0, 5), pixels)
    if "npy" not in first + second:
        assert stack.pixel_size_A == pytest.approx(PIXEL_SIZE_A, rel=1e-6)
    if stack.has_poses():
        np.testing.assert_allclose(to_matrices(stack.poses()), to_matrices(geometry.identity_poses(5)), atol=1e-12)


@pytest.fixture
def star(tmp_path, monkeypatch):
    """``Select/particles.star`` of three particles in two optics groups, in the current folder."""
    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path)
    return "Select/particles.star"


def lines(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("between", ["a.hdf", "bdb:a"])
def test_every_column_of_a_star_survives_headers(star, between):
    mrefali.convert(star, between)
    mrefali.convert(between, "back.star")
    before, after = open_stack(star).table(), open_stack("back.star").table()
    for label in ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY", "rlnOpticsGroup"):
        assert list(after.particles[label]) == list(before.particles[label])
    for label in ("rlnOpticsGroupName", "rlnMicrographOriginalPixelSize", "rlnVoltage"):
        kept = dict(zip(after.optics["rlnOpticsGroup"], after.optics[label], strict=True))
        assert kept == dict(zip(before.optics["rlnOpticsGroup"], before.optics[label], strict=True))
    one, other = open_stack(star), open_stack("back.star")
    for a, b in zip(one.ctf()[0], other.ctf()[0], strict=True):
        np.testing.assert_allclose(ctf(a, 16), ctf(b, 16), rtol=0, atol=1e-7)
    np.testing.assert_allclose(to_matrices(one.poses()), to_matrices(other.poses()), rtol=0, atol=1e-6)


def test_a_star_of_mrcs_files_becomes_a_star_of_the_same_files(star, tmp_path):
    before = small.snapshot(tmp_path)
    mrefali.convert(star, "new.star")
    after = small.snapshot(tmp_path)
    assert after.keys() - before.keys() == {tmp_path / "new.star"}
    assert {path: after[path] for path in before} == before
    table, old = open_stack("new.star").table(), open_stack(star).table()
    assert list(table.particles["rlnImageName"]) == list(old.particles["rlnImageName"])
    assert list(table.particles) == [*old.particles, "mrefaliMirror"]
    for label in old.particles.keys() - {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst",
                                         "rlnOriginYAngst"}:
        assert list(table.particles[label]) == list(old.particles[label])
    assert {label: list(column) for label, column in table.optics.items() if label in old.optics} == {
        label: list(column) for label, column in old.optics.items()}


def test_the_golden_vectors_are_written(tmp_path, monkeypatch):
    """(30, 2, -1, 0) is psi -30 and an origin of 2.2321, 0.1340 px; mirrored, rot = tilt = 180 and psi 150."""
    monkeypatch.chdir(tmp_path)
    poses = make_poses([30, 30], 2, -1, [0, 1])
    write_stack("a.hdf", IMAGES[:2], [{"xform.align2d": matrix, "assign": k} for k, matrix in
                                      enumerate(to_matrices(poses))], 2.0)
    mrefali.convert("a.hdf", "a.star")
    rows = [line.split() for line in (tmp_path / "a.star").read_text().splitlines() if "@" in line]
    labels = re.findall(r"^_(\w+) #", (tmp_path / "a.star").read_text().split("data_particles")[1], flags=re.MULTILINE)
    plain, mirrored = (dict(zip(labels, row, strict=True)) for row in rows)
    for found, expected in ((plain, (0, 0, -30)), (mirrored, (180, 180, 150))):
        angles = [float(found[label]) for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")]
        assert angles == pytest.approx(expected, abs=1e-5)
        origins = [float(found[label]) / 2.0 for label in ("rlnOriginXAngst", "rlnOriginYAngst")]
        assert origins == pytest.approx([2.2321, 0.1340], abs=5e-5)
    assert [found["mrefaliMirror"] for found in (plain, mirrored)] == ["0", "1"]
    assert [found["rlnClassNumber"] for found in (plain, mirrored)] == ["1", "2"]


def test_a_mirror_is_not_dropped_silently(star, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    mrefali.convert(star, "new.star")
    assert "new.star: 1 particles are mirrored, which is rot = tilt = 180 and mrefaliMirror = 1 there; who reads psi " \
           "alone sees them unmirrored" in lines(caplog)


def test_a_view_in_space_keeps_its_angles_as_long_as_nothing_is_aligned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path, OPTICS + PARTICLES.replace("0 20 180 180 150", "0 20 12 82 150"))
    mrefali.convert("Select/particles.star", "half.star", bin=2)
    before, after = open_stack("Select/particles.star").table().particles, open_stack("half.star").table().particles
    for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):
        assert list(after[label]) == list(before[label])
    for label in ("rlnOriginXAngst", "rlnOriginYAngst"):
        assert [float(x) for x in after[label]] == pytest.approx([float(x) for x in before[label]])
    write_stack("refs.hdf", IMAGES[:1], None, 2.5)
    mrefali.mref_ali2d("Select/particles.star", "refs.hdf", "out", ou=5, maxit=1)
    assert set(open_stack("out/particles.star").table().particles["rlnAngleTilt"]) <= {"0.00000000", "180.00000000"}


def test_a_star_of_relion_30_becomes_one_with_optics_groups(tmp_path, monkeypatch):
    from test_io_star import OLD

    monkeypatch.chdir(tmp_path)
    old = open_stack(formats.write_star(tmp_path, OLD))
    mrefali.convert("Select/particles.star", "new.star")
    new = open_stack("new.star")
    table = new.table()
    assert list(table.optics["rlnOpticsGroup"]) == ["1", "2"]
    assert list(map(float, table.optics["rlnVoltage"])) == [200, 300]
    assert list(table.particles["rlnOpticsGroup"]) == ["2", "1", "1"]
    assert set(table.particles) >= old.table().particles.keys() - {"rlnOriginX", "rlnOriginY"}
    assert not {"rlnOriginX", "rlnOriginY"} & table.particles.keys()
    assert new.pixel_size_A == 2.5
    np.testing.assert_allclose(new.ctf()[0].view("f8"), old.ctf()[0].view("f8"), rtol=1e-9)
    np.testing.assert_allclose(to_matrices(new.poses()), to_matrices(old.poses()), rtol=0, atol=1e-7)


def test_a_cs_of_sign_minus_1_is_inverted_on_the_way(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    source = open_stack(formats.write_cs(tmp_path))
    mrefali.convert("J12/particles.cs", "new.star")
    new = open_stack("new.star")
    np.testing.assert_array_equal(new.read(0, 3), -IMAGES[[2, 0, 1]])
    with mrcfile.open("new.mrcs") as file:
        np.testing.assert_array_equal(file.data, -IMAGES[[2, 0, 1]])
    np.testing.assert_allclose(to_matrices(new.poses()), to_matrices(source.poses()), rtol=0, atol=1e-6)
    for one, other in zip(new.ctf()[0], source.ctf()[0], strict=True):
        np.testing.assert_allclose(ctf(one, 16), ctf(other, 16), rtol=0, atol=1e-6)
    assert list(new.column("assign")) == [0, 3, 1]
    table = new.table().particles
    assert list(table["mrefaliUid"]) == [str(uid) for uid in formats.UIDS]
    assert (table["rlnMicrographName"][0], table["rlnCoordinateX"][0], table["rlnCoordinateY"][0]) == (
        "m.mrc", "1500.000000", "2000.000000")
    assert "images whose blob/sign is -1 are inverted" in lines(caplog)
    assert "left out are the fields ctf/anisomag" in lines(caplog)


def test_a_cs_of_sign_1_keeps_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.write_cs(tmp_path, formats.cs_records(sign=1))
    mrefali.convert("J12/particles.cs", "new.star")
    assert not (tmp_path / "new.mrcs").exists()
    assert open_stack("new.star").table().particles["rlnImageName"][0] == "000003@J5/a.mrc"


def test_a_phase_shift_becomes_amplitude_contrast_where_there_is_no_place_for_it(star, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    mrefali.convert(star, "a.hdf")
    for one, other in zip(open_stack("a.hdf").ctf()[0], open_stack(star).ctf()[0], strict=True):
        np.testing.assert_allclose(ctf(one, 16), ctf(other, 16), rtol=0, atol=1e-7)
    assert "a.hdf: the phase shifts of 1 particles become part of the amplitude contrast" in lines(caplog)


def test_a_phase_shift_that_headers_cannot_hold_leaves_the_ctf_out(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path, OPTICS + PARTICLES.replace("0 20 180", "0 90 180"))
    mrefali.convert("Select/particles.star", "a.hdf")
    assert [text is None for text in open_stack("a.hdf").column("ctf")] == [False, True, False]
    assert "1 particles go without ctf: no amplitude contrast stands for their phase shift" in lines(caplog)


@pytest.mark.parametrize(("out", "message"), [
    ("a.mrcs", "its format has no place for poses, classes, ctf, columns: left out"),
    ("a.npy", "its format has no place for poses, classes, ctf, pixel size, columns: left out")])
def test_a_line_says_what_a_format_has_no_place_for(star, caplog, out, message):
    caplog.set_level(logging.INFO, "mrefali")
    mrefali.convert(star, out)
    assert f"{out}: {message}" in lines(caplog)


def test_a_line_names_the_headers_that_a_star_has_no_columns_for(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    small.write(tmp_path)
    mrefali.convert("stack.hdf", "new.star")
    assert "new.star: left out are the headers ptcl_source_image, quality" in lines(caplog)


def test_a_line_says_that_poses_are_absent(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    monkeypatch.chdir(tmp_path)
    formats.write_mrc(tmp_path / "a.mrcs")
    mrefali.convert("a.mrcs", "new.hdf")
    assert "a.mrcs has no poses: they are taken to be the identity" in lines(caplog)
    assert open_stack("new.hdf").poses().tolist() == [(0, 0, 0, 0)] * 7


def test_from_hdf_to_hdf_all_headers_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.write(tmp_path)
    mrefali.convert("stack.hdf", "new.hdf")
    before, after = contents("stack.hdf"), contents("new.hdf")
    assert before.keys() <= after.keys()
    assert {key for key in before if before[key] != after[key]} == set()


# ---- on the way

@pytest.mark.parametrize(("box", "factor"), [(64, 2), (66, 2), (99, 3), (65, 2), (128, 4)])
def test_binned_particles_land_on_the_binned_view(tmp_path, monkeypatch, box, factor):
    """Shifts and CTFs go along; the centre, pixel n // 2, stays the centre."""
    monkeypatch.chdir(tmp_path)
    wide = BLOBS[0] * factor, BLOBS[1] * factor, BLOBS[2]
    poses = make_poses(POSES["alpha"], POSES["sx"] * factor, POSES["sy"] * factor, POSES["mirror"])
    write_stack("a.hdf", render(Views(box, *wide), np.zeros(5, int), poses), [
        {"xform.align2d": matrix, "ctf": "E1 0 0 0 10 300 2 1.31"} for matrix in to_matrices(poses)], 1.31)
    mrefali.convert("a.hdf", "b.star", bin=factor)
    stack = open_stack("b.star")
    assert (stack.box, stack.pixel_size_A) == (box // factor, pytest.approx(1.31 * factor))
    assert stack.ctf()[0]["pixel_size_A"] == pytest.approx([1.31 * factor] * 5)
    view = render(Views(stack.box, *BLOBS), np.zeros(1, int), geometry.identity_poses(1))[0]
    assert np.abs(average(stack, stack.poses()) - view).max() < 1e-4 * view.max()


def test_binning_a_star_leaves_no_number_of_the_old_pixels_behind(tmp_path, monkeypatch):
    from test_io_star import OLD

    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path, OLD)
    mrefali.convert("Select/particles.star", "half.star", bin=2)
    table = open_stack("half.star").table()
    assert open_stack("half.star").pixel_size_A == 5
    assert not {"rlnMagnification", "rlnDetectorPixelSize"} & table.particles.keys()
    assert (set(table.optics["rlnImagePixelSize"]), set(table.optics["rlnImageSize"])) == ({"5.000000"}, {"8"})
    np.testing.assert_allclose(open_stack("half.star").read(0, 3), fourier.shrink(STAR_IMAGES, 2), rtol=0, atol=1e-6)


def test_dark_particles_become_bright(star):
    mrefali.convert(star, "a.npy", invert=True)
    np.testing.assert_array_equal(np.load("a.npy"), -STAR_IMAGES)


def test_backgrounds_get_mean_0_and_deviation_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", 5 + 3 * np.random.default_rng(0).standard_normal((4, 32, 32)))
    mrefali.convert("a.npy", "b.npy", normalize=True)
    outside = np.load("b.npy")[:, np.hypot(*(np.mgrid[:32, :32] - 16)) > 12]
    np.testing.assert_allclose(outside.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(outside.std(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("per_block", [1, 2])
def test_blocks_change_nothing(star, monkeypatch, per_block):
    from mrefali.io import content

    mrefali.convert(star, "whole.hdf", bin=2, normalize=True)
    monkeypatch.setattr(content, "BLOCK_BYTES", per_block * 4 * 16**2)
    mrefali.convert(star, "blocks.hdf", bin=2, normalize=True)
    assert contents("blocks.hdf") == contents("whole.hdf")


@pytest.mark.parametrize(("out", "options", "error", "message"), [
    ("a.cs", {}, InputError, r"a\.cs: cryoSPARC's \.cs can be read but not written: give a name that ends in \.star"),
    ("a.tif", {}, InputError, r"a\.tif names no format that can be written: give bdb:DIR#NAME or a name that ends in"),
    ("Select/particles.star", {}, FileExistsError, r"is the stack itself, which stays as it is"),
    ("Extract/a.mrcs", {}, FileExistsError, r"Extract/a\.mrcs exists: give another name"),
    ("Extract/a.star", {}, FileExistsError, r"Extract/a\.mrcs exists: give another name"),
    ("no/a.hdf", {}, FileNotFoundError, r"no/a\.hdf cannot be made: there is no folder /.*/no, make it first"),
    ("bdb:no#a", {}, FileNotFoundError, r"there is no folder no"),
    ("bdb:a?1", {}, InputError, r"chooses images of a database that is yet to be made"),
    ("a.hdf", {"bin": 0}, InputError, r"bin=0 is not allowed: give 1 to 2 for a box of 16 px"),
    ("a.hdf", {"bin": 3}, InputError, r"bin=3 is not allowed"),
    ("a.hdf", {"bin": 2.0}, InputError, r"bin=2\.0 is not allowed"),
])
def test_what_cannot_be_done_is_refused_and_leaves_nothing(star, tmp_path, out, options, error, message):
    before = small.snapshot(tmp_path)
    with pytest.raises(error, match=message):
        mrefali.convert(star, out, **options)
    assert small.snapshot(tmp_path) == before


def test_what_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.ones((2, 16, 16)))
    before = small.snapshot(tmp_path)
    for out in ("b.star", "b.hdf", "b.mrcs", "b.spi", "b.npy"):
        with pytest.raises(InputError, match="the background of an image is constant"):
            mrefali.convert("a.npy", out, normalize=True)
        assert small.snapshot(tmp_path) == before


# ---- select

def test_chosen_classes_of_a_stack_become_a_new_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = open_stack(write_known(tmp_path, 33))
    assert cli.main(["select", "known.hdf", "chosen.hdf", "--classes=0,4"]) == 0
    chosen = open_stack("chosen.hdf")
    np.testing.assert_array_equal(chosen.read(0, 3), source.read(0, 5)[[0, 1, 2]])
    assert chosen.column("assign") == [4, 0, 4]
    np.testing.assert_array_equal(chosen.column("xform.align2d"), source.column("xform.align2d")[:3])
    assert "classes 0, 4" in capsys.readouterr().out


def test_chosen_classes_of_a_star_are_rows_of_it(star):
    assert mrefali.select(star, "chosen.star", min_size=2) == [1]
    chosen, old = open_stack("chosen.star").table(), open_stack(star).table()
    for label in ("rlnImageName", "rlnMicrographName", "rlnCoordinateX", "rlnDefocusU", "rlnClassNumber"):
        assert list(chosen.particles[label]) == [old.particles[label][i] for i in (0, 2)]


def write_run(folder, stack, assign, reach):
    """What a run in ``folder`` leaves in its output directory, as far as a selection needs it."""
    out = folder / "out"
    out.mkdir()
    (out / "parameters.json").write_text(json.dumps({
        "stack": stack, "folder": str(folder), "n_particles": len(assign), "n_references": len(reach),
        "box": IMAGES.shape[-1], "pixel_size_A": None}))
    rows = "".join(f"{i},{k},{10 * i},0.5,-1,{i % 2},1.0,0\n" for i, k in enumerate(assign))
    (out / "poses.csv").write_text("index,assign,alpha,sx,sy,mirror,peak,changed\n" + rows)
    history = "".join(f"{number},{k},1,0,{value},2,,,,,1\n" for number in (0, 1) for k, value in enumerate(reach))
    (out / "history.csv").write_text(",".join(HISTORY_COLUMNS) + "\n" + history)
    return str(out)


@pytest.mark.parametrize(("conditions", "chosen", "rows"), [
    ({"min_frc": 0.1}, [0, 2], [0, 2, 4, 6]), ({"min_size": 3}, [1, 2], [1, 2, 3, 4, 5, 6]),
    ({"classes": [1, 2], "min_size": 2}, [1, 2], [1, 2, 3, 4, 5, 6]),
    ({"min_frc": 0.1, "min_size": 2}, [2], [2, 4, 6])])
def test_a_run_is_selected_from_by_size_and_by_frc(tmp_path, monkeypatch, conditions, chosen, rows):
    """Class 0 reaches 1/8 per px, 1 only 1/12, 2 reaches 1/5, and 3 has vanished."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the stack is where the run says, not here
    formats.write_mrc(tmp_path / "a.mrcs", pixel_size_A=1.5)
    out = write_run(tmp_path, "a.mrcs", [0, 1, 2, 1, 2, 1, 2], ["8", "12", "5", ""])
    assert mrefali.select(out, "chosen.star", **conditions) == chosen
    stack = open_stack("chosen.star")
    np.testing.assert_array_equal(stack.read(0, stack.n_images), IMAGES[rows])
    assert stack.poses()["alpha"] == pytest.approx([10 * i for i in rows])
    assert stack.poses()["mirror"].tolist() == [i % 2 for i in rows]


@pytest.mark.parametrize(("source", "conditions", "message"), [
    ("known.hdf", {}, "nothing says which classes: give classes, min_size or min_frc"),
    ("known.hdf", {"classes": [5]}, r"classes=5 is not one of known\.hdf: give 0 to 4"),
    ("known.hdf", {"classes": [2]}, r"the classes chosen \(2\) have no particles; the largest of all has 2"),
    ("known.hdf", {"min_size": 9}, r"the classes chosen \(none\) have no particles"),
    ("known.hdf", {"min_size": 0}, r"min_size=0 is not allowed"),
    ("known.hdf", {"min_frc": 0.1}, r"min_frc=0\.1: known\.hdf is a stack, and FRC curves are in the output directory"),
    ("a.mrcs", {"classes": [0]}, r"a\.mrcs: not every particle has a class \(assign\)"),
    ("empty", {"classes": [0]}, r"empty has no parameters\.json: give the OUTDIR of a run"),
    ("out", {"min_frc": 0.7}, r"min_frc=0\.7 is not allowed: give a frequency above 0 to 0\.5"),
])
def test_a_selection_that_cannot_be_made_is_refused(tmp_path, monkeypatch, source, conditions, message):
    monkeypatch.chdir(tmp_path)
    write_known(tmp_path, 32)
    formats.write_mrc(tmp_path / "a.mrcs")
    write_run(tmp_path, "a.mrcs", [0] * 7, ["8"])
    (tmp_path / "empty").mkdir()
    before = small.snapshot(tmp_path)
    with pytest.raises(InputError, match=message):
        mrefali.select(source, "chosen.hdf", **conditions)
    assert small.snapshot(tmp_path) == before


# ---- recenter

def test_a_shift_goes_into_the_coordinates_in_whole_pixels_of_the_micrograph(star, capsys):
    """The particle lies at -o from the middle of its window; 5.58 A are 4.46 px of 1.25 A."""
    assert cli.main(["recenter", star, "new.star"]) == 0
    before, after = open_stack(star).table().particles, open_stack("new.star").table().particles
    assert [float(x) for x in after["rlnCoordinateX"]] == pytest.approx([100 - 4, 101.5 - 4, 7 + 2])
    assert [float(y) for y in after["rlnCoordinateY"]] == pytest.approx([200, 50.25, 8 - 3])
    assert [float(x) for x in after["rlnOriginXAngst"]] == pytest.approx([5.5801 - 5, 5.5801 - 5, -2.4 + 2.5])
    assert [float(y) for y in after["rlnOriginYAngst"]] == pytest.approx([0.3349, 0.3349, 3.7 - 3.75])
    for label in before.keys() - {"rlnCoordinateX", "rlnCoordinateY", "rlnOriginXAngst", "rlnOriginYAngst"}:
        assert list(after[label]) == list(before[label])
    assert "new.star: 3 of 3 particles of Select/particles.star moved, by up to 4 px" in capsys.readouterr().out


def test_a_particle_extracted_again_needs_no_shift(tmp_path, monkeypatch):
    """A window cut from a micrograph at the new coordinates shows the reference where the old one showed it shifted."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[:64, :64]
    micrograph = np.exp(-((x - 35) ** 2 / 8 + (y - 22) ** 2 / 18)).astype(np.float32)  # about (35, 22)
    window = micrograph[30 - 8:30 + 8, 32 - 8:32 + 8]  # about (32, 30)
    (tmp_path / "a").mkdir()
    formats.write_mrc(tmp_path / "a/w.mrcs", window[None], 2.0)
    # the particle is at (3, -8) from the middle, so o = (-3, 8) px of 2 A
    (tmp_path / "a/p.star").write_text(
        "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnMicrographPixelSize\n1 2 2\n"
        "data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n_rlnCoordinateX\n_rlnCoordinateY\n_rlnAnglePsi\n_rlnOriginXAngst\n"
        "_rlnOriginYAngst\n1@w.mrcs 1 32 30 0 -6 16\n")
    pose = open_stack("a/p.star").poses()[0]
    assert (pose["sx"], pose["sy"]) == (-3, 8)
    mrefali.recenter("a/p.star", "a/new.star")
    table = open_stack("a/new.star").table().particles
    cx, cy = (int(float(table[label][0])) for label in ("rlnCoordinateX", "rlnCoordinateY"))
    assert (cx, cy) == (35, 22)
    assert [float(table[label][0]) for label in ("rlnOriginXAngst", "rlnOriginYAngst")] == [0, 0]
    again = micrograph[cy - 8:cy + 8, cx - 8:cx + 8]
    assert np.unravel_index(again.argmax(), again.shape) == (8, 8)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("_rlnCoordinateX", "_rlnOther", r"has no column rlnCoordinateX"),
    ("_rlnOriginYAngst", "_rlnOther", r"has no column rlnOriginYAngst"),
    ("_rlnMicrographOriginalPixelSize", "_rlnOther", r"has no column rlnMicrographOriginalPixelSize \(nor"),
    ("2.5 1.25\n", "2.5 0\n", r"the pixel size of the micrograph of particle 0 of .* is 0 A"),
])
def test_coordinates_that_cannot_be_made_are_refused(tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    formats.write_star(tmp_path, (OPTICS + PARTICLES).replace(old, new))
    with pytest.raises(InputError, match=message):
        mrefali.recenter("Select/particles.star", "new.star")
    assert not (tmp_path / "new.star").exists()


def test_coordinates_are_written_as_a_star_only(star):
    with pytest.raises(InputError, match=r"a\.hdf: coordinates are written as a STAR"):
        mrefali.recenter(star, "a.hdf")
