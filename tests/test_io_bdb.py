"""EMAN2's databases: read as EMAN2 wrote them, refused where they cannot be, written back as EMAN2 would."""

import os
import pickle
import random
import re
import shutil
import stat
import struct
import sys
import tracemalloc
import zipfile
from types import SimpleNamespace

import golden
import mrcfile
import numpy as np
import pytest
import small
from berkeleydb import db
from test_io_hdf import open_folder, ordinary_user  # noqa: F401

from mrefali import cli
from mrefali.ctf import parse_ctf
from mrefali.errors import InputError
from mrefali.geometry import from_matrices, make_poses
from mrefali.io import BdbStack, btree, eman_pickle, open_stack

#: Place of the images of each database in their golden case.
IMAGES = {
    "py3#stack": ("typical", range(120)), "py3#ctfstack": ("ctf", range(20)),
    "py3#vstack": ("typical", range(5, 120, 6)), "py3#mrcsstack": ("ctf", range(19, 8, -2)),
    "py3#mrcssub": ("ctf", (13, 9)), "py3#odd?0,3,4": ("ctf", (0, 3, 4)), "py2#ctfstack": ("ctf", range(20)),
    "py2#vstack": ("ctf", range(3, 20, 4)), "py2#mixed": ("ctf", range(3, 20, 4)),
}
MAXREC = b"\x80\x02X\x06\x00\x00\x00maxrecq\x00."


def write_golden(folder):
    """The golden databases with their pixels."""
    with zipfile.ZipFile(golden.DATA / "bdb" / "databases.zip") as archive:
        archive.extractall(folder)
    typical, ctf = golden.load("typical").images, golden.load("ctf").images
    for name, images in (("py3/EMAN2DB/stack", typical), ("py3/EMAN2DB/ctfstack", ctf[:20]),
                         ("py2/EMAN2DB/ctfstack", ctf[:20]), ("py3/EMAN2DB/odd", ctf[[4, 1, 3, 0, 2]])):
        (folder / f"{name}_64x64x1").write_bytes(images.astype("<f4").tobytes())
    (folder / "py3/EMAN2DB/odd_32x32x1").write_bytes(ctf[1, 16:48, 16:48].astype("<f4").tobytes())
    mrcfile.write(folder / "py3/mrcsstack.mrcs", ctf[19:8:-2])


