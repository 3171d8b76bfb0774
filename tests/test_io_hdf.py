"""EMAN2 HDF5 stacks: what is read, what is written, what is refused, and what keeps its bits."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5a, h5t

from mrefali.errors import InputError
from mrefali.geometry import POSE, make_poses, to_matrices
from mrefali.io import HdfStack, hdf, open_stack, write_stack
from mrefali.io.hdf import COMPACT_BYTES

SAMPLE = Path(__file__).parent / "data" / "vanished_aqm000.hdf"  # by the original: 4 averages of 48 px
BOX = 6


def some_images(n=3, box=BOX, seed=1):
    return np.random.default_rng(seed).standard_normal((n, box, box)).astype(np.float32)


def make_stack(path, images, imageid_max=None, libver="earliest", **dataset_options):
    """A bare stack by h5py alone; ``images`` are arrays of any type and shape, one an image."""
    with h5py.File(path, "w", libver=libver) as file:
        group = file.create_group("MDF/images")
        last = len(images) - 1 if imageid_max is None else imageid_max
        group.attrs["imageid_max"] = np.array([last], "i4")
        for i, image in enumerate(images):
            group.create_dataset(f"{i}/image", data=image, **dataset_options)
    return path


def set_attribute(path, index, name, value):
    with h5py.File(path, "r+") as file:
        file[f"MDF/images/{index}"].attrs[f"EMAN.{name}"] = value


def describe_type(htype):
    """All that tells two HDF5 types apart, as one tuple of plain values."""
    if isinstance(htype, h5t.TypeStringID):
        return ("string", htype.get_strpad(), htype.get_cset(), htype.is_variable_str())
    return (htype.dtype.descr, htype.get_size())


def contents(path):
    """Every attribute (type, space, bytes) and every dataset (type, shape, chunks, place, bytes)."""
    found = {}
    with h5py.File(path, "r") as file:

        def visit(name, node):
            for key in node.attrs:
                attribute = h5a.open(node.id, key.encode())
                raw = np.empty(attribute.shape, attribute.dtype)
                attribute.read(raw)
                found[name, key] = (describe_type(attribute.get_type()), attribute.get_type().get_size(),
                                    attribute.shape, raw.tobytes())
            if isinstance(node, h5py.Dataset):
                found[name, None] = (node.dtype, node.shape, node.chunks, node.id.get_offset(),
                                     node[()].tobytes())

        file.visititems(visit)
    return found


@contextmanager
def ordinary_user():
    """Root may write anywhere, so permissions are tested as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that an ordinary user can enter (pytest's own, made by root, cannot be)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.chmod(folder, 0o755)


# reading


def test_reads_what_the_original_wrote():
    with open_stack(SAMPLE) as stack:
        assert (stack.path, stack.n_images, len(stack)) == (str(SAMPLE), 4, 4)
        assert (stack.box, stack.pixel_size_A) == (48, 1.0)
        images = stack.read(0, 4)
    with h5py.File(SAMPLE) as file:
        expected = np.stack([file[f"MDF/images/{i}/image"][()] for i in range(4)])
    assert images.dtype == np.float32
    assert images.dtype.isnative
    assert images.flags.c_contiguous
    np.testing.assert_array_equal(images, expected)


def test_read_takes_ranges_and_read_at_any_order():
    stack = HdfStack(SAMPLE)
    images = stack.read(0, 4)
    np.testing.assert_array_equal(stack.read(1, 3), images[1:3])
    np.testing.assert_array_equal(stack.read_at([3, 0, 3]), images[[3, 0, 3]])
    assert stack.read(2, 2).shape == (0, 48, 48)
    with pytest.raises(IndexError, match="images 2 to 4 of .* asked for: it has 0 to 3"):
        stack.read(2, 5)
    with pytest.raises(IndexError, match="images -1 to -1"):
        stack.read_at([-1])


def test_header_gives_python_values():
    header = HdfStack(SAMPLE).header(0)
    assert header["HostEndian"] == "little"
    assert header["source_path"] == "stack.hdf"  # stored in 26 bytes, the rest NULs
    assert header["ave_n"] == 0
    assert type(header["ave_n"]) is int
    assert header["apix_x"] == 1.0
    assert type(header["apix_x"]) is float
    assert header["members"] == 27.0
    matrix = header["xform.align2d"]
    assert (matrix.shape, matrix.dtype) == ((3, 4), np.float64)
    np.testing.assert_allclose(matrix[0], [-0.07969306, -0.99681944, 0, -0.9171263], rtol=1e-6)


def test_header_understands_what_other_programs_store(tmp_path):
    path = make_stack(tmp_path / "other.hdf", some_images(1))
    for name, value in {"variable": "text", "fixed": np.bytes_("abc"), "scalar": np.float64(2.5),
                        "long": np.int64(2**40), "flag": np.bool_(True), "big": np.array([7], ">i4"),
                        "list": np.arange(3, dtype=">f4"), "latin": np.bytes_(b"\xb5m"),
                        "nothing": h5py.Empty("f4")}.items():
        set_attribute(path, 0, name, value)
    header = HdfStack(path).header(0)
    np.testing.assert_array_equal(header.pop("list"), [0, 1, 2])
    assert header == {"variable": "text", "fixed": "abc", "scalar": 2.5, "long": 2**40, "flag": True,
                      "big": 7, "latin": "\udcb5m", "nothing": None}


def test_big_endian_transform_is_read(tmp_path):
    path = make_stack(tmp_path / "big.hdf", some_images(1))
    matrix = to_matrices(make_poses(33.0, 3.0, -5.0, 1))
    big = np.dtype([(f"{i}{j}", ">f4") for i in range(3) for j in range(4)])
    set_attribute(path, 0, "xform.align2d", np.array([tuple(matrix.ravel())], big))
    pose = HdfStack(path).poses()[0]
    np.testing.assert_allclose(pose.item(), (33, 3, -5, 1), rtol=1e-6)


def test_column_and_header_names_tell_what_is_absent(tmp_path):
    path = make_stack(tmp_path / "some.hdf", some_images(3))
    set_attribute(path, 0, "b", np.array([1], "i4"))
    set_attribute(path, 2, "b", np.array([3], "i4"))
    set_attribute(path, 2, "a", np.bytes_("x\0"))
    stack = HdfStack(path)
    assert stack.column("b") == [1, None, 3]
    assert stack.column("none") == [None] * 3
    assert list(stack.header_names().items()) == [("b", 2), ("a", 1)]
    assert stack.pixel_size_A is None


def test_poses_come_from_xform_align2d(tmp_path):
    poses = make_poses([33.0, 0.0, 359.0], [3.0, 0.5, -1.0], [-5.0, 0.0, 2.0], [1, 0, 1])
    path = tmp_path / "posed.hdf"
    write_stack(path, some_images(3), [{"xform.align2d": pose} for pose in poses])
    back = HdfStack(path).poses()
    assert back.dtype == POSE
    for field in POSE.names:
        np.testing.assert_allclose(back[field], poses[field], atol=1e-4)


def test_poses_name_the_first_image_without_one_and_the_command(tmp_path):
    path = tmp_path / "half.hdf"
    write_stack(path, some_images(3), [{"xform.align2d": np.eye(3, 4)}, {}, {}])
    with pytest.raises(InputError, match=f"image 1 of {path} has no xform.align2d: set it with mrefali "
                                         f"header {path} --params=xform.align2d --zero$"):
        HdfStack(path).poses()


@pytest.mark.parametrize("value", [np.bytes_("none\0"), np.array([1.0], "f4")])
def test_poses_refuse_what_is_no_transform(tmp_path, value):
    path = make_stack(tmp_path / "odd.hdf", some_images(1))
    set_attribute(path, 0, "xform.align2d", value)
    with pytest.raises(InputError, match="xform.align2d of image 0 of .* is no transform of finite numbers"):
        HdfStack(path).poses()


def test_poses_refuse_nan(tmp_path):
    path = tmp_path / "nan.hdf"
    write_stack(path, some_images(1), [{"xform.align2d": np.full((3, 4), np.nan)}])
    with pytest.raises(InputError, match="no transform of finite numbers"):
        HdfStack(path).poses()


# the pixel types that EMAN2 reads

WHOLE = np.random.default_rng(2).integers(-1000, 1000, (2, BOX, BOX))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<i2", ">i2", "<u2", "<u1", "<i4", "<f8", ">f8"])
def test_pixel_types_are_converted(tmp_path, dtype):
    images = (WHOLE % 200 if dtype == "<u1" else abs(WHOLE) if "u" in dtype else WHOLE).astype(dtype)
    stack = HdfStack(make_stack(tmp_path / "typed.hdf", images))
    read = stack.read(0, 2)
    assert read.dtype == np.float32
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, images.astype(np.float32))


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"chunks": (2, 3)},
                                     {"compression": "gzip", "shuffle": True, "fletcher32": True}])
