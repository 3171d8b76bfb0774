"""MRC stacks: what counts as one, what is said of odd ones, and what is written."""

import io
import logging

import formats
import mrcfile
import numpy as np
import pytest
from formats import IMAGES

from mrefali.errors import InputError
from mrefali.io import MrcStack, open_stack
from mrefali.io.mrc import write_mrcs


def test_images_and_pixel_size_are_read(tmp_path):
    stack = open_stack(formats.write_mrc(tmp_path / "a.mrcs", pixel_size_A=1.31))
    assert isinstance(stack, MrcStack)
    assert (stack.n_images, stack.box) == (7, 16)
    assert stack.pixel_size_A == pytest.approx(1.31)
    np.testing.assert_array_equal(stack.read(0, 7), IMAGES)
    np.testing.assert_array_equal(stack.read_at([5, 0, 5, 2]), IMAGES[[5, 0, 5, 2]])
    assert stack.read(0, 1).dtype == np.float32


def test_without_a_cell_the_pixel_size_is_unknown(tmp_path):
    assert open_stack(formats.write_mrc(tmp_path / "a.mrcs")).pixel_size_A is None


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16])
def test_all_kinds_of_numbers_are_read(tmp_path, dtype):
    images = np.arange(2 * 256).reshape(2, 16, 16).astype(dtype)
    np.testing.assert_array_equal(open_stack(formats.write_mrc(tmp_path / "a.mrcs", images)).read(0, 2), images)


def test_the_other_byte_order_and_an_extended_header_are_read(tmp_path):
    path = tmp_path / "a.mrcs"
    with mrcfile.new(path, IMAGES.astype(">f4")) as file:
        file.set_extended_header(np.zeros(96, "V1"))
    np.testing.assert_array_equal(open_stack(path).read(0, 7), IMAGES)


def test_a_file_called_mrcs_is_a_stack_whatever_its_space_group(tmp_path):
    cube = np.tile(IMAGES, (3, 1, 1))[:16]
    assert open_stack(formats.write_mrc(tmp_path / "a.mrcs", cube, space_group=1)).n_images == 16
    with pytest.raises(InputError, match=r"a\.mrc is a volume of 16\^3 pixels .*if it is a stack of images, call it"):
        open_stack(formats.write_mrc(tmp_path / "a.mrc", cube, space_group=1))
    assert open_stack(formats.write_mrc(tmp_path / "b.mrc", space_group=1)).n_images == 7
    assert open_stack(formats.write_mrc(tmp_path / "c.mrc", cube)).n_images == 16


def test_one_image_is_a_stack_of_one(tmp_path):
    mrcfile.write(tmp_path / "a.mrc", IMAGES[0])
    np.testing.assert_array_equal(open_stack(tmp_path / "a.mrc").read(0, 1), IMAGES[:1])


def test_an_odd_header_is_read_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a.mrcs"
    formats.write_mrc(path)
    data = bytearray(path.read_bytes())
    data[208:216] = bytes(8)  # neither the word MAP nor a machine stamp
    path.write_bytes(data)
    np.testing.assert_array_equal(open_stack(path).read(0, 7), IMAGES)
    record, = caplog.records
    assert record.levelno == logging.WARNING
    assert "a.mrcs: the header is not quite MRC, and read all the same: Map ID string not found" in record.getMessage()


def spoil(change):
    def write(path):
        formats.write_mrc(path)
        path.write_bytes(change(path.read_bytes()))
    return write


def put(at, data):
    return spoil(lambda old: old[:at] + data + old[at + len(data):])


