"""Headers read without HDF5 are those that HDF5 gives, in every kind of file, or are left to it."""

import io
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import small
from h5py import h5a, h5d, h5g, h5s, h5t
from hypothesis import given, settings
from hypothesis import strategies as st
from test_io_hdf import SAMPLE, make_stack, set_attribute, some_images

from mrefali.errors import InputError
from mrefali.io import HdfStack, hdf, write_stack
from mrefali.io.hdf import MATRIX

NAMES = ["xform.align2d", "assign", "ctf", "ctf_applied", "nx", "apix_x", "members", "absent", "nz", "a"]


def by_hdf5(path):
    """Boxes, offsets and headers of a stack as HDF5 alone gives them."""
    with hdf._open_images(path) as images:
        n = hdf._count(path, images)
        layouts = [hdf._layout(path, images, i) for i in range(n)]
        return layouts, {name: [hdf._value(h5g.open(images, b"%d" % i), hdf._key(name)) for i in range(n)]
                         for name in NAMES}


def by_scan(path):
    """The same as they are read."""
    with hdf._open_images(path) as images:
        n = hdf._count(path, images)
        layouts = [pair for _, boxes, offsets in hdf._Scan(path, images, n).layouts()
                   for pair in zip(boxes.tolist(), offsets.tolist(), strict=True)]
        return layouts, {name: list(hdf._Scan(path, images, n).values(hdf._key(name))) for name in NAMES}


def assert_same(one, other):
    """Hold headers against each other: types too, NaN equal to NaN."""
    assert one[0] == other[0]
    for name in NAMES:
        for a, b in zip(one[1][name], other[1][name], strict=True):
            assert (type(a), np.shape(a), getattr(a, "dtype", None)) == (
                type(b), np.shape(b), getattr(b, "dtype", None)), name
            assert repr(a) == repr(b), name


@pytest.fixture
def opened(monkeypatch):
    """How often HDF5 has been asked for an image."""
    names, open_group = [], h5g.open

    def note_and_open(group, name):
        names.append(name)
        return open_group(group, name)

    monkeypatch.setattr(h5g, "open", note_and_open)
    return names


def headers(i):
    return {"xform.align2d": np.arange(12.0).reshape(3, 4) + i, "assign": i, "ctf": "E2 0 0" + " 1" * (i % 5),
            "ctf_applied": i % 2, "apix_x": 2.5, "members": [1, 2, 3 + i] if i % 3 else None, "quality": i / 7}


def eman2_like(path, n=40):
    """As EMAN2 makes it: attributes one after another behind the pixels, so that headers go on elsewhere."""
    write_stack(path, some_images(n), [headers(i) for i in range(n)])


def h5py_like(path, n=40):
    """By h5py's high level, which keeps times; a list and a text too."""
    make_stack(path, list(some_images(n)))
    with h5py.File(path, "r+") as file:
        for i in range(n):
            attributes = file[f"MDF/images/{i}"].attrs
            attributes["EMAN.assign"] = np.array([i], "i4")
            attributes["EMAN.members"] = np.arange(3.0 + i % 2)
            attributes["EMAN.ctf"] = np.bytes_("E1 2 3")
            attributes["EMAN.apix_x"] = 1.5


def grown(path, n=12):
    """Attributes added, taken away and made longer over and over: gaps, and headers in many pieces."""
    eman2_like(path, n)
    for step in range(6):
        with h5py.File(path, "r+", libver="earliest") as file:
            for i in range(n):
                attributes = file[f"MDF/images/{i}"].attrs
                attributes[f"EMAN.more{step}"] = np.bytes_(b"x" * (20 * step + i))
                if step % 2:
                    del attributes[f"EMAN.more{step - 1}"]
                attributes["EMAN.ctf"] = np.bytes_(b"E" + b" 1" * (step * i))


@pytest.mark.parametrize("make", [eman2_like, h5py_like, grown])
def test_files_of_the_usual_kinds_are_read_without_hdf5(tmp_path, opened, make):
    path = str(tmp_path / "stack.hdf")
    make(path)
    found = by_scan(path)
    asked = len(opened)
    assert_same(found, by_hdf5(path))
    assert asked < 30  # for one image of each way to encode a type or a length of text, whatever the number of images
    assert all(offset > 0 for _, offset in found[0])


def test_what_the_original_wrote_is_read_without_hdf5(opened):
    found = by_scan(str(SAMPLE))
    asked = len(opened)
    assert_same(found, by_hdf5(str(SAMPLE)))
    assert asked <= 2 + len(NAMES)


def test_a_stack_is_read_in_batches(tmp_path, monkeypatch):
    path = str(tmp_path / "stack.hdf")
    eman2_like(path, 23)
    monkeypatch.setattr(hdf, "SCANNED_AT_ONCE", 5)
    assert_same(by_scan(path), by_hdf5(path))
    assert HdfStack(path).column("assign") == list(range(23))