def test_chunked_pixels_are_read(tmp_path, options):
    images = some_images(2)
    stack = HdfStack(make_stack(tmp_path / "chunked.hdf", images, **options))
    np.testing.assert_array_equal(stack.read(0, 2), images)


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_one_slice_is_an_image(tmp_path, dtype):
    images = some_images(2)
    stack = HdfStack(make_stack(tmp_path / "slices.hdf", images[:, None].astype(dtype)))
    assert stack.box == BOX
    np.testing.assert_array_equal(stack.read(0, 2), images)


def test_kinds_of_pixels_may_be_mixed(tmp_path):
    images = some_images(3)
    path = make_stack(tmp_path / "mixed.hdf", [images[0], images[1].astype(">f4"), images[2][None]])
    np.testing.assert_array_equal(HdfStack(path).read_at([2, 1, 0]), images[::-1])


def test_pixels_never_written_read_as_zero(tmp_path):
    path = make_stack(tmp_path / "late.hdf", some_images(1))
    with h5py.File(path, "r+") as file:
        del file["MDF/images/0/image"]
        file["MDF/images/0"].create_dataset("image", (BOX, BOX), "f4")
    np.testing.assert_array_equal(HdfStack(path).read(0, 1), np.zeros((1, BOX, BOX)))


@pytest.mark.parametrize(("bits", "dtype"), [(8, "u1"), (12, "u2"), (3, "i4")])
def test_rendered_bits_are_scaled_back(tmp_path, bits, dtype):
    raw = np.random.default_rng(3).integers(0, 2**bits, (1, BOX, BOX)).astype(dtype)
    path = make_stack(tmp_path / "rendered.hdf", raw, compression="gzip")
    for name, value in {"stored_renderbits": np.array([bits], "i4"), "stored_rendermin": np.array([-2], "f4"),
                        "stored_rendermax": np.array([5], "f4")}.items():
        set_attribute(path, 0, name, value)
    expected = raw / (2**bits - 1) * 7.0 - 2.0
    np.testing.assert_allclose(HdfStack(path).read(0, 1), expected, atol=1e-6)


def test_zero_rendered_bits_leave_the_pixels(tmp_path):
    images = some_images(1)
    path = make_stack(tmp_path / "zero.hdf", images)
    set_attribute(path, 0, "stored_renderbits", np.array([0], "i4"))
    set_attribute(path, 0, "stored_rendermax", np.array([9], "f4"))
    np.testing.assert_array_equal(HdfStack(path).read(0, 1), images)