@pytest.mark.parametrize(("write", "message"), [
    (spoil(lambda data: data[:-1]), r"a\.mrcs is cut short: it has 8191 bytes, its 7 images of 16 x 16 pixels need"),
    (spoil(lambda data: data[:1000]), r"a\.mrcs is no MRC file that can be read \(Couldn't read enough bytes"),
    (spoil(lambda data: b""), r"a\.mrcs is no MRC file that can be read"),
    (put(0, (2**31 - 1).to_bytes(4, "little")), r"has images of 2147483647 x 16 pixels: only square"),
    (put(8, (0).to_bytes(4, "little")), r"has 0 images of 16 x 16 pixels"),
    (put(8, (2**30).to_bytes(4, "little")), r"its 1073741824 images of 16 x 16 pixels need"),
    (put(12, (4).to_bytes(4, "little")), r"pixels of type complex64: give real numbers"),
    (put(12, (77).to_bytes(4, "little")), r"no MRC file that can be read \(Unrecognised mode"),
    (put(92, (2**31 - 1).to_bytes(4, "little")), r"extended header would end beyond its 8192 bytes|is cut short"),
    (put(92, (0x7f7f7f7f).to_bytes(4, "little")), r"its extended header would end beyond its 8192 bytes"),
    (put(92, (-4 & 0xffffffff).to_bytes(4, "little")), r"extended header"),
])
def test_what_is_no_sound_stack_is_refused_in_one_line(tmp_path, write, message):
    write(tmp_path / "a.mrcs")
    with pytest.raises(InputError, match=message) as refusal:
        open_stack(tmp_path / "a.mrcs")
    assert "\n" not in str(refusal.value)


def test_a_file_cut_short_after_it_was_opened_is_told(tmp_path):
    stack = open_stack(formats.write_mrc(tmp_path / "a.mrcs"))
    (tmp_path / "a.mrcs").write_bytes(b"")
    with pytest.raises(InputError, match="it was changed after it was opened; start again"):
        stack.read(0, 1)


def test_headers_are_never_written(tmp_path):
    path = formats.write_mrc(tmp_path / "a.mrcs")
    before = (tmp_path / "a.mrcs").read_bytes()
    stack = open_stack(path)
    assert stack.read_only
    with pytest.raises(InputError, match="is never written to, as no file but HDF and bdb is: mrefali convert"):
        stack.write_columns({"assign": [0] * 7})
    assert (tmp_path / "a.mrcs").read_bytes() == before


@pytest.mark.parametrize("n_images", [1, 7])
@pytest.mark.parametrize("pixel_size_A", [None, 1.31])
def test_what_is_written_is_valid_and_keeps_its_pixel_size(tmp_path, n_images, pixel_size_A):
    path = str(tmp_path / "a.mrcs")
    write_mrcs(path, [IMAGES[:1], IMAGES[1:n_images]][:n_images], n_images, 16, pixel_size_A)
    found = io.StringIO()
    assert mrcfile.validate(path, found), found.getvalue()
    with mrcfile.open(path) as file:
        assert file.is_image_stack() if n_images > 1 else file.is_single_image()
        assert (int(file.header.ispg), int(file.header.mz)) == (0, 1)
        assert float(file.voxel_size.x) == pytest.approx(pixel_size_A or 0)
        np.testing.assert_array_equal(file.data.reshape(-1, 16, 16), IMAGES[:n_images])
        assert float(file.header.rms) == pytest.approx(IMAGES[:n_images].std(), rel=1e-4)


def test_images_beyond_those_of_the_header_are_not_lost_without_a_word(tmp_path):
    path = tmp_path / "a.mrcs"
    formats.write_mrc(path)
    data = bytearray(path.read_bytes())
    data[8:12] = (5).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="a.mrcs has 8192 bytes, of which the 5 images .* take 6144: it is damaged"):
        open_stack(path)
    path.write_bytes(data[:-1100])  # less than an image more is none
    assert open_stack(path).n_images == 5


def test_room_for_an_extended_header_is_made_in_the_order_of_the_file_alone(tmp_path):
    """In the other byte order the length would fit; a spoilt stamp leaves it to the mode which order it is."""
    path = tmp_path / "a.mrcs"
    formats.write_mrc(path)
    data = bytearray(path.read_bytes())
    data[92:96], data[212:216] = (16).to_bytes(4, "big"), b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(InputError, match="a.mrcs is no MRC file, or cut short: its extended header would end beyond"):
        open_stack(path)
