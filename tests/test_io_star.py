"""STAR files of RELION: both generations, particles in many files, and what is refused."""

import logging
import os

import formats
import numpy as np
import pytest
from formats import IMAGES, OPTICS, PARTICLES, STAR_IMAGES

from mrefali.ctf import check_ctf
from mrefali.errors import InputError
from mrefali.io import StarStack, open_stack

OLD = """
data_

loop_
_rlnImageName #1
_rlnMagnification #2
_rlnDetectorPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
_rlnDefocusU #7
_rlnAnglePsi #8
_rlnOriginX #9
_rlnOriginY #10
3@Extract/b.mrcs 20000 5 300 2.7 0.1 21000 -30 2.2321 0.1340
1@Extract/a.mrcs 20000 5 200 1.4 0.07 15000 0 0 0
2@Extract/b.mrcs 20000 5 200 1.4 0.07 16000 0 0 0
"""


def test_particles_of_several_files_come_in_the_order_of_the_table(tmp_path):
    stack = open_stack(formats.write_star(tmp_path))
    assert isinstance(stack, StarStack)
    assert (stack.n_images, stack.box, stack.pixel_size_A) == (3, 16, 2.5)
    np.testing.assert_array_equal(stack.read(0, 3), STAR_IMAGES)
    np.testing.assert_array_equal(stack.read_at([2, 0, 2]), STAR_IMAGES[[2, 0, 2]])


def test_the_golden_vectors_are_read(tmp_path):
    """psi = -30 with an origin of 2.2321, 0.1340 px in Angstrom is (30, 2, -1, 0); the other form is mirrored."""
    poses = open_stack(formats.write_star(tmp_path)).poses()
    assert poses[0].item() == pytest.approx((30, 2, -1, 0), abs=1e-4)
    assert poses[1].item() == pytest.approx((30, 2, -1, 1), abs=1e-4)
    assert poses[2].item() == pytest.approx((0, -2.4 / 2.5, 3.7 / 2.5, 0))


def test_classes_count_from_0_here(tmp_path):
    assert open_stack(formats.write_star(tmp_path)).column("assign") == [1, 0, 1]


def test_a_ctf_has_the_constants_of_its_optics_group(tmp_path):
    parameters, applied = open_stack(formats.write_star(tmp_path)).ctf()
    assert parameters["voltage_kV"].tolist() == [300, 200, 200]
    assert parameters["cs_mm"].tolist() == [2.7, 1.4, 1.4]
    assert parameters["ampcont_percent"] == pytest.approx([10, 7, 7])
    assert parameters["defocus_um"] == pytest.approx([2, 1.5, 1.595])
    assert parameters["dfdiff_um"] == pytest.approx([-0.2, 0, -0.01])
    assert parameters["dfang_deg"] == pytest.approx([10, 45, 55])
    assert parameters["phase_shift_deg"].tolist() == [0, 20, 0]
    assert not applied.any()
    for one in parameters:
        check_ctf(one)


def test_a_star_of_relion_30_has_origins_in_pixels_and_its_pixel_size_from_the_magnification(tmp_path):
    stack = open_stack(formats.write_star(tmp_path, OLD))
    assert stack.pixel_size_A == 2.5
    assert stack.poses()[0].item() == pytest.approx((30, 2, -1, 0), abs=1e-4)
    assert stack.ctf()[0]["voltage_kV"].tolist() == [300, 200, 200]
    assert stack.ctf()[0]["dfdiff_um"].tolist() == [0, 0, 0]
    assert stack.column("assign") == [None] * 3
    np.testing.assert_array_equal(stack.read(0, 3), STAR_IMAGES)


def test_without_angles_the_poses_are_the_identity(tmp_path):
    text = "data_\nloop_\n_rlnImageName\n'2@Extract/a.mrcs'\nExtract/b.mrcs\n"
    stack = open_stack(formats.write_star(tmp_path, text))
    assert not stack.has_poses()
    assert stack.poses().tolist() == [(0, 0, 0, 0)] * 2
    assert stack.pixel_size_A == 2.5  # that of the image files
    np.testing.assert_array_equal(stack.read(0, 2), IMAGES[[1, 3]])
    with pytest.raises(InputError, match=r"particles\.star has no CTF \(no column rlnDefocusU, rlnVoltage, .*leave"):
        stack.ctf()