def test_rendered_bits_without_limits_are_refused(tmp_path):
    path = make_stack(tmp_path / "lost.hdf", some_images(1))
    set_attribute(path, 0, "stored_renderbits", np.array([8], "i4"))
    with pytest.raises(InputError, match=r"image 0 of .*stored_renderbits=8.* lacks stored_rendermin"):
        HdfStack(path).read(0, 1)


# what is refused


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^.*/none.hdf does not exist$"):
        open_stack(tmp_path / "none.hdf")


def test_directory(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a directory: give an HDF5 file$"):
        open_stack(tmp_path)


def test_unreadable_file(open_folder):
    path = make_stack(open_folder / "closed.hdf", some_images(1))
    path.chmod(0)
    with ordinary_user(), pytest.raises(PermissionError, match=r"closed.hdf cannot be opened \(Permission"):
        open_stack(path)


@pytest.mark.parametrize("data", [b"", b"# STAR file\n" * 50])
def test_not_hdf5(tmp_path, data):
    path = tmp_path / "text.hdf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"^{path} is not an HDF5 file, nor of another format that is known"):
        open_stack(path)


def test_the_name_need_not_say_hdf(tmp_path):
    images = some_images(2)
    np.testing.assert_array_equal(open_stack(make_stack(tmp_path / "stack.img", images)).read(0, 2), images)


def test_cut_short(tmp_path):
    path = make_stack(tmp_path / "short.hdf", some_images(3))
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match="short.hdf cannot be opened, HDF5 says: .*truncated.*copy it again"):
        open_stack(path)


def test_cut_short_while_open(tmp_path):
    path = make_stack(tmp_path / "shrinking.hdf", some_images(3))
    stack = open_stack(path)
    os.truncate(path, int(stack._offsets[2]) + 10)
    np.testing.assert_array_equal(stack.read(0, 2), some_images(3)[:2])
    with pytest.raises(InputError, match="shrinking.hdf ends within image 2: it was cut short"):
        stack.read(0, 3)


def test_no_images_group(tmp_path):
    path = tmp_path / "plain.hdf"
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(InputError, match="has no group /MDF/images: it is HDF5, but no EMAN2 stack"):
        open_stack(path)


def test_no_imageid_max(tmp_path):
    path = make_stack(tmp_path / "count.hdf", some_images(2))
    with h5py.File(path, "r+") as file:
        del file["MDF/images"].attrs["imageid_max"]
    with pytest.raises(InputError, match="count.hdf has no imageid_max on /MDF/images"):
        open_stack(path)


def test_holes_name_the_first_missing_index(tmp_path):
    path = make_stack(tmp_path / "holes.hdf", some_images(13))
    with h5py.File(path, "r+") as file:
        del file["MDF/images/10"], file["MDF/images/9"]
    with pytest.raises(InputError, match="holes.hdf has no image 9, though imageid_max=12"):
        open_stack(path)


def test_imageid_max_beyond_the_last_image(tmp_path):
    path = make_stack(tmp_path / "more.hdf", some_images(2), imageid_max=3)
    with pytest.raises(InputError, match="has no image 2, though imageid_max=3"):
        open_stack(path)


@pytest.mark.parametrize("last", [0, 1])
def test_images_beyond_imageid_max_are_not_lost_without_a_word(tmp_path, last):
    path = make_stack(tmp_path / "more.hdf", some_images(3), imageid_max=last)
    with pytest.raises(InputError, match=f"more.hdf has {2 - last} images beyond imageid_max={last}: it is damaged"):
        open_stack(path)


def test_a_header_whose_name_is_damaged_is_absent(tmp_path):
    path = tmp_path / "damaged.hdf"
    write_stack(path, some_images(3), [{"assign": i} for i in range(3)])
    path.write_bytes(path.read_bytes().replace(b"EMAN.assign\0", b"\xff" * 12))
    assert open_stack(path).column("assign") == [None] * 3


@pytest.mark.parametrize("spoil", [b"TREE", b"HEAP", b"SNOD"])
def test_what_hdf5_cannot_read_is_one_line(tmp_path, spoil):
    path = tmp_path / "damaged.hdf"
    write_stack(path, some_images(3), [{"assign": i} for i in range(3)])
    data = path.read_bytes()
    path.write_bytes(data.replace(spoil, b"\xff" * len(spoil)))
    with pytest.raises(InputError, match=r"^.*damaged.hdf (is damaged|cannot be opened|has no).*[^\n]$"):
        open_stack(path).column("assign")


@pytest.mark.parametrize(("value", "message"), [
    (np.array([1, 1], "i4"), "imageid_max of .*count.hdf is 2 values: it must be one number; write the file again"),
    (np.bytes_("two\0"), "imageid_max of .*count.hdf is 'two': it must be one number"),
    (np.float32(1.5), r"imageid_max of .*count.hdf is 1\.5: it must be a whole number"),
    (h5py.Empty("i4"), "count.hdf has no imageid_max on /MDF/images"),
])
def test_an_imageid_max_that_is_no_number_is_refused(tmp_path, value, message):
    path = make_stack(tmp_path / "count.hdf", some_images(2))
    with h5py.File(path, "r+") as file:
        file["MDF/images"].attrs["imageid_max"] = value
    with pytest.raises(InputError, match=message):
        open_stack(path)


@pytest.mark.parametrize("name", ["nz", "is_complex", "stored_renderbits", "apix_x"])
@pytest.mark.parametrize(("value", "got"), [(np.bytes_("1\0"), "'1'"), ("one", "'one'"), ([1, 2], "2 values"),
                                            (np.complex64(1), r"\(1\+0j\)")])
def test_a_header_that_is_no_number_where_one_is_needed_is_refused(tmp_path, name, value, got):
    path = make_stack(tmp_path / "odd.hdf", some_images(2))
    set_attribute(path, 0, name, value)
    with pytest.raises(InputError, match=f"^{name} of image 0 of .*odd.hdf is {got}: it must be one number; write"):
        open_stack(path)