@pytest.fixture(scope="session")
def unchanged(tmp_path_factory):
    """The golden databases, to be read only; that they were is checked in the end."""
    folder = tmp_path_factory.mktemp("databases")
    write_golden(folder)
    before = small.snapshot(folder)
    yield f"bdb:{folder}/"
    assert small.snapshot(folder) == before


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the golden databases in it."""
    write_golden(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_database(path, records, name=None, order=1234, page_size=4096):
    """A Berkeley DB file with these records, in a database called as the file is."""
    path.parent.mkdir(exist_ok=True)
    database = db.DB()
    database.set_lorder(order)
    database.set_pagesize(page_size)
    database.open(str(path), name or path.stem, db.DB_BTREE, db.DB_CREATE)
    for key, value in records.items():
        database.put(key, value)
    database.close()


def records_by_binding(path, name):
    database = db.DB()
    database.open(str(path), name, db.DB_BTREE, db.DB_RDONLY)
    records = dict(database.items())
    database.close()
    return records


def header_records(n, size=2, **more):
    """Records of a stack of n images of size x size pixels, image i in slot n - 1 - i."""
    header = {"nx": size, "ny": size, "nz": 1, "is_complex": 0, "is_complex_x": 0, **more}
    return {**{key(i): pickle.dumps({**header, "source_n": i}, 2) for i in range(n)},
            **{b"%dx%dx1" % (size, size) + key(i): key(n - 1 - i) for i in range(n)}, MAXREC: key(n - 1)}


def key(i):
    return pickle.dumps(i, 2)


def replace_bytes(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


# --- names


@pytest.mark.parametrize("name", ["bdb:stack", "bdb:.#stack", "BDB:../py3#stack", "bdb:../py3/stack", "bdb:~#stack",
                                  "bdb:~/../py3#stack", "bdb:{here}#stack", "bdb:{here}/stack"])
def test_every_form_of_a_name_finds_the_database(folder, monkeypatch, name):
    monkeypatch.chdir("py3")
    monkeypatch.setenv("HOME", os.getcwd())
    assert open_stack(name.format(here=os.getcwd())).n_images == 120


@pytest.mark.parametrize("name", ["bdb:", "bdb:py3#", "bdb:py3/", "bdb:py3#stack?"])
def test_a_name_without_database_is_refused(folder, name):
    with pytest.raises(InputError, match=r"names no database: give bdb:NAME or bdb:DIR#NAME"):
        open_stack(name)


def test_an_absent_database_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"py3/EMAN2DB/other\.bdb does not exist"):
        open_stack("bdb:py3#other")


def test_keys_choose_images_in_their_order(unchanged):
    stack = open_stack(unchanged + "py3#stack?7,3,119")
    assert stack.keys.tolist() == [7, 3, 119]
    assert stack.column("source_n") == [7, 3, 119]
    np.testing.assert_array_equal(stack.read(0, 3), golden.load("typical").images[[7, 3, 119]])


@pytest.mark.parametrize(("keys", "message"), [
    ("1,1", "asks for key 1 more than once"), ("4,120", r"asks for key 120, but the database has images under keys 0"),
    ("1-3", r"\?1-3 is no choice of images: give \?0,3,4 or \?select"), ("x", "is no choice of images"),
    (",", "is no choice"),
])
def test_keys_that_are_not_there_are_refused(unchanged, keys, message):
    with pytest.raises(InputError, match=message):
        open_stack(f"{unchanged}py3#stack?{keys}")


def test_lists_of_keys_select_and_exclude(folder):
    write_database(folder / "EMAN2DB" / "select.bdb", {pickle.dumps("good", 2): pickle.dumps([4, 0], 2),
                                                       pickle.dumps("all", 2): pickle.dumps([0, 1, 2, 3, 4], 2),
                                                       pickle.dumps("bad", 2): pickle.dumps("no list", 2)})
    assert open_stack("bdb:py3#odd?select.good").keys.tolist() == [4, 0]
    assert BdbStack("bdb:py3#odd?exclude.good").keys.tolist() == [1, 3]
    with pytest.raises(InputError, match=r"exclude\.all leaves out every image: choose at least one"):
        open_stack("bdb:py3#odd?exclude.all")
    with pytest.raises(InputError, match=r"select\.bdb has no record other"):
        open_stack("bdb:py3#odd?select.other")
    with pytest.raises(InputError, match=r"record bad of .*select\.bdb is no list of keys"):
        open_stack("bdb:py3#odd?select.bad")


# --- reading


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_those_that_eman2_stored(unchanged, name):
    case, indices = IMAGES[name]
    stack = open_stack(unchanged + name)
    expected = golden.load(case).images[list(indices)]
    assert (stack.n_images, len(stack), stack.box, stack.pixel_size_A) == (len(expected), len(expected), 64, 1.0)
    np.testing.assert_array_equal(stack.read(0, stack.n_images), expected)
    np.testing.assert_array_equal(stack.read_at([1, 0, 1]), expected[[1, 0, 1]])
    assert stack.read(1, 2).dtype == np.float32


@pytest.mark.parametrize("name", IMAGES)
def test_headers_are_those_that_eman2_stored(unchanged, name):
    case, indices = IMAGES[name]
    stack = open_stack(unchanged + name)
    np.testing.assert_array_equal(stack.poses(), from_matrices(np.tile(np.eye(3, 4), (stack.n_images, 1, 1))))
    np.testing.assert_allclose(stack.column("mean"), golden.load(case).images[list(indices)].mean((1, 2)), atol=1e-6)
    assert stack.column("nx") == [64] * stack.n_images
    assert stack.column("nosuch") == [None] * stack.n_images
    header = stack.header(1)
    assert header["xform.align2d"].shape == (3, 4)
    assert set(stack.header_names()) >= set(header)
    assert stack.header_names()["nx"] == stack.n_images
    if case == "ctf":
        for text, index in zip(stack.column("ctf"), indices, strict=True):
            expected = parse_ctf(golden.load("ctf").headers[index]["ctf"])
            np.testing.assert_allclose(parse_ctf(text).tolist(), expected.tolist(), rtol=1e-3)  # HDF has few digits


def test_a_list_of_numbers_is_an_array(unchanged):
    np.testing.assert_array_equal(open_stack(unchanged + "py3#mrcsstack").header(2)["ptcl_source_coord"], [102, 202])


@pytest.mark.parametrize(("values", "text"), [
    (("EMAN2Ctf", 1.5, 0.1, 30, 50, 10, 300, 2, 4, 0, 2, 7, 8, 1, 9), "E1.5 0.1 30 50 10 300 2 4 0 2,7,8 1,9"),
    (("EMAN1Ctf", -1.5, 50, 1, 0.1, 0, 0, 0, 0, 300, 2, 4), "O-1.5 50 1 0.1 0 0 0 0 300 2 4"),
])
def test_ctfs_are_the_strings_of_hdf_files(tmp_path, values, text):
    """And from the string the same object is made again."""
    kind, *numbers = values
    instance = eman_pickle.Instance(("libpyAligner2", kind), tuple(map(float, numbers)))
    records = header_records(1)
    records[key(0)] = eman_pickle.dump({"nx": 2, "ny": 2, "nz": 1, "is_complex_x": 0, "ctf": instance})
    write_database(tmp_path / "EMAN2DB" / "a.bdb", records)
    stack = BdbStack(f"bdb:{tmp_path}#a")
    assert stack.column("ctf") == [text]
    stack.write_columns({"ctf": [text]})
    assert records_by_binding(tmp_path / "EMAN2DB" / "a.bdb", "a") == records


def test_an_image_out_of_range_is_an_index_error(unchanged):
    with pytest.raises(IndexError, match=r"images -1 to 120 .* asked for: it has 0 to 119"):
        open_stack(unchanged + "py3#stack").read_at([-1, 120])


def test_a_renamed_file_keeps_the_name_inside(folder):
    for old, new in (("stack.bdb", "renamed.bdb"), ("stack_64x64x1", "renamed_64x64x1")):
        os.rename(f"py3/EMAN2DB/{old}", f"py3/EMAN2DB/{new}")
    stack = open_stack("bdb:py3#renamed")
    np.testing.assert_array_equal(stack.read(3, 4), golden.load("typical").images[3:4])
    stack.write_columns({"assign": range(120)})
    assert len(records_by_binding("py3/EMAN2DB/renamed.bdb", "stack")) == 242


@pytest.mark.parametrize(("order", "page_size", "n"), [(1234, 512, 700), (4321, 512, 700), (4321, 4096, 3000),
                                                       (1234, 65536, 3000)])
def test_every_size_and_order_of_pages_is_read_as_berkeley_db_reads_it(tmp_path, order, page_size, n):
    """Trees of one to four levels, keys out of the order of images, long items, and records that were deleted."""
    records = header_records(n, members=list(range(400)))
    path = tmp_path / "EMAN2DB" / "a.bdb"
    write_database(path, records, order=order, page_size=page_size)
    database = db.DB()
    database.open(str(path), "a", db.DB_BTREE)
    for i in range(n // 2, n):
        database.delete(key(i))
    database.close()
    with btree.open_tree(path, "a") as tree:
        assert {record: value for record, value, _ in tree.records()} == records_by_binding(path, "a")
    pixels = np.arange(4 * n, dtype=np.float32).reshape(n, 2, 2)
    (tmp_path / "EMAN2DB" / "a_2x2x1").write_bytes(pixels.astype("<f4" if order == 1234 else ">f4").tobytes())
    stack = open_stack(f"bdb:{tmp_path}#a?" + ",".join(map(str, range(n // 2))))
    np.testing.assert_array_equal(stack.read(0, n // 2), pixels[::-1][:n // 2])
    assert stack.column("source_n") == list(range(n // 2))
    stack.write_columns({"assign": range(n // 2)})
    assert db.DB().verify(str(path)) is None
    assert stack.column("assign") == list(range(n // 2))
    assert path.read_bytes()[12:16] == (b"\x62\x31\x05\x00" if order == 1234 else b"\x00\x05\x31\x62")


def test_version_10_is_read(folder):
    set_version(folder / "py3/EMAN2DB/stack.bdb", 10)
    np.testing.assert_array_equal(open_stack("bdb:py3#stack").read(0, 120), golden.load("typical").images)


def set_version(path, version):
    replace_bytes(path, struct.pack("<2I", 0x053162, 9), struct.pack("<2I", 0x053162, version))


# --- what cannot be read or aligned


def test_holes_are_refused_by_key_and_listed_by_info(folder, capsys):
    with pytest.raises(InputError, match=r"py3#odd has no image 2 of 0 to 4 .*\?0,3,4"):
        open_stack("bdb:py3#odd")
    assert BdbStack("bdb:py3#odd").keys.tolist() == [0, 1, 3, 4]
    assert cli.main(["info", "bdb:py3#odd"]) == 0
    out = capsys.readouterr().out
    assert "4 images unequal or not square" in out
    assert "alignment refuses them: bdb:py3#odd has no image 2 of 0 to 4" in out


def test_images_of_several_sizes_are_refused_by_key(unchanged):
    with pytest.raises(InputError, match=r"2 sizes, 64 x 64 x 1 under keys 0, 4; 32 x 32 x 1 under key 1: choose"):
        open_stack(unchanged + "py3#odd?1,0,4")
    with pytest.raises(InputError, match="2 sizes"):
        BdbStack(unchanged + "py3#odd?1,0,4").read(0, 1)
    assert open_stack(unchanged + "py3#odd?1").box == 32


def test_the_last_images_may_be_missing_too(tmp_path):
    records = header_records(9)
    for i in (2, 4, 5, 8):
        del records[key(i)]
    write_database(tmp_path / "EMAN2DB" / "a.bdb", records)
    with pytest.raises(InputError, match=r"has no image 2, 4-5, 8 of 0 to 8"):
        open_stack(f"bdb:{tmp_path}#a")


@pytest.mark.parametrize(("header", "message"), [
    ({"nx": 3}, "images of 3 x 2 x 1 pixels: only square 2-D images"),
    ({"nz": 2}, "images of 2 x 2 x 2 pixels: only square 2-D images"),
    ({"is_complex": 1}, r"Fourier transforms \(is_complex=1\) under key 0:"),
    ({"nx": 0}, r"image 0 has the size \[0, 2, 1\]"),
    ({"nx": "2"}, r"image 0 has the size \['2', 2, 1\]"),
    ({"data_path": "a.hdf"}, r"data_path='a\.hdf' and ptcl_source_coord_id=None: only FILE\*OFFSET"),
    ({"data_path": "a.mrcs"}, r"data_path='a\.mrcs' and ptcl_source_coord_id=None: only"),
    ({"data_path": "a*-4"}, r"data_path='a\*-4'"),
    ({"data_path": 7}, "data_path=7"),
    ({"data_path": "a\0*4"}, r"data_path='a\\x00\*4'"),
    ({"members": [[1]]}, "has a header that is no plain value"),
])
def test_an_image_that_cannot_be_used_is_refused(tmp_path, header, message):
    write_database(tmp_path / "EMAN2DB" / "a.bdb", header_records(1, **header))
    with pytest.raises(InputError, match=message):
        open_stack(f"bdb:{tmp_path}#a")


@pytest.mark.parametrize(("pose", "message"), [
    ({}, "image 0 of .*#a has no xform.align2d: set it with mrefali header 'bdb:.*#a' --params=xform.align2d --zero"),
    ({"xform.align2d": 7}, "xform.align2d of image 0 of .*#a is no transform of finite numbers: reset it with mrefali"),
    ({"xform.align2d": eman_pickle.Instance(eman_pickle.TRANSFORM, (np.inf,) * 12)}, "no transform of finite numbers"),
])
def test_an_image_without_pose_is_named(tmp_path, pose, message):
    records = header_records(1)
    records[key(0)] = eman_pickle.dump({**eman_pickle.load(records[key(0)]), **pose})
    write_database(tmp_path / "EMAN2DB" / "a.bdb", records)
    with pytest.raises(InputError, match=message):
        BdbStack(f"bdb:{tmp_path}#a").poses()


def test_an_image_without_slot_is_named(tmp_path):
    records = header_records(3)
    del records[b"2x2x1" + key(1)]
    write_database(tmp_path / "EMAN2DB" / "a.bdb", records)
    with pytest.raises(InputError, match="no pixels are noted for key 1: the database is damaged"):
        open_stack(f"bdb:{tmp_path}#a")


def test_a_stack_whose_writer_was_killed_is_said_to_be_one(tmp_path):
    write_database(tmp_path / "EMAN2DB" / "a.bdb", {})
    with pytest.raises(InputError, match="a has no images: give a database of at least one"):
        open_stack(f"bdb:{tmp_path}#a")
    (tmp_path / "EMAN2DB" / "a_2x2x1").write_bytes(bytes(16))
    with pytest.raises(InputError, match=r"no images, though there are pixels in .*a_2x2x1: the program .* was ended"):
        open_stack(f"bdb:{tmp_path}#a")


def test_missing_pixels_are_named_with_the_keys_that_need_them(folder):
    pixels = folder / "py3/EMAN2DB/ctfstack_64x64x1"
    pixels.rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"ctfstack_64x64x1, with the pixels of keys 0, 1, .* 9 and 10 more of "
                                                r"bdb:py3#ctfstack, does not exist"):
        open_stack("bdb:py3#ctfstack")
    pixels.mkdir()
    with pytest.raises(IsADirectoryError, match="ctfstack_64x64x1, .* is a directory"):
        open_stack("bdb:py3#ctfstack").read(0, 1)
    pixels.rmdir()
    pixels.write_bytes(bytes(19 * 4 * 64 * 64))
    with pytest.raises(InputError, match="ends before the pixels of image 19 .* 311296 bytes, 327680 are needed"):
        open_stack("bdb:py3#ctfstack")
    assert open_stack("bdb:py3#ctfstack?0,18").n_images == 2


def test_pixels_that_vanish_while_a_stack_is_open_are_missed(folder):
    stack = open_stack("bdb:py3#ctfstack")
    os.truncate("py3/EMAN2DB/ctfstack_64x64x1", 20000)
    with pytest.raises(InputError, match="ends within an image of bdb:py3#ctfstack: it was cut short"):
        stack.read(0, 2)


def test_an_mrcs_that_does_not_fit_is_refused(folder):
    images = golden.load("ctf").images
    mrcfile.write("py3/mrcsstack.mrcs", images[:5], overwrite=True)
    with pytest.raises(InputError, match=r"ends before the pixels of image 5 .* 5 images, 6 are needed"):
        open_stack("bdb:py3#mrcsstack")
    mrcfile.write("py3/mrcsstack.mrcs", images[:6, 1:], overwrite=True)
    with pytest.raises(InputError, match="images of 64 x 63 pixels, but bdb:py3#mrcsstack says 64 x 64"):
        open_stack("bdb:py3#mrcsstack")
    mrcfile.write("py3/mrcsstack.mrcs", images[:6].astype(np.complex64), overwrite=True)
    with pytest.raises(InputError, match="pixels of type complex64"):
        open_stack("bdb:py3#mrcsstack")
    with open("py3/mrcsstack.mrcs", "wb") as file:
        file.write(b"no MRC")
    with pytest.raises(InputError, match="is no sound MRC file"):
        open_stack("bdb:py3#mrcsstack")
    os.remove("py3/mrcsstack.mrcs")
    with pytest.raises(FileNotFoundError, match=r"mrcsstack\.mrcs, with the pixels of keys 0, 1"):
        open_stack("bdb:py3#mrcsstack")


@pytest.mark.parametrize("data", [b"", b"no database", bytes(8192), b"\x89HDF\r\n\x1a\n" + bytes(4096)])
def test_what_is_no_berkeley_db_is_refused(tmp_path, data):
    (tmp_path / "EMAN2DB").mkdir()
    (tmp_path / "EMAN2DB" / "a.bdb").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.bdb is no btree of Berkeley DB: give a database that EMAN2 wrote"):
        open_stack(f"bdb:{tmp_path}#a")


@pytest.mark.parametrize(("at", "value", "message"), [
    (16, 8, "version 8 of the btree format: only 9 and 10 can be read"),
    (20, 4097, "a page size of 4097"), (20, 2**31, "a page size of 2147483648"), (24, 0x0901, "is encrypted"),
    (32, 2**32 - 1, "is cut short: it has 11 of 4294967296 pages"), (88, 0, "page 0 of 11 is named, or named twice"),
    (88, 2**32 - 1, "page 4294967295 of 11 is named"), (8, 5, "page 0 is not where it should be"),
])
def test_damage_of_the_first_page_is_named(folder, at, value, message):
    path = folder / "py3/EMAN2DB/ctfstack.bdb"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, at, value)
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_stack("bdb:py3#ctfstack")


def test_a_circle_of_pages_is_refused(tmp_path):
    """Of a long item, and of the leaves."""
    path = tmp_path / "EMAN2DB" / "a.bdb"
    write_database(path, header_records(300, members=list(range(300))), page_size=512)
    sound = path.read_bytes()
    for kind, message in ((7, "named twice"), (5, "out of its chain|in no branch")):
        data = bytearray(sound)
        pages = [at for at in range(512 * 4, len(data), 512) if data[at + 25] == kind]
        for at in pages:
            struct.pack_into("<I", data, at + 16, pages[0] // 512)
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_stack(f"bdb:{tmp_path}#a")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_here",)


@pytest.mark.parametrize(("value", "reason"), [
    (pickle.dumps({"a": Malicious()}, 2), "it asks for posix.system: only Transform, EMAN2Ctf, EMAN1Ctf of EMAN2"),
    (pickle.dumps({"a": np.float32(1)}, 2), "it asks for numpy"),
    (b"\x80\x02}(U\x01aclibpyEMData2\nEMData\n)Ru.", "it asks for libpyEMData2.EMData"),
    (b"\x80\x02}U\x01aclibpyTransform2\nTransform\n](K\x01e\x85Rs.", "does not take 1 such values"),
    (b"\x80\x02}U\x01aclibpyTransform2\nTransform\nK\x01Rs.", "it calls what is none of EMAN2's classes"),
    (b"\x80\x02}U\x01aclibpyAligner2\nEMAN2Ctf\n](" + 12 * b"K\x63" + b"e\x85Rs.", "does not take 12"),
    (b"\x80\x02U\x02os\x8c\x06systemR.", "code 0x8c"), (pickle.dumps({}, 4), "no pickle of protocol 2"),
    (pickle.dumps({"a": 1}, 0), "no pickle of protocol 2"), (b"", "no pickle"), (b"\x80\x02", "out of range"),
    (b"\x80\x02}K\x01K\x02s", "out of range"), (b"\x80\x02}X\xff\xff\xff\x7fa", "it is cut short"),
    (b"\x80\x02\x8a\xff.", "a whole number of 255 bytes"), (b"\x80\x02\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "0x96"),
    (b"\x80\x02]]s.", "cut short|it sets|out of range"), (b"\x80\x02}K\x01a.", "it appends to what is no list"),
    (b"\x80\x02}(K\x01u.", "shorter"), (b"\x80\x02}]K\x01s.", "unhashable"), (b"\x80\x02h\x07.", "7"),
    (b"\x80\x02}}.", "does not end where it should"), (b"\x80\x02}..", "does not end where it should"),
    (b"\x80\x02]q\x00h\x00a.", "is no header"), (b"\x80\x02}K\x01K\x01s.", "no plain value"),
    (b"\x80\x02}X\x01\x00\x00\x00\xffK\x01s.", "decode"),
])
def test_a_pickle_of_anything_but_plain_values_is_refused_unread(folder, value, reason):
    records = header_records(2)
    records[key(1)] = value
    write_database(folder / "EMAN2DB" / "a.bdb", records)
    with pytest.raises(InputError, match=reason):
        open_stack("bdb:a")
    assert not os.path.exists("was_here")


def test_a_memo_of_four_thousand_million_places_takes_no_memory(tmp_path):
    records = header_records(1)
    records[key(0)] = records[key(0)].replace(b"}q\x00", b"}r\xff\xff\xff\xff")
    write_database(tmp_path / "EMAN2DB" / "a.bdb", records)
    tracemalloc.start()
    assert BdbStack(f"bdb:{tmp_path}#a").n_images == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(("record", "value", "message"), [
    (MAXREC, pickle.dumps("many", 2), "is no number from 0 on"),
    (MAXREC, pickle.dumps(-1, 2), "is no number from 0 on"),
    (b"2x2x1" + key(0), pickle.dumps(2**40, 2), "is no number from 0 on"),
    (b"2x2x1" + pickle.dumps([1], 2), key(0), "is the slot of no image"),
    (b"no pickle", key(0), "no pickle of protocol 2"),
    (pickle.dumps(-3, 2), header_records(1)[key(0)], "image -3"),
    (b"\x80\x02J\x00\x00\x00\x00.", header_records(1)[key(0)], "image 0 is there twice"),
])
def test_a_record_that_cannot_be_is_named(tmp_path, record, value, message):
    write_database(tmp_path / "EMAN2DB" / "a.bdb", header_records(2) | {record: value})
    with pytest.raises(InputError, match=message):
        BdbStack(f"bdb:{tmp_path}#a")


def damage(rng, data):
    """One kind of damage done to ``data``: bits, bytes, bytes of page headers, whole pages, or the end lost."""
    kind, pages = rng.randrange(5), len(data) // 4096
    for _ in range(rng.choice((1, 1, 3, 20))):
        if kind == 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 2:
            data[rng.randrange(pages) * 4096 + rng.randrange(90)] = rng.randrange(256)
        elif kind == 3:
            to, source = (rng.randrange(pages) * 4096 for _ in range(2))
            data[to:to + 4096] = data[source:source + 4096]
    if kind == 4:
        del data[rng.randrange(len(data)):]


@pytest.mark.parametrize("n_files", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_database_is_read_or_refused_in_one_line(folder, n_files):
    """Nothing else is raised, and no more memory taken than a small multiple of the file and its pixels."""
    rng = random.Random(n_files)
    names = ("odd", "vstack", "mrcsstack", "mrcssub")
    sound = {name: (folder / f"py3/EMAN2DB/{name}.bdb").read_bytes() for name in names}
    messages = []
    tracemalloc.start()
    for _ in range(n_files):
        name = rng.choice(names)
        data = bytearray(sound[name])
        damage(rng, data)
        (folder / f"py3/EMAN2DB/{name}.bdb").write_bytes(data)
        try:
            stack = BdbStack(f"bdb:py3#{name}")
            assert sum(stack.header_names().values()) >= stack.n_images
            assert len(stack.header(0)) >= 4
            stack.require_alignable()
            assert stack.read(0, stack.n_images).shape == (stack.n_images, stack.box, stack.box)
            assert stack.poses().shape == (stack.n_images,)
            if stack.write_back_obstacle() is None:
                stack.write_columns({"assign": range(stack.n_images)})
                assert stack.column("assign") == list(range(stack.n_images))
        except (InputError, FileNotFoundError, IsADirectoryError) as error:
            messages.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * n_files < len(messages) < n_files
    assert "\n" not in "".join(messages)
    assert peak < 4e6


# --- writing back


def test_what_is_written_is_what_eman2_writes(folder):
    """The golden pair: the original wrote these poses and classes over those of the first database."""
    before = records_by_binding("py3/EMAN2DB/stack.bdb", "stack")
    original = records_by_binding("py3_after/EMAN2DB/stack.bdb", "stack")
    after = BdbStack("bdb:py3_after#stack")
    stack = open_stack("bdb:py3#stack")
    stack.write_columns({"xform.align2d": after.poses(), "assign": np.array(after.column("assign"))})
    written = records_by_binding("py3/EMAN2DB/stack.bdb", "stack")
    assert written.keys() == before.keys() == original.keys()
    for record, value in written.items():
        header, theirs, old = (eman_pickle.load(records[record]) for records in (written, original, before))
        if type(header) is not dict:
            assert value == before[record] == original[record]
            continue
        np.testing.assert_allclose(header.pop("xform.align2d").values, theirs["xform.align2d"].values, atol=1e-6)
        assert header.pop("assign") == theirs["assign"]
        del old["xform.align2d"]
        assert repr(header) == repr(old)
    np.testing.assert_array_equal(stack.column("xform.align2d"), BdbStack("bdb:py3#stack").column("xform.align2d"))
    np.testing.assert_array_equal(open_stack("bdb:py3#stack").read(0, 120), golden.load("typical").images)


def test_the_file_written_is_a_sound_btree_of_version_9(folder):
    open_stack("bdb:py3#ctfstack").write_columns({"assign": range(20)})
    assert db.DB().verify("py3/EMAN2DB/ctfstack.bdb") is None
    data = (folder / "py3/EMAN2DB/ctfstack.bdb").read_bytes()
    assert struct.unpack("<3I", data[12:24]) == (0x053162, 9, 4096)
    assert records_by_binding("py3/EMAN2DB/ctfstack.bdb", None) == {b"ctfstack": b"\0\0\0\2"}


@pytest.mark.parametrize("name", ["py3/EMAN2DB/stack", "py3/EMAN2DB/mrcssub", "py3_after/EMAN2DB/stack",
                                  "py2/EMAN2DB/vstack"])
def test_headers_are_pickled_to_the_byte_as_their_writer_did(folder, name):
    values = records_by_binding(f"{name}.bdb", name.split("/")[-1]).values()
    headers = [value for value in values if value.startswith(b"\x80\x02}")]
    assert headers
    assert [eman_pickle.dump(eman_pickle.load(value)) for value in headers] == headers


@pytest.mark.parametrize("header", [
    {}, {"a": 1}, {"a": None, "b": True, "c": False}, {"a": [], "b": [1], "c": [1.5, -2], "d": list(range(2500))},
    {str(i): float(i) for i in range(1500)}, {"a": 255, "b": 256, "c": 65536, "d": -1, "e": 2**31, "f": -2**40},
    {"é\u20ac": "ü" * 300, "b": ""},
])
def test_headers_are_pickled_as_python_does(header):
    assert eman_pickle.dump(header) == pickle.dumps(header, 2)
    assert eman_pickle.load(pickle.dumps(header, 2)) == header


def test_one_object_twice_is_written_once():
    text = "twice" * 3
    header = {"a": text, "b": text, "c": [text]}
    assert eman_pickle.dump(header) == pickle.dumps(header, 2)
    assert eman_pickle.dump(eman_pickle.load(eman_pickle.dump(header))) == pickle.dumps(header, 2)


@pytest.mark.parametrize("name", ["py2#ctfstack", "py2#mixed", "py3#vstack", "py3#mrcssub"])
def test_headers_of_every_kind_of_database_are_written(folder, name):
    stack = open_stack(f"bdb:{name}")
    pixels, mean, n = stack.read(0, stack.n_images), stack.column("mean"), stack.n_images
    poses = make_poses(np.arange(n) * 10.0, 1.5, -2.0, np.arange(n) % 2)
    stack.write_columns({"xform.align2d": poses, "assign": np.arange(n), "quality": np.arange(n) / 3,
                         "note": ["schön"] * n})
    for again in (stack, open_stack(f"bdb:{name}")):
        np.testing.assert_allclose(again.poses().tolist(), poses.tolist(), atol=1e-4)
        assert again.column("assign") == list(range(n))
        np.testing.assert_array_equal(again.column("quality"), (np.arange(n) / 3).astype(np.float32))
        assert again.column("note") == ["schön"] * n
        assert again.column("mean") == mean
        np.testing.assert_array_equal(again.read(0, n), pixels)


def test_strings_of_python_2_stay_strings_of_python_2(folder):
    open_stack("bdb:py2#ctfstack").write_columns({"note": ["schön"] * 20})
    value = records_by_binding("py2/EMAN2DB/ctfstack.bdb", "ctfstack")[key(7)]
    assert b"U\x04note" in value
    assert "U\x06schön".encode() in value
    assert b"X" not in {value[i:i + 1] for i in range(3, 6)}


def test_only_the_chosen_images_are_written(folder):
    before = records_by_binding("py3/EMAN2DB/odd.bdb", "odd")
    open_stack("bdb:py3#odd?4,0").write_columns({"assign": [7, 8]})
    after = records_by_binding("py3/EMAN2DB/odd.bdb", "odd")
    assert {record for record in after if after[record] != before[record]} == {key(0), key(4)}
    assert BdbStack("bdb:py3#odd").column("assign") == [8, None, None, 7]


@pytest.mark.parametrize("columns", [{"assign": [1, 2]}, {"assign": [2**31] * 20}, {"xform.align2d": [1] * 20},
                                     {"ctf": ["E1 2 3"] * 20}, {"ctf": ["none"] * 20}])
def test_a_column_that_cannot_be_stored_changes_nothing(folder, columns):
    before = small.snapshot(folder)
    with pytest.raises(InputError, match="give|takes"):
        open_stack("bdb:py3#ctfstack").write_columns(columns)
    assert small.snapshot(folder) == before


def test_a_failure_while_writing_leaves_the_old_database(folder, monkeypatch):
    stack = open_stack("bdb:py3#ctfstack")
    before = small.snapshot(folder)

    def fail(*files):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        stack.write_columns({"assign": range(20)})
    assert small.snapshot(folder) == before


def test_what_berkeley_db_reports_is_handed_on(tmp_path):
    tree = SimpleNamespace(name="a", order="<", page_size=1000)  # no power of two
    with pytest.raises(OSError, match=r"new cannot be written, Berkeley DB says: .*; the database is as it was"):
        btree.write_tree(str(tmp_path / "new"), tree, [])


def test_an_image_that_another_program_deleted_is_missed(folder):
    stack = open_stack("bdb:py3#ctfstack")
    database = db.DB()
    database.open("py3/EMAN2DB/ctfstack.bdb", "ctfstack", db.DB_BTREE)
    database.delete(key(3))
    database.close()
    before = small.snapshot(folder)
    with pytest.raises(InputError, match="has lost key 3 while it was in use: headers were not written"):
        stack.write_columns({"assign": range(20)})
    with pytest.raises(InputError, match="was changed by another program|is damaged"):
        stack.column("nx")
    assert small.snapshot(folder) == before


def test_a_disk_without_room_for_the_copy_is_refused_up_front(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    before = small.snapshot(folder)
    with pytest.raises(InputError, match=r"headers of bdb:py3#ctfstack are written into a copy .* 0\.0 MB free: make"):
        open_stack("bdb:py3#ctfstack").write_columns({"assign": range(20)})
    assert small.snapshot(folder) == before


@pytest.mark.parametrize(("apix", "pixel_size_A"), [(2.5, 2.5), (0.0, None), (-1.0, None), (np.nan, None)])
def test_a_pixel_size_that_is_no_length_is_unknown(tmp_path, apix, pixel_size_A):
    write_database(tmp_path / "EMAN2DB/a.bdb", header_records(1, apix_x=apix))
    assert BdbStack(f"bdb:{tmp_path}#a").pixel_size_A == pixel_size_A


def test_a_pixel_size_that_is_no_number_is_refused(tmp_path):
    write_database(tmp_path / "EMAN2DB/a.bdb", header_records(1, apix_x="two"))
    with pytest.raises(InputError, match="^apix_x of key 0 of bdb:.*#a is 'two': it must be one number"):
        BdbStack(f"bdb:{tmp_path}#a")


def test_mode_and_links_of_the_file_are_kept(folder):
    path = folder / "py3/EMAN2DB/ctfstack.bdb"
    path.rename(folder / "real.bdb")
    path.symlink_to(folder / "real.bdb")
    (folder / "real.bdb").chmod(0o640)
    open_stack("bdb:py3#ctfstack").write_columns({"assign": range(20)})
    assert path.is_symlink()
    assert stat.S_IMODE((folder / "real.bdb").stat().st_mode) == 0o640
    assert open_stack("bdb:py3#ctfstack").column("assign") == list(range(20))


def test_a_database_that_may_not_be_written_is_read_only(open_folder):  # noqa: F811
    path = open_folder / "EMAN2DB" / "a.bdb"
    write_database(path, header_records(2))
    (open_folder / "EMAN2DB" / "a_2x2x1").write_bytes(bytes(32))
    with ordinary_user():
        stack = open_stack(f"bdb:{open_folder}#a")
        assert stack.read(0, 2).shape == (2, 2, 2)
        with pytest.raises(PermissionError, match=r"a\.bdb cannot be written to, .* allow it with chmod u\+w"):
            stack.write_columns({"assign": [0, 1]})
    (open_folder / "EMAN2DB" / "a_2x2x1").chmod(0)
    with ordinary_user(), pytest.raises(PermissionError, match="a_2x2x1, with the pixels of .* cannot be read: allow"):
        open_stack(f"bdb:{open_folder}#a")
    path.chmod(0)
    with ordinary_user(), pytest.raises(PermissionError, match=r"a\.bdb cannot be opened \(Permission denied\)"):
        open_stack(f"bdb:{open_folder}#a")


def test_nothing_is_in_the_way_of_writing_a_database_of_version_9(unchanged):
    assert open_stack(unchanged + "py3#stack").write_back_obstacle() is None


def forget_binding(folder, monkeypatch, name=None):
    monkeypatch.setitem(sys.modules, "berkeleydb", None)


def change_binding(folder, monkeypatch):
    monkeypatch.setattr(db, "version", lambda: (18, 1, 40))


def raise_version(folder, monkeypatch, name="ctfstack"):
    set_version(folder / f"py3/EMAN2DB/{name}.bdb", 10)


def add_database(folder, monkeypatch):
    write_database(folder / "py3/EMAN2DB/ctfstack.bdb", {b"a": b"b"}, "second")


@pytest.mark.parametrize(("prepare", "message"), [
    (forget_binding, r"no Berkeley DB binding can be loaded .*: pip install 'mrefali\[bdb\]'"),
    (change_binding, r"binding was built with version 18\.1\.40: bdb files of EMAN2 need version 5"),
    (raise_version, "has version 10 of the format, but Berkeley DB 5 writes version 9 only"),
    (add_database, "holds the databases 'ctfstack', 'second', not one"),
])
def test_an_obstacle_to_writing_is_known_before(folder, monkeypatch, prepare, message):
    prepare(folder, monkeypatch)
    before = small.snapshot(folder)
    stack = open_stack("bdb:py3#ctfstack")
    assert re.search(message, stack.write_back_obstacle())
    with pytest.raises(InputError, match=f"headers of bdb:py3#ctfstack cannot be written: .*{message}"):
        stack.check_writable()
    with pytest.raises(InputError, match=message):
        stack.write_columns({"assign": range(20)})
    assert small.snapshot(folder) == before


# --- the command line


def test_poses_are_reset_by_the_header_command(folder):
    assert cli.main(["header", "bdb:py3#ctfstack", "--params=xform.align2d", "--zero"]) == 0
    np.testing.assert_array_equal(open_stack("bdb:py3#ctfstack").poses(), np.zeros(20, make_poses(0).dtype))