# ---- what is left to HDF5


def strange_attributes(path):
    """One image for each kind of attribute that EMAN2 doesn't write."""
    values = [np.int64(3), np.float32(np.nan), np.bytes_("unterminated"), "of any length", np.True_, h5py.Empty("f4"),
              np.zeros((2, 2), "f4"), np.array([], "f4"), 1 + 2j, np.array([5], ">i4"), np.array([2**40], "u8"), -0.0]
    make_stack(path, list(some_images(len(values))))
    for i, value in enumerate(values):
        set_attribute(path, i, "assign", value)
        set_attribute(path, i, "a", value)


def space_padded(path):
    make_stack(path, list(some_images(2)))
    with h5py.File(path, "r+") as file:
        for i, padding in enumerate((h5t.STR_SPACEPAD, h5t.STR_NULLPAD)):
            htype = h5t.C_S1.copy()
            htype.set_size(8)
            htype.set_strpad(padding)
            h5a.create(file[f"MDF/images/{i}"].id, b"EMAN.ctf", htype, h5s.create(h5s.SCALAR)).write(
                np.array(b"E1      ", "S8"), mtype=htype)


def big_endian_matrix(path):
    make_stack(path, list(some_images(2)))
    for i, dtype in enumerate((MATRIX.newbyteorder(">"), MATRIX)):
        set_attribute(path, i, "xform.align2d", np.array([tuple(range(12))], dtype))


def name_beyond_ascii(path):
    make_stack(path, list(some_images(2)))
    set_attribute(path, 0, "name of an Ångström", np.array([1], "i4"))
    set_attribute(path, 0, "assign", np.array([7], "i4"))


def other_members(path):
    """Groups with more than pixels, pixels behind a link, an image behind a link."""
    make_stack(path, list(some_images(4)))
    with h5py.File(path, "r+") as file:
        images = file["MDF/images"]
        images["0"].create_dataset("more", data=[1.0])
        file.move("MDF/images/1/image", "MDF/elsewhere")
        images["1/image"] = h5py.SoftLink("/MDF/elsewhere")
        file.move("MDF/images/2", "MDF/two")
        images["2"] = h5py.SoftLink("/MDF/two")
        images["3"].attrs["EMAN.assign"] = np.array([3], "i4")
        images["3"].create_group("away")
        del images["3/away"]


def of_all_pixels(path):
    kinds = [(dtype, {}) for dtype in ("<f4", ">f4", "<f2", "<i2", "<f8", "u1")] + [
        ("<f4", {"compression": "gzip"}), ("<f4", {"chunks": (2, 3)}), ("<i2", {"chunks": (6, 6), "shuffle": True})]
    with h5py.File(path, "w", libver="earliest") as file:
        images = file.create_group("MDF/images")
        images.attrs["imageid_max"] = np.array([len(kinds) + 2], "i4")
        for i, (dtype, options) in enumerate(kinds):
            images.create_dataset(f"{i}/image", data=np.full((6, 6), i, dtype), **options)
        images.create_dataset(f"{len(kinds)}/image", data=np.zeros((1, 6, 6), "f4"))
        images.create_dataset(f"{len(kinds) + 1}/image", (6, 6), "f4")  # never written
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5d.COMPACT)
        h5d.create(images.create_group(f"{len(kinds) + 2}").id, b"image", h5t.IEEE_F32LE,
                   h5s.create_simple((6, 6)), compact)


def rendered(path):
    make_stack(path, [np.zeros((6, 6), "u1"), np.zeros((6, 6), "f4"), np.zeros((6, 6), "f4")])
    for i, bits in enumerate((8, 8, 0)):
        set_attribute(path, i, "stored_renderbits", np.array([bits], "i4"))
        set_attribute(path, i, "is_complex", np.array([0], "i4"))
        set_attribute(path, i, "nz", np.array([1.0], "f4"))


def newest(path):
    make_stack(path, list(some_images(3)), libver="latest")
    set_attribute(path, 1, "assign", np.array([7], "i4"))


def large_class(path):
    write_stack(path, some_images(3), [{"members": list(range(n))} for n in (3, 20_000, 5)])


def user_block(path):
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("MDF/images").attrs["imageid_max"] = np.array([0], "i4")
        file["MDF/images"].create_dataset("0/image", data=some_images(1)[0])


@pytest.mark.parametrize("make", [strange_attributes, space_padded, big_endian_matrix, name_beyond_ascii, other_members,
                                  of_all_pixels, rendered, newest, large_class, user_block])
def test_whatever_is_in_a_file_both_ways_find_the_same(tmp_path, make):
    path = str(tmp_path / "stack.hdf")
    make(path)
    assert_same(by_scan(path), by_hdf5(path))


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)
ATTRIBUTES = st.one_of(
    st.integers(-2**31, 2**31 - 1).map(lambda i: np.array([i], "i4")), st.floats(width=32).map(np.float32),
    st.floats().map(np.float64), st.binary(max_size=40).filter(len).map(np.bytes_), TEXTS,
    st.lists(st.floats(width=32), max_size=5).map(lambda values: np.array(values, "f4")),
    st.integers().map(lambda i: i % 2**63), st.booleans())