@pytest.mark.parametrize("name", ["stored_rendermin", "stored_rendermax"])
def test_a_limit_of_rendered_bits_that_is_no_number_is_refused(tmp_path, name):
    path = make_stack(tmp_path / "odd.hdf", some_images(1))
    for key, value in {"stored_renderbits": 8, "stored_rendermin": 0.0, "stored_rendermax": 1.0, name: "low"}.items():
        set_attribute(path, 0, key, value)
    with pytest.raises(InputError, match=f"^{name} of image 0 of .*odd.hdf is 'low': it must be one number"):
        open_stack(path).read(0, 1)


@pytest.mark.parametrize("bits", [-1, 0.5, 33, 2**30, np.nan])
def test_rendered_bits_that_cannot_be_are_refused(tmp_path, bits):
    path = make_stack(tmp_path / "odd.hdf", some_images(1))
    for key, value in {"stored_renderbits": bits, "stored_rendermin": 0.0, "stored_rendermax": 1.0}.items():
        set_attribute(path, 0, key, value)
    with pytest.raises(InputError, match=r"image 0 of .* is compressed \(stored_renderbits=.*not 1 to 32"):
        open_stack(path).read(0, 1)


@pytest.mark.parametrize("apix", [np.nan, np.inf, 0.0, -2.0, 0])
def test_a_pixel_size_that_is_no_length_is_unknown(tmp_path, apix):
    path = make_stack(tmp_path / "apix.hdf", some_images(1))
    set_attribute(path, 0, "apix_x", apix)
    assert open_stack(path).pixel_size_A is None


def test_a_dataset_in_the_place_of_the_images_is_no_stack(tmp_path):
    path = tmp_path / "data.hdf"
    with h5py.File(path, "w") as file:
        file["MDF/images"] = np.zeros((2, 4, 4))
    with pytest.raises(InputError, match="data.hdf has no group /MDF/images: it is HDF5, but no EMAN2 stack"):
        open_stack(path)


@pytest.mark.parametrize("place", ["MDF/images/1", "MDF/images/1/image"])
def test_an_image_of_another_shape_of_file_is_refused(tmp_path, place):
    path = make_stack(tmp_path / "odd.hdf", some_images(2))
    with h5py.File(path, "r+") as file:
        del file[place]
        if place.endswith("image"):
            file.create_group(place)
        else:
            file[place] = np.zeros((BOX, BOX), "f4")
    with pytest.raises(InputError, match="image 1 of .*odd.hdf is not a group with a dataset called image"):
        open_stack(path)


@pytest.mark.parametrize("imageid_max", [-1, 0])
def test_empty_stack(tmp_path, imageid_max):
    path = make_stack(tmp_path / "empty.hdf", [], imageid_max=imageid_max)
    with pytest.raises(InputError, match=rf"empty.hdf has no images \(imageid_max={imageid_max}\)"):
        open_stack(path)


def test_image_without_pixels(tmp_path):
    path = make_stack(tmp_path / "bare.hdf", some_images(2))
    with h5py.File(path, "r+") as file:
        del file["MDF/images/1/image"]
    with pytest.raises(InputError, match="image 1 of .*bare.hdf has headers but no pixels"):
        open_stack(path)


def test_volume_by_its_data(tmp_path):
    path = make_stack(tmp_path / "volume.hdf", [np.zeros((BOX, BOX, BOX), "f4")])
    with pytest.raises(InputError, match="image 0 of .*volume.hdf is a volume of 6 slices: give a stack"):
        open_stack(path)


def test_volume_by_its_header(tmp_path):
    path = make_stack(tmp_path / "volume.hdf", some_images(2))
    set_attribute(path, 1, "nz", np.array([4], "i4"))
    with pytest.raises(InputError, match="image 1 of .*volume.hdf is a volume of 4 slices"):
        open_stack(path)


def test_fourier_image(tmp_path):
    path = make_stack(tmp_path / "fourier.hdf", [np.zeros((BOX, BOX + 2), "f4")])
    set_attribute(path, 0, "is_complex", np.array([1], "i4"))
    with pytest.raises(InputError, match=r"image 0 of .* is a Fourier transform \(is_complex=1\): give"):
        open_stack(path)


@pytest.mark.parametrize(("shape", "size"), [((4, 6), "6 x 4"), ((5,), "5 x 1")])
def test_not_square(tmp_path, shape, size):
    path = make_stack(tmp_path / "oblong.hdf", [np.zeros(shape, "f4")])
    with pytest.raises(InputError, match=f"image 0 of .*oblong.hdf is {size} pixels: only square images"):
        open_stack(path)


def test_unequal_sizes(tmp_path):
    path = make_stack(tmp_path / "sizes.hdf", [np.zeros((box, box), "f4") for box in (6, 6, 4)])
    with pytest.raises(InputError, match="image 2 of .*sizes.hdf is 4 x 4 pixels, image 0 is 6 x 6: all"):
        open_stack(path)


def test_complex_pixels(tmp_path):
    path = make_stack(tmp_path / "type.hdf", [np.zeros((4, 4), "c8")])
    with pytest.raises(InputError, match="image 0 of .*type.hdf has pixels of type complex64"):
        open_stack(path)


# no lock


def test_no_lock_is_held_between_calls(tmp_path):
    path = make_stack(tmp_path / "free.hdf", some_images(2))
    with open_stack(path) as stack, open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        np.testing.assert_array_equal(stack.read(0, 2), some_images(2))