@pytest.mark.parametrize("place", ["the folder of the STAR", "the project above it", "the current folder", "absolute"])
def test_images_are_found_from_the_star_from_the_project_and_from_here(tmp_path, monkeypatch, place):
    text = "data_\nloop_\n_rlnImageName\n1@{}a.mrcs\n"
    folder = {"the folder of the STAR": "project/job", "the project above it": "project",
              "the current folder": "elsewhere", "absolute": "far"}[place]
    for name in ("project/job", "elsewhere", "far"):
        (tmp_path / name).mkdir(parents=True)
    formats.write_mrc(tmp_path / folder / "a.mrcs")
    star = tmp_path / "project/job/x.star"
    star.write_text(text.format(f"{tmp_path}/far/" if place == "absolute" else ""))
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(open_stack(star).read(0, 1), IMAGES[:1])


def test_the_pixel_size_of_the_star_wins_over_that_of_the_file_and_a_line_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    assert open_stack(formats.write_star(tmp_path, pixel_size_A=1.0)).pixel_size_A == 2.5
    assert "its pixel size of 2.5 A is taken, not the 1 A in the headers of its image files" in caplog.text


def test_our_mirror_column_is_read_where_there_is_no_tilt(tmp_path):
    text = ("data_\nloop_\n_rlnImageName\n_rlnAnglePsi\n_mrefaliMirror\n1@Extract/a.mrcs 150 1\n"
            "2@Extract/a.mrcs -30 0\n")
    assert open_stack(formats.write_star(tmp_path, text)).poses()[["alpha", "mirror"]].tolist() == [(30, 1), (30, 0)]


def test_a_mirror_column_that_another_program_left_behind_is_told(tmp_path, caplog):
    text = ("data_\nloop_\n_rlnImageName\n_rlnAnglePsi\n_rlnAngleTilt\n_mrefaliMirror\n1@Extract/a.mrcs 10 0 1\n"
            "2@Extract/a.mrcs -30 0 0\n")
    assert open_stack(formats.write_star(tmp_path, text)).poses()["mirror"].tolist() == [0, 0]
    assert "mrefaliMirror and rlnAngleTilt disagree, and the angles are taken" in caplog.text


def test_images_are_read_in_the_order_of_the_file(tmp_path, monkeypatch):
    from mrefali.io import mrc

    seen = []

    class Recorded(np.memmap):
        def __getitem__(self, index):
            seen.append((os.path.basename(self.filename), int(index)))
            return np.asarray(super().__getitem__(index))

    monkeypatch.setattr(mrc.np, "memmap", Recorded)
    order = "data_\nloop_\n_rlnImageName\n" + "".join(
        f"{i}@Extract/{name}.mrcs\n" for i, name in [(3, "b"), (2, "a"), (1, "b"), (1, "a"), (4, "b")])
    stack = open_stack(formats.write_star(tmp_path, order))
    np.testing.assert_array_equal(stack.read(0, 5), IMAGES[[5, 1, 3, 0, 6]])
    assert seen == [("b.mrcs", 0), ("b.mrcs", 2), ("b.mrcs", 3), ("a.mrcs", 0), ("a.mrcs", 1)]


ONE = "data_\nloop_\n_rlnImageName\n{}\n"