@settings(max_examples=25)
@given(st.lists(st.lists(st.tuples(st.sampled_from(NAMES), ATTRIBUTES), max_size=12), min_size=1, max_size=3))
def test_attributes_set_in_any_order_are_what_hdf5_says(tmp_path_factory, sets):
    path = str(tmp_path_factory.mktemp("any") / "stack.hdf")
    make_stack(path, list(some_images(len(sets))))
    with h5py.File(path, "r+") as file:
        for i, attributes in enumerate(sets):
            for name, value in attributes:
                if name != "nz":  # which must be a number
                    file[f"MDF/images/{i}"].attrs[f"EMAN.{name}"] = value
    assert_same(by_scan(path), by_hdf5(path))


# ---- damaged files


def outcome(read, path):
    """What was read, or that it was refused."""
    try:
        return read(path)
    except (InputError, OSError, RuntimeError, KeyError, ValueError, TypeError):
        return None


@pytest.mark.parametrize("tries", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_damaged_byte_leads_to_another_answer(tmp_path, tries):
    """Most bytes describe something; wherever both can still read, they agree."""
    path, damaged = str(tmp_path / "stack.hdf"), str(tmp_path / "damaged.hdf")
    grown(path, 3)
    data = bytearray(Path(path).read_bytes())
    rng = np.random.default_rng(tries)
    answers = 0
    for _ in range(tries):
        place, byte = int(rng.integers(96, len(data))), int(rng.choice([0, 1, 7, 8, 0x7F, 0x80, 0xFF]))
        worse = data.copy()
        worse[place] = byte
        Path(damaged).write_bytes(worse)
        one, other = outcome(by_scan, damaged), outcome(by_hdf5, damaged)
        if one is not None and other is not None:
            answers += 1
            assert_same(one, other)
    assert answers > tries / 2


def places_of(data, pattern):
    return [i for i in range(len(data)) if data.startswith(pattern, i)]


@pytest.mark.parametrize("address", [2**63 - 8, 2**64 - 16, 1 << 40, 0])
@pytest.mark.parametrize("what", [b"TREE", b"SNOD", b"HEAP"])
def test_no_address_beyond_the_file_is_followed(tmp_path, what, address):
    path = str(tmp_path / "stack.hdf")
    eman2_like(path, 3)
    data = bytearray(Path(path).read_bytes())
    offset = {b"TREE": 32, b"SNOD": 16, b"HEAP": 24}[what]
    for place in places_of(data, what)[-3:]:
        data[place + offset:place + offset + 8] = address.to_bytes(8, "little")
    Path(path).write_bytes(data)
    outcome(by_scan, path)
    with hdf._open_images(path) as images:
        scan = hdf._Scan(path, images, 3)
        plain, _ = scan._ordinary(0, scan._addresses)
    assert not plain.all()


def test_a_header_that_goes_on_in_itself_ends(tmp_path):
    """A continuation that names itself would be followed for ever."""
    path = str(tmp_path / "stack.hdf")
    eman2_like(path, 1)
    data = bytearray(Path(path).read_bytes())
    with hdf._open_images(path) as images:
        address = int(hdf._addresses(images, 1)[0])
    assert data[address + 16] == 16  # EMAN2's way: the header's first message is where it goes on
    data[address + 24:address + 40] = (address + 16).to_bytes(8, "little") + (24).to_bytes(8, "little")
    Path(path).write_bytes(data)
    with hdf._open_images(path) as images:
        scan = hdf._Scan(path, images, 1)
        assert scan._ordinary(0, scan._addresses)[0].tolist() == [False]


def test_a_stack_replaced_while_it_is_open_is_read_as_it_is_now(tmp_path):
    stack, other = small.write(tmp_path)[0], str(tmp_path / "other.hdf")
    opened = HdfStack(stack)
    write_stack(other, small.particles(), [{"assign": 5, "members": [1] * (i + 2)} for i in range(small.N_PARTICLES)])
    shutil.move(other, stack)
    assert opened.column("assign") == [5] * small.N_PARTICLES


def test_pixels_come_from_where_the_scan_says(tmp_path):
    path = tmp_path / "stack.hdf"
    eman2_like(str(path))
    images = some_images(40)
    with hdf._open_images(str(path)) as group:
        for first, boxes, offsets in hdf._Scan(str(path), group, 40).layouts():
            data = io.BytesIO(path.read_bytes()).getbuffer()
            for i, (box, offset) in enumerate(zip(boxes, offsets, strict=True)):
                assert data[offset:offset + 4 * box**2] == images[first + i].tobytes()