def test_a_file_locked_elsewhere_is_named(tmp_path):
    path = make_stack(tmp_path / "taken.hdf", some_images(2))
    stack = open_stack(path)
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(InputError, match="taken.hdf is open in another program, which locked it"):
            stack.check_writable()
        with pytest.raises(InputError, match="taken.hdf is open in another program, which locked it"):
            open_stack(path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_forbids_nothing(sample_copy, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    stack = open_stack(sample_copy)
    stack.check_writable()
    stack.write_columns({"assign": [3, 1, 0, 2]})
    assert stack.column("assign") == [3, 1, 0, 2]


def test_another_failure_of_the_lock_is_not_called_a_matter_of_permission(sample_copy, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught:
        open_stack(sample_copy).check_writable()
    assert type(caught.value) is OSError


# headers written back


@pytest.fixture
def sample_copy(tmp_path):
    path = tmp_path / "copy.hdf"
    shutil.copyfile(SAMPLE, path)
    return path


def test_written_columns_are_read_back(sample_copy):
    stack = open_stack(sample_copy)
    poses = make_poses([1.0, 20.0, 300.0, 90.0], [1.5, 0, -2, 3], [0, 1, 2, -3], [0, 1, 1, 0])
    stack.write_columns({"assign": np.array([3, 1, 0, 2]), "peak": [0.5, 1.5, 2.5, -1.0],
                         "xform.align2d": poses, "note": ["a", "bcd", "", "e"],
                         "flag": np.array([True, False, True, True])})
    assert stack.column("assign") == [3, 1, 0, 2]
    assert stack.column("peak") == [0.5, 1.5, 2.5, -1.0]
    assert stack.column("note") == ["a", "bcd", "", "e"]
    assert stack.column("flag") == [1, 0, 1, 1]
    back = stack.poses()
    for field in POSE.names:
        np.testing.assert_allclose(back[field], poses[field], atol=1e-4)


def test_matrices_are_written_as_poses_are(sample_copy):
    poses = make_poses([1.0, 20.0, 300.0, 90.0], 2.0, -1.0, [0, 1, 1, 0])
    stack = open_stack(sample_copy)
    stack.write_columns({"xform.align2d": poses})
    by_poses = contents(sample_copy)
    stack.write_columns({"xform.align2d": to_matrices(poses).tolist()})
    assert contents(sample_copy) == by_poses


@pytest.mark.parametrize("columns", [
    {"assign": [0, 1, 2, 3], "xform.align2d": make_poses([1.0, 2.0, 3.0, 4.0])},  # in place
    {"fresh": [0.5] * 4, "text": ["one", "two", "three", "four"]},  # new
    {"source_path": ["x.hdf"] * 4, "assign": [0.5] * 4},  # of another size or type
])
def test_all_else_keeps_its_bits(sample_copy, columns):
    before = contents(sample_copy)
    open_stack(sample_copy).write_columns(columns)
    after = contents(sample_copy)
    written = {(f"MDF/images/{i}", f"EMAN.{name}") for name in columns for i in range(4)}
    assert written <= after.keys()
    assert {key: value for key, value in after.items() if key not in written} == {
        key: value for key, value in before.items() if key not in written}


def test_equal_type_is_written_in_place(sample_copy):
    before = sample_copy.read_bytes()
    stack = open_stack(sample_copy)
    stack.write_columns({name: stack.column(name) for name in ("ave_n", "xform.align2d", "apix_x", "mean")})
    assert sample_copy.read_bytes() == before


def test_written_types_are_those_of_the_original(sample_copy):
    before = contents(sample_copy)
    stack = open_stack(sample_copy)
    columns = {"ave_n": np.arange(4), "xform.align2d": make_poses(np.arange(4.0)), "apix_x": [2.0] * 4,
               "mean": np.arange(4, dtype=np.float64), "source_path": ["s.hdf"] * 4}
    stack.write_columns(columns)
    after = contents(sample_copy)
    for name in columns:
        for i in range(4):
            key = f"MDF/images/{i}", f"EMAN.{name}"
            assert after[key][0] == before[key][0]
            assert after[key][2] == before[key][2]
    assert after["MDF/images/0", "EMAN.source_path"][1] == len("s.hdf") + 1


def test_columns_go_into_gzip_stacks_of_new_hdf5_too(tmp_path):
    path = make_stack(tmp_path / "new.hdf", some_images(3), libver="latest", compression="gzip")
    stack = open_stack(path)
    stack.write_columns({"assign": [2, 1, 0]})
    assert stack.column("assign") == [2, 1, 0]
    np.testing.assert_array_equal(stack.read(0, 3), some_images(3))


@pytest.mark.parametrize(("columns", "message"), [
    ({"assign": [1, 2]}, "2 values of assign for 4 images: give one for each"),
    ({"xform.align2d": make_poses([1.0, 2.0])}, "2 values of xform.align2d for 4 images"),
    ({"assign": [0, 0, 0, 2**31]}, "assign is 2147483648: int32, in which EMAN2 keeps it, takes"),
    ({"peak": [0, 0, 0, 1e39]}, r"peak is 1e\+39: float32, in which EMAN2 keeps it, takes"),
    ({"assign": [0, 0, None, 0]}, "assign holds values of type object: give numbers, strings or a transform"),
    ({"assign": [0, 0, "x", 0]}, "assign holds values of type <U"),
    ({"members": np.zeros((4, 3))}, r"members has the shape \(4, 3\): give one number or string for each"),
    ({"note": ["a", "b", "c\0d", "e"]}, "note is 'c.x00d': a string with a NUL inside"),
    ({"xform.align2d": [0.0] * 4}, "xform.align2d is no transform: give poses or 3x4 matrices"),
    ({"xform.align2d": ["a"] * 4}, "xform.align2d is no transform: give poses or 3x4 matrices"),
])
def test_bad_columns_are_refused_before_anything_is_written(sample_copy, columns, message):
    before = sample_copy.read_bytes()
    with pytest.raises(InputError, match=message):
        open_stack(sample_copy).write_columns({"fine": [1, 2, 3, 4]} | columns)
    assert sample_copy.read_bytes() == before


def test_read_only_file_is_refused_up_front(open_folder):
    path = open_folder / "fixed.hdf"
    shutil.copyfile(SAMPLE, path)
    path.chmod(0o444)
    with ordinary_user():
        stack = open_stack(path)
        with pytest.raises(PermissionError, match="fixed.hdf cannot be written to, but .* allow it with chmod u.w"):
            stack.check_writable()
        with pytest.raises(PermissionError, match="fixed.hdf cannot be written to"):
            stack.write_columns({"assign": [0, 1, 2, 3]})
    assert path.read_bytes() == SAMPLE.read_bytes()


def test_a_folder_that_takes_no_copy_is_refused_up_front(open_folder):
    path = open_folder / "open.hdf"
    shutil.copyfile(SAMPLE, path)
    path.chmod(0o666)
    open_folder.chmod(0o555)
    with ordinary_user(), pytest.raises(PermissionError, match=f"^{open_folder} cannot be written to, but the headers "
                                                               f"of {path} have to be"):
        open_stack(path).check_writable()


def test_a_disk_without_room_is_refused_up_front(sample_copy, monkeypatch):
    room = sample_copy.stat().st_size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - room, room))
    stack = open_stack(sample_copy)
    for ask in (lambda: stack.check_writable("copy"), lambda: stack.write_columns({"assign": [0, 1, 2, 3]}, "copy")):
        with pytest.raises(InputError, match=r"headers of .*copy.hdf are written into a copy of it, .* 0\.1 MB, "
                                             r"but .* has 0\.1 MB free: make room"):
            ask()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(InputError, match=r"written into a journal beside it, which takes 0\.1 MB, but .* has 0\.0 MB"):
        stack.check_writable()
    assert sample_copy.read_bytes() == SAMPLE.read_bytes()
    assert os.listdir(sample_copy.parent) == ["copy.hdf"]


def run_python(code, *words):
    """Run ``code`` in a process of its own, with ``words`` as its arguments."""
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize(("write_back", "room"), [
    ("journal", 0), ("journal", 1000), ("journal", 4000),
    ("copy", -1000), ("copy", 0), ("copy", 1000), ("copy", 4000)])
def test_a_file_that_may_not_grow_is_left_as_it_was(sample_copy, write_back, room):
    """The limit is met where the file would grow; in a copy while it is made, or while headers are written."""
    done = run_python("""
import resource, sys
import numpy as np
from mrefali.io import open_stack
stack = open_stack(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    stack.write_columns({f"column_{i}": ["some text" * 100] * 4 for i in range(20)}, sys.argv[3])
except OSError as error:
    print(type(error).__name__, error)
""", sample_copy, SAMPLE.stat().st_size + room, write_back)
    assert done.stdout == (f"OSError headers could not be written into {sample_copy}, which is whole all the "
                           "same: File too large\n")
    assert (done.stderr, done.returncode) == ("", 0)
    assert sample_copy.read_bytes() == SAMPLE.read_bytes()
    assert os.listdir(sample_copy.parent) == ["copy.hdf"]


@pytest.mark.parametrize(("error", "raised", "message"), [
    (OSError("disk\nfull"), OSError, "headers could not be written into .*copy.hdf, .*: disk full$"),
    (RuntimeError("disk full"), OSError, "headers could not be written into .*copy.hdf, .*: disk full$"),
    (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
])
@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_a_failure_half_way_leaves_the_old_file(sample_copy, monkeypatch, write_back, error, raised, message):
    write, written = hdf._write_header, []

    def fail_at_last(group, name, value):
        if len(written) == 3:
            raise error
        written.append(name)
        write(group, name, value)

    stack = open_stack(sample_copy)
    monkeypatch.setattr(hdf, "_write_header", fail_at_last)
    with pytest.raises(raised, match=message):
        stack.write_columns({"assign": [3, 1, 0, 2]}, write_back)
    assert len(written) == 3
    assert sample_copy.read_bytes() == SAMPLE.read_bytes()
    assert os.listdir(sample_copy.parent) == ["copy.hdf"]


@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_a_process_killed_half_way_leaves_the_old_file(sample_copy, write_back):
    done = run_python("""
import os, signal, sys
from mrefali.io import hdf
write = hdf._write_header
def kill_at_image_2(group, name, value):
    if value[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(group, name, value)
hdf._write_header = kill_at_image_2
hdf.HdfStack(sys.argv[1]).write_columns({"assign": [0, 1, 2, 3]}, sys.argv[2])
""", sample_copy, write_back)
    assert done.returncode == -signal.SIGKILL
    assert sample_copy.read_bytes() == SAMPLE.read_bytes()
    stack = open_stack(sample_copy)  # what is left is in nobody's way
    stack.write_columns({"assign": [0, 1, 2, 3]})
    assert stack.column("assign") == [0, 1, 2, 3]


@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_mode_and_links_of_the_file_are_kept(sample_copy, tmp_path, write_back):
    sample_copy.chmod(0o640)
    link = tmp_path / "folder" / "link.hdf"
    link.parent.mkdir()
    link.symlink_to(os.path.join("..", "copy.hdf"))
    open_stack(link).write_columns({"assign": [0, 1, 2, 3]}, write_back)
    assert link.is_symlink()
    assert os.listdir(link.parent) == ["link.hdf"]
    assert stat.S_IMODE(sample_copy.stat().st_mode) == 0o640
    assert open_stack(sample_copy).column("assign") == [0, 1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_the_owner_is_kept(sample_copy, write_back):
    os.chown(sample_copy, 1234, 4321)
    open_stack(sample_copy).write_columns({"assign": [0, 1, 2, 3]}, write_back)
    status = sample_copy.stat()
    assert (status.st_uid, status.st_gid) == (1234, 4321)


def test_who_may_not_give_files_away_becomes_the_owner(open_folder):
    path = open_folder / "theirs.hdf"
    shutil.copyfile(SAMPLE, path)
    path.chmod(0o666)
    open_folder.chmod(0o777)
    with ordinary_user():
        open_stack(path).write_columns({"assign": [0, 1, 2, 3]}, "copy")
        assert path.stat().st_uid == os.geteuid()
    assert open_stack(path).column("assign") == [0, 1, 2, 3]


@pytest.mark.parametrize("write_back", ["journal", "copy"])
def test_a_stack_that_another_program_changed_is_missed(sample_copy, write_back):
    stack = open_stack(sample_copy)
    write_stack(sample_copy, some_images(2))
    before = sample_copy.read_bytes()
    with pytest.raises(InputError, match="copy.hdf was changed by another program while it was in use: start again"):
        stack.write_columns({"assign": [0, 1, 2, 3]}, write_back)
    assert sample_copy.read_bytes() == before


def test_check_writable_changes_nothing(sample_copy):
    before = sample_copy.stat()
    stack = open_stack(sample_copy)
    stack.check_writable()
    assert sample_copy.read_bytes() == SAMPLE.read_bytes()
    assert sample_copy.stat().st_mtime_ns == before.st_mtime_ns
    sample_copy.unlink()
    with pytest.raises(FileNotFoundError, match="copy.hdf does not exist"):
        stack.check_writable()


# new stacks


def test_written_stack_has_the_layout_of_the_original(tmp_path):
    """The same images and headers, written again, give the same types, shapes, padding and values."""
    stack = open_stack(SAMPLE)
    path = tmp_path / "again.hdf"
    write_stack(path, stack.read(0, 4), [stack.header(i) for i in range(4)])
    ours, original = contents(path), contents(SAMPLE)
    assert ours.keys() == original.keys()
    recomputed = {"minimum", "maximum", "mean", "sigma", "square_sum", "mean_nonzero", "sigma_nonzero"}
    for key, (htype, size, shape, *value) in original.items():
        name = (key[1] or "").removeprefix("EMAN.")
        assert ours[key][0] == htype, key
        if key[1] is None:  # the pixels; their place in the file may differ
            assert ours[key][1:3] == (size, shape)
            assert ours[key][-1] == value[-1]
        elif name in recomputed:
            found, expected = (np.frombuffer(data, "f4") for data in (ours[key][3], value[0]))
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        else:
            assert ours[key][2] == shape, key
            assert ours[key][3].rstrip(b"\0") == value[0].rstrip(b"\0"), key
    assert path.read_bytes()[8] == SAMPLE.read_bytes()[8] == 0  # superblock version


def test_strings_end_with_nul_and_booleans_become_int32(tmp_path):
    path = tmp_path / "types.hdf"
    write_stack(path, some_images(1), [{"text": "abc", "flag": True, "np_flag": np.bool_(False),
                                        "wide": np.int64(5), "short": np.uint8(6), "single": np.float32(1),
                                        "list": [1, 2, 3], "names": "\udcb5m"}])
    with h5py.File(path) as file:
        group = file["MDF/images/0"].id
        types = {name: h5a.open(group, f"EMAN.{name}".encode()).get_type()
                 for name in ("text", "flag", "np_flag", "wide", "short", "single", "list", "names")}
        assert describe_type(types["text"]) == ("string", h5t.STR_NULLTERM, h5t.CSET_ASCII, False)
        assert types["text"].get_size() == 4
        for name in ("flag", "np_flag", "wide", "short"):
            assert types[name].equal(h5t.STD_I32LE)
        for name in ("single", "list"):
            assert types[name].equal(h5t.IEEE_F32LE)
    header = open_stack(path).header(0)
    assert (header["text"], header["flag"], header["np_flag"], header["wide"]) == ("abc", 1, 0, 5)
    assert header["names"] == "\udcb5m"  # a byte that is no UTF-8 survives
    np.testing.assert_array_equal(header["list"], [1, 2, 3])


def test_statistics_follow_the_definitions(tmp_path):
    images = np.stack([np.zeros((BOX, BOX)), np.eye(BOX), some_images(1)[0]]).astype(np.float32)
    images[1, 0, 0] = 3
    path = tmp_path / "stats.hdf"
    write_stack(path, images)
    blank, whole, noise = (open_stack(path).header(i) for i in range(3))
    assert (blank["sigma"], blank["all_int"]) == (0, 1)
    assert not blank.keys() & {"mean_nonzero", "sigma_nonzero"}  # of no pixels
    assert (whole["minimum"], whole["maximum"], whole["square_sum"], whole["all_int"]) == (0, 3, 14, 1)
    assert whole["mean"] == pytest.approx(8 / 36)
    assert whole["sigma"] == pytest.approx(np.sqrt((14 - 64 / 36) / 35))
    assert whole["mean_nonzero"] == pytest.approx(8 / 6)
    assert whole["sigma_nonzero"] == pytest.approx(np.sqrt((14 - 64 / 6) / 5))
    assert noise["all_int"] == 0
    assert noise["sigma_nonzero"] == noise["sigma"] == pytest.approx(images[2].std(ddof=1, dtype="f8"))


def test_facts_of_the_source_do_not_outlive_it(tmp_path):
    path = tmp_path / "fresh.hdf"
    images = np.zeros((1, BOX, BOX), np.float32)
    write_stack(path, images, [{"nx": 99, "mean": 5.0, "sigma_nonzero": 5.0, "stored_renderbits": 8,
                                "stored_rendermin": 0.0, "kept": 7, "absent": None}])
    header = open_stack(path).header(0)
    assert (header["nx"], header["ny"], header["nz"], header["mean"], header["kept"]) == (BOX, BOX, 1, 0, 7)
    assert not header.keys() & {"sigma_nonzero", "stored_renderbits", "stored_rendermin", "absent"}


def test_pixel_size_goes_before_the_headers(tmp_path):
    path = tmp_path / "apix.hdf"
    write_stack(path, some_images(2), [{"apix_x": 9.0}, {}], pixel_size_A=1.31)
    assert open_stack(path).pixel_size_A == 1.31  # float64: not rounded
    assert open_stack(path).column("apix_z") == [1.31, 1.31]
    write_stack(path, some_images(1), [{"apix_x": 9}])
    assert open_stack(path).pixel_size_A == 9.0


def test_oblong_and_whole_number_images_are_stored_as_float32(tmp_path):
    images = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "oblong.hdf"
    write_stack(path, images)
    with h5py.File(path) as file:
        assert file["MDF/images/1/image"].dtype == "<f4"
        np.testing.assert_array_equal(file["MDF/images/1/image"][()], images[1])
        assert file["MDF/images/1"].attrs["EMAN.nx"] == 4
        assert file["MDF/images/1"].attrs["EMAN.ny"] == 3


@pytest.mark.parametrize("n_members", [COMPACT_BYTES // 4, COMPACT_BYTES // 4 + 1, 20_000, 300_000])
def test_large_classes_keep_their_members(tmp_path, n_members):
    members = np.arange(n_members)
    images = some_images(3)
    path = tmp_path / "large.hdf"
    large = {"members": members, "ave_n": n_members}
    write_stack(path, images, [{"members": [1, 2]}, large, {"members": [5]}])
    stack = open_stack(path)
    np.testing.assert_array_equal(stack.header(1)["members"], members)
    assert stack.header(1)["ave_n"] == n_members
    np.testing.assert_array_equal(stack.read(0, 3), images)
    with h5py.File(path) as file:
        assert file["MDF/images/1"].attrs["EMAN.members"].dtype == "<f4"
    assert path.read_bytes()[8] == 0  # superblock version
    stack.write_columns({"assign": [0, 1, 2], "ave_n": [2, 7, 1]})
    assert stack.column("ave_n") == [2, 7, 1]
    np.testing.assert_array_equal(stack.header(1)["members"], members)


def test_only_the_large_class_departs_from_the_first_hdf5_version(tmp_path):
    path = tmp_path / "large.hdf"
    write_stack(path, some_images(3), [{}, {"members": np.arange(20_000)}, {}])
    assert path.read_bytes().count(b"OHDR") == 2  # the signature of a header of 1.8: the group and its pixels


def test_members_above_two_to_the_24_are_exact(tmp_path):
    members = [5, 2**24 + 1]
    path = tmp_path / "many.hdf"
    write_stack(path, some_images(1), [{"members": members}])
    np.testing.assert_array_equal(open_stack(path).header(0)["members"], members)


def test_an_old_file_is_replaced_whole(tmp_path):
    path = tmp_path / "old.hdf"
    write_stack(path, some_images(3))
    write_stack(path, some_images(1, seed=9))
    assert open_stack(path).n_images == 1
    np.testing.assert_array_equal(open_stack(path).read(0, 1), some_images(1, seed=9))
    assert os.listdir(tmp_path) == ["old.hdf"]


@pytest.mark.parametrize(("header", "message"), [
    ({"x": 2**31}, "x of image 1 of .*bad.hdf is 2147483648: int32"),
    ({"x": []}, r"x of image 1 of .*bad.hdf has the shape \(0,\): give a number, a string or a filled list"),
    ({"x": {"a": 1}}, "x of image 1 of .*bad.hdf holds values of type object"),
    ({"x": "a\0b"}, "x of image 1 of .*bad.hdf is 'a.x00b'"),
    ({"xform.align2d": 5}, "xform.align2d of image 1 of .*bad.hdf is no transform"),
])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, header, message):
    path = tmp_path / "bad.hdf"
    write_stack(path, some_images(1))
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        write_stack(path, some_images(2), [{}, header])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["bad.hdf"]


@pytest.mark.parametrize("images", [np.zeros((0, 4, 4)), np.zeros((4, 4)), np.zeros((1, 4, 4), complex)])
def test_what_is_no_stack_of_images_is_refused(tmp_path, images):
    with pytest.raises(InputError, match=r"cannot hold .* images of shape .*: give \(n, ny, nx\) real"):
        write_stack(tmp_path / "none.hdf", images)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [3000, 20_000, 39_000])
def test_a_new_stack_that_the_disk_does_not_take_is_not_there(tmp_path, limit):
    path = tmp_path / "new.hdf"
    done = run_python("""
import resource, sys
import numpy as np
from mrefali.io import write_stack
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_stack(sys.argv[1], np.zeros((4, 48, 48)))
except OSError as error:
    print(type(error).__name__, error)
""", path, limit)
    assert done.stdout == f"OSError {path} could not be written: File too large\n"
    assert os.listdir(tmp_path) == []


def test_headers_must_be_one_an_image(tmp_path):
    with pytest.raises(InputError, match="1 headers for the 2 images of .*: give one for each"):
        write_stack(tmp_path / "none.hdf", some_images(2), [{}])


def test_new_stack_in_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="x.hdf cannot be written: there is no folder .*/no, make it"):
        write_stack(tmp_path / "no" / "x.hdf", some_images(1))


def test_new_stack_in_a_folders_place(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory: give the name of a file to write"):
        write_stack(tmp_path, some_images(1))


def test_new_stack_in_a_closed_folder(open_folder):
    open_folder.chmod(0o555)
    with ordinary_user(), pytest.raises(PermissionError, match="x.hdf cannot be written: no new file"):
        write_stack(open_folder / "x.hdf", some_images(1))


def test_a_bare_name_is_written_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stack("here.hdf", some_images(1))
    assert open_stack("here.hdf").n_images == 1
