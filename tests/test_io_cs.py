"""cryoSPARC's .cs files: the conventions, the passthrough file, and what is refused."""

import logging

import formats
import numpy as np
import pytest
from formats import CS_BLOB, CS_MAIN, CS_REST, IMAGES, cs_records

from mrefali.errors import InputError
from mrefali.io import CsStack, open_stack


def test_images_are_found_in_the_project_and_inverted_where_their_sign_says_so(tmp_path):
    stack = open_stack(formats.write_cs(tmp_path))
    assert isinstance(stack, CsStack)
    assert (stack.n_images, stack.box, stack.pixel_size_A) == (3, 16, 2.5)
    assert stack.is_inverted
    np.testing.assert_array_equal(stack.read(0, 3), -IMAGES[[2, 0, 1]])


def test_images_of_sign_1_are_as_they_are(tmp_path):
    stack = open_stack(formats.write_cs(tmp_path, cs_records(sign=1)))
    assert not stack.is_inverted
    np.testing.assert_array_equal(stack.read_at([1]), IMAGES[[0]])


def test_a_pose_is_an_angle_in_radians_and_a_shift_in_pixels_of_its_own(tmp_path):
    """psi = +degrees(pose), shifts as RELION's, here in pixels of 5 A where the images have 2.5 A."""
    poses = open_stack(formats.write_cs(tmp_path)).poses()
    assert poses[0].item() == pytest.approx((30, 4, -2, 0), abs=1e-5)
    assert poses[1].item() == pytest.approx((0, 2, 0, 0), abs=1e-5)
    assert poses[2].item() == pytest.approx((270, 0, 0, 0), abs=1e-5)


def test_a_pose_that_is_no_number_is_refused_where_poses_are_asked_for(tmp_path):
    path, records = formats.write_cs(tmp_path), cs_records()
    assert open_stack(path).all_have_poses()
    records["alignments2D/shift"][1, 0] = np.nan
    stack = open_stack(formats.save_cs(path, records))
    assert not stack.all_have_poses()
    with pytest.raises(InputError, match=f"^{path}: image 1 has a pose with NaN or infinity: make the file anew, or "
                                         "give it to mrefali classify, which asks for no poses$"):
        stack.poses()


def test_classes_count_from_0(tmp_path):
    assert open_stack(formats.write_cs(tmp_path)).column("assign") == [0, 3, 1]


def test_the_ctf_is_relions_in_other_units(tmp_path):
    parameters, _ = open_stack(formats.write_cs(tmp_path)).ctf()
    assert parameters[1].item() == pytest.approx((2, -0.2, 10, 0, 10, 300, 2.7, 2.5, 90), rel=1e-6)


def split(folder, other_uids):
    """The particles of ``cs_records`` in two files, the passthrough one in another order."""
    records = cs_records()
    main, rest = (np.zeros(len(rows), fields) for rows, fields in (
        (records, CS_MAIN), (other_uids, [("uid", "<u8"), *CS_BLOB, *CS_REST])))
    for name, _ in (field[:2] for field in CS_MAIN):
        main[name] = records[name]
    for name, _ in (field[:2] for field in CS_BLOB + CS_REST):
        rest[name] = records[name][np.array([list(records["uid"]).index(uid) if uid in records["uid"] else 0
                                             for uid in other_uids])]
    rest["uid"] = other_uids
    path = formats.write_cs(folder, main)
    formats.save_cs(folder / "J12/P1_J12_passthrough_particles.cs", rest)
    return path


def test_the_passthrough_file_is_joined_by_uid(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mrefali")
    (tmp_path / "whole").mkdir()
    whole = open_stack(formats.write_cs(tmp_path / "whole"))
    stack = open_stack(split(tmp_path, np.array([17, 5, 2**63 + 5, 900], np.uint64)))
    np.testing.assert_array_equal(stack.read(0, 3), whole.read(0, 3))
    np.testing.assert_array_equal(stack.ctf()[0], whole.ctf()[0])
    np.testing.assert_array_equal(stack.poses(), whole.poses())
    assert "blob, ctf, location joined by uid from" in caplog.text


def test_a_passthrough_file_of_other_particles_is_not_joined(tmp_path):
    path = split(tmp_path, np.array([17, 5, 900], np.uint64))
    with pytest.raises(InputError, match=r"has no field blob/path, and no passthrough file beside it has it for all"):
        open_stack(path)


def test_class_averages_without_uid_or_poses_are_read(tmp_path):
    records = np.zeros(3, CS_BLOB)
    for field in CS_BLOB:
        records[field[0]] = cs_records()[field[0]]
    stack = open_stack(formats.write_cs(tmp_path, records))
    assert not stack.has_poses()
    with pytest.raises(InputError, match=r"has no CTF \(it lacks some of the fields ctf/df1_A"):
        stack.ctf()


def changed(name, value, row=1):
    records = cs_records()
    records[name][row] = value
    return records


@pytest.mark.parametrize(("records", "error", "message"), [
    (changed("blob/psize_A", 0), InputError, r"blob/psize_A of particle 1 of .* is 0: it must be above 0"),
    (changed("blob/psize_A", 3), InputError, r"mixes pixel sizes: particle 1 has 3 A, particle 0 2\.5 A"),
    (changed("blob/path", b"J5/none.mrc"), FileNotFoundError,
     r"particle 1 of .* is in J5/none\.mrc, which does not exist"),
    (changed("blob/idx", 3), InputError, r"particle 1 of .* is image 4 of .*a\.mrc, which has 1 to 3"),
    (changed("blob/shape", (16, 18)), InputError,
     r"particle 1 of .* has blob/shape \(16, 18\), but its image has 16 x 16"),
    (np.zeros(0, CS_BLOB), InputError, r"a \.cs file holds records, at least one"),
    (np.zeros((3, 4, 4)), InputError, r"holds float64 of the shape \(3, 4, 4\): a \.cs file holds records"),
])
def test_what_cannot_be_used_is_refused(tmp_path, records, error, message):
    path = formats.write_cs(tmp_path, records)
    with pytest.raises(error, match=message):
        open_stack(path)