@pytest.mark.parametrize(("text", "error", "message"), [
    (ONE.format("1@none.mrcs"), FileNotFoundError,
     r"particle 0 of .*particles\.star is in none\.mrcs, which does not exist: .*Select/none\.mrcs, the same in the "
     r"folders above, and .*none\.mrcs were tried"),
    (ONE.format("1@Extract/a.mrcs\n2@/none.mrcs"), FileNotFoundError, r"particle 1 of .* is in /none\.mrcs"),
    (ONE.format("4@Extract/a.mrcs"), InputError, r"particle 0 of .* is image 4 of .*a\.mrcs, which has 1 to 3"),
    (ONE.format("0@Extract/a.mrcs"), InputError, r"particle 0 of .* is image 0 of .*a\.mrcs, which has 1 to 3"),
    (ONE.format("x@Extract/a.mrcs"), InputError, r"is 'x@Extract/a\.mrcs': give NUMBER@FILE, counted from 1"),
    (ONE.format("9999999999999999999@a"), InputError, r"give NUMBER@FILE"),
    (ONE.format(""), InputError, r"has no particles: its table data_ is empty"),
    ("data_\nloop_\n_rlnMicrographName\na\n", InputError, r"has no column rlnImageName: it holds data_ \(1 columns\)"),
    ("", InputError, r"has no column rlnImageName: it holds nothing"),
    ("hello", InputError, r"is no STAR file that can be read \(.*expected block header"),
    (ONE.format("1@a.mrcs") + "2 3 _x\n", InputError, r"is no STAR file that can be read|is in a\.mrcs"),
    ("data_\nloop_\n_rlnImageName\n_rlnX\n1@a.mrcs\n", InputError, r"Wrong number of values in loop"),
    (OPTICS + PARTICLES.replace("101.5 50.25 2", "101.5 50.25 7"), InputError,
     r"particle 1 of .* is of optics group 7, which data_optics does not define \(it has 1, 2\)"),
    (OPTICS + PARTICLES.replace("_rlnOpticsGroup", "_rlnOther"), InputError,
     r"has no column rlnOpticsGroup in the particles"),
    (OPTICS.replace("0.07 2.5", "0.07 3.5") + PARTICLES, InputError,
     r"mixes pixel sizes: particle 1 of optics group 2 has 3\.5 A, particle 0 of optics group 1 2\.5 A"),
    (OPTICS.replace("0.07 2.5", "0.07 0.0") + PARTICLES, InputError, r"particle 1 of .*: its pixel size is 0 A"),
    (OPTICS.replace("0.07 2.5", "0.07 x") + PARTICLES, InputError,
     r"rlnImagePixelSize of row of data_optics 1 of .* is 'x': give a finite number"),
    (OPTICS + PARTICLES.replace("-30 5.5801", "nan 5.5801"), InputError, r"rlnAnglePsi of particle 0 of .* is 'nan'"),
    (OLD.replace("1@Extract/a.mrcs 20000", "1@Extract/a.mrcs 0"), InputError,
     r"rlnMagnification of particle 1 of .* is 0"),
    (OLD.replace("20000 5 200 1.4 0.07 16000", "20000 6 200 1.4 0.07 16000"), InputError,
     r"mixes pixel sizes: particle 2 has 3 A, particle 0 2\.5 A"),
])
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, text, error, message):
    path = formats.write_star(tmp_path, text)
    with pytest.raises(error, match=message) as refusal:
        open_stack(path)
    assert "\n" not in str(refusal.value)


def test_mixed_boxes_are_refused_by_name(tmp_path):
    path = formats.write_star(tmp_path)
    formats.write_mrc(tmp_path / "Extract/a.mrcs", IMAGES[:3, :14, :14])
    with pytest.raises(InputError, match=r"names images of unequal size: .*/a\.mrcs has 14 x 14 pixels, .*/b\.mrcs 16"):
        open_stack(path)


def test_an_image_size_that_is_not_that_of_the_images_is_refused(tmp_path):
    text = (OPTICS.replace("_rlnImagePixelSize #6", "_rlnImagePixelSize #6\n_rlnImageSize #7").replace("#7\n1", "#8\n1")
            .replace("2.5 1.25", "2.5 18 1.25"))
    with pytest.raises(InputError, match=r"particle 0 of .* of optics group 1 has rlnImageSize 18, but its image"):
        open_stack(formats.write_star(tmp_path, text + PARTICLES))


def test_a_star_that_changed_while_in_use_is_not_carried_over(tmp_path):
    path = formats.write_star(tmp_path)
    stack = open_stack(path)
    with open(path, "a") as file:
        file.write("000001@Extract/a.mrcs m 0 0 1 1 1 0 0 0 0 0 0 0 1\n")
    with pytest.raises(InputError, match=r"particles\.star was changed by another program while it was in use"):
        stack.table()


def test_a_nonsense_ctf_names_its_particle(tmp_path):
    stack = open_stack(formats.write_star(tmp_path, OPTICS.replace("2 second 200", "2 second 2") + PARTICLES))
    with pytest.raises(InputError, match=r"particles\.star: image 1: ctf: voltage_kV=2 makes no sense"):
        stack.ctf()
