"""Headers set, numbered, drawn, exported and imported; and a run undone by one command."""

import shutil

import numpy as np
import pytest
import small
from test_io_hdf import contents, set_attribute

import mrefali
from mrefali import cli, geometry
from mrefali.errors import InputError
from mrefali.headers import header, nearest_matrices, random_poses
from mrefali.io import open_stack, write_stack

N = small.N_PARTICLES
POSE = "xform.align2d"


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """``stack.hdf`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    small.write(tmp_path)
    return "stack.hdf"


def refuse(stack, message, params=POSE, error=InputError, **options):
    """The call is refused with a message that holds ``message``, and the stack keeps its bits."""
    before = contents(stack)
    with pytest.raises(error) as refusal:
        header(stack, params, **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert contents(stack) == before


def write_lines(path, lines):
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


def stored_type(stack, name):
    kind, _ = contents(stack)["MDF/images/0", f"EMAN.{name}"][0]
    return kind


# ---- the original's calls, word for word ------------------------------------------------------------------

def test_zero_sets_every_pose_to_the_identity(stack, capsys):
    assert cli.sxheader(["stack.hdf", "--params=xform.align2d", "--zero"]) == 0
    assert open_stack(stack).poses().tolist() == [(0.0, 0.0, 0.0, 0)] * N
    assert capsys.readouterr().out == "stack.hdf: xform.align2d of 24 images set to the identity\n"


def test_export_and_import_give_the_very_headers_back(stack):
    before = contents(stack)
    assert cli.sxheader(["stack.hdf", "--params=xform.align2d", "--export=params.txt"]) == 0
    assert contents(stack) == before
    assert cli.sxheader(["stack.hdf", "--params=xform.align2d", "--zero"]) == 0
    assert contents(stack) != before
    assert cli.sxheader(["stack.hdf", "--params=xform.align2d", "--import=params.txt"]) == 0
    assert contents(stack) == before


def test_one_and_consecutive_number_the_images(stack):
    assert cli.sxheader(["stack.hdf", "--params=active", "--one"]) == 0
    assert cli.sxheader(["stack.hdf", "--params=ID", "--consecutive"]) == 0
    assert open_stack(stack).column("active") == [1] * N
    assert open_stack(stack).column("ID") == list(range(N))
    assert stored_type(stack, "ID") == stored_type(stack, "active") == [("", "<i4")]


def test_several_headers_are_set_at_once(stack):
    header(stack, "active xform.align2d,group", zero=True)
    assert open_stack(stack).column("active") == open_stack(stack).column("group") == [0] * N
    assert open_stack(stack).poses()["alpha"].tolist() == [0.0] * N


def test_all_else_keeps_its_bits(stack):
    before = contents(stack)
    header(stack, "active", one=True)
    header(stack, POSE, randomize=True)
    after = contents(stack)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {(f"MDF/images/{i}", f"EMAN.{name}") for i in range(N) for name in ("active", POSE)}


# ---- random poses -----------------------------------------------------------------------------------------

def test_the_same_seed_draws_the_same_poses(stack):
    drawn = []
    for seed in (1, 1, 2):
        assert cli.main(["header", stack, f"--params={POSE}", "--randomize", f"--rand_seed={seed}"]) == 0
        drawn.append(np.array(open_stack(stack).column(POSE)))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(drawn[0], geometry.to_matrices(random_poses(N, 1)).astype(np.float32))


def test_random_poses_fill_their_ranges():
    poses = random_poses(4000, 0)
    for field, low, high in (("alpha", 0, 360), ("sx", -2, 2), ("sy", -2, 2)):
        assert low <= poses[field].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < poses[field].max() <= high
        assert abs(poses[field].mean() - (low + high) / 2) < 0.03 * (high - low)  # 6 standard errors
    assert abs(poses["mirror"].mean() - 0.5) < 0.05
    assert set(poses["mirror"]) == {0, 1}


# ---- tables -----------------------------------------------------------------------------------------------

def test_a_table_has_the_columns_in_the_order_asked_for(stack, capsys):
    assert cli.main(["header", stack, f"--params=ptcl_source_image,{POSE},quality", "--print"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == N
    poses = small.poses()
    for i, (name, alpha, sx, sy, mirror, scale, quality) in enumerate(rows):
        assert (name, mirror, scale) == ("m.hdf", str(poses["mirror"][i]), "1.0")
        assert float(alpha) == pytest.approx(poses["alpha"][i], abs=1e-5)
        assert [float(sx), float(sy)] == [poses["sx"][i], poses["sy"][i]]
        assert quality == str(np.float32(i / 7))


def test_print_and_export_write_the_same(stack, capsys):
    header(stack, f"{POSE},quality", print_=True)
    header(stack, f"{POSE},quality", export="table.txt")
    with open("table.txt") as file:
        assert file.read() == capsys.readouterr().out


def test_every_kind_of_header_comes_back(stack):
    header(stack, "ID", consecutive=True)
    open_stack(stack).write_columns({"ctf": [f"E1.{i:02d}5 0.1 -3.7 50 10 300 2 2.5 0 0 0" for i in range(N)]})
    names = f"quality,ctf,{POSE},ID,ptcl_source_image,apix_x"
    before = contents(stack)
    header(stack, names, export="table.txt")
    header(stack, f"quality,{POSE},ID,apix_x", zero=True)
    open_stack(stack).write_columns({"ctf": ["E2 0 0 50 10 300 2 2.5 0 0 0"] * N, "ptcl_source_image": ["x"] * N})
    header(stack, names, import_="table.txt")
    assert contents(stack) == before


def test_a_ctf_is_eight_numbers(stack):
    set_attribute(stack, 2, "ctf", np.bytes_("E1.5 0.25 30 60 10 200 2.7 2.5 0 3,1,2,3 0"))
    header(stack, "ctf", export="ctf.txt")
    with open("ctf.txt") as file:
        assert file.read().splitlines()[2].split() == "1.5 2.7 200 2.5 60 10 0.25 30".split()
    header(stack, "ctf", import_="ctf.txt")
    assert open_stack(stack).column("ctf")[2] == "E1.5 0.25 30 60 10 200 2.7 2.5 0 0 0"


def test_whole_numbers_become_int32_and_others_float32(stack):
    write_lines("t.txt", [f"{i} {i}{'.5' if i == 7 else ''} {i}.0 g{i}" for i in range(N)])
    header(stack, "a,b,c,d", import_="t.txt")
    assert [stored_type(stack, name) for name in "abc"] == [[("", "<i4")], [("", "<f4")], [("", "<f4")]]
    assert open_stack(stack).column("b")[6:9] == [6.0, 7.5, 8.0]
    assert open_stack(stack).column("d") == [f"g{i}" for i in range(N)]


def test_the_originals_way_to_write_a_row_is_read(stack):
    write_lines("params.txt", ["", *(f"   {i:14.5f}   {-1.25:14.5f} {0.5:14.5f} {i % 2:14.5f} {1:10.3f}"
                                     for i in range(N)), ""])
    header(stack, POSE, import_="params.txt")
    np.testing.assert_array_equal(
        open_stack(stack).column(POSE),
        geometry.to_matrices(geometry.make_poses(np.arange(N), -1.25, 0.5, np.arange(N) % 2)).astype(np.float32))


def test_csv_columns_are_found_by_name(stack):
    write_lines("t.csv", ["\ufeffmirror,index,quality,sy,sx,alpha,assign",
                          *(f"{i % 2}, {i},0.5,-1,{i / 4},{i},{i % 3}" for i in range(N))])
    header(stack, f"assign,{POSE}", import_="t.csv")
    assert open_stack(stack).column("assign") == [i % 3 for i in range(N)]
    assert open_stack(stack).poses()[5].tolist() == pytest.approx((5, 1.25, -1, 1), abs=1e-5)
    assert open_stack(stack).column("quality")[7] == 1.0  # was not asked for


def test_a_matrix_whose_angle_is_given_is_found_again():
    rng = np.random.default_rng(3)
    poses = geometry.make_poses(rng.uniform(0, 360, 20000), *rng.uniform(-9, 9, (2, 20000)), rng.integers(0, 2, 20000))
    stored = geometry.to_matrices(poses).astype(np.float32)
    np.testing.assert_array_equal(nearest_matrices(poses), stored)  # an angle of one's own is rounded as usual
    read_back = geometry.from_matrices(stored)
    assert (geometry.to_matrices(read_back).astype(np.float32) != stored).any()  # why it is needed
    np.testing.assert_array_equal(nearest_matrices(read_back), stored)
    corners = geometry.make_poses(45.0 * np.arange(8))
    np.testing.assert_array_equal(nearest_matrices(corners), geometry.to_matrices(corners).astype(np.float32))


# ---- a run is undone --------------------------------------------------------------------------------------

def test_a_run_is_undone_and_done_again_by_one_command_each(stack):
    header(stack, POSE, randomize=True)
    header(stack, "assign", zero=True)
    before = contents(stack)
    mrefali.mref_ali2d(stack, "refs.hdf", "out", maxit=1, **small.OPTIONS)
    after = contents(stack)
    assert after != before
    assert cli.main(["header", stack, f"--params={POSE},assign", "--import=out/poses_before.csv"]) == 0
    assert contents(stack) == before
    assert cli.main(["header", stack, f"--params={POSE},assign", "--import=out/poses.csv"]) == 0
    assert contents(stack) == after


def test_poses_without_classes_are_restored_too(stack):
    before = open_stack(stack).column(POSE)
    mrefali.mref_ali2d(stack, "refs.hdf", "out", maxit=1, **small.OPTIONS)
    refuse(stack, "out/poses_before.csv has no column assign: it has index, alpha, sx, sy, mirror", params="assign",
           import_="out/poses_before.csv")
    assert cli.main(["header", stack, f"--params={POSE}", "--import=out/poses_before.csv"]) == 0
    np.testing.assert_array_equal(open_stack(stack).column(POSE), before)


def test_the_truth_of_a_simulation_can_be_imported(tmp_path):
    out = tmp_path / "p.hdf"
    mrefali.simulate(out, n_particles=6, n_views=2, box=16, max_shift=1)
    mrefali.header(str(out), f"{POSE},class", import_=str(tmp_path / "p_truth.csv"))
    truth = small.read_table(tmp_path / "p_truth.csv")
    assert open_stack(out).column("class") == truth["class"]
    np.testing.assert_allclose(open_stack(out).poses()["alpha"], truth["alpha"], rtol=0, atol=1e-4)


# ---- what is refused --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("params", "options", "message"), [
    (POSE, {}, "nothing is said to be done; give exactly one of zero, one, consecutive, randomize, import, export"),
    (POSE, {"zero": True, "print_": True}, "both zero and print are given; give exactly one of"),
    (POSE, {"import_": "a", "export": "b"}, "both import and export are given"),
    (" , ", {"zero": True}, "names no header: give names such as xform.align2d,assign"),
    ("a b,a", {"zero": True}, "names a twice"),
    ("xform.projection", {"zero": True}, "params=xform.projection is not known"),
    ("xfrm.align2d", {"zero": True}, "params=xfrm.align2d is not known: did you mean xform.align2d?"),
    ("asign", {"zero": True}, "params=asign is not known: did you mean assign?"),
    (POSE, {"one": True}, "one has no meaning for xform.align2d, a transform: give zero (the identity), randomize"),
    (f"ID,{POSE}", {"consecutive": True}, "consecutive has no meaning for xform.align2d"),
    ("assign", {"randomize": True}, "randomize is for xform.align2d, not for assign"),
    (POSE, {"randomize": True, "rand_seed": -1}, "rand_seed=-1 is not allowed: give a whole number of at least 0"),
    ("ctf", {"zero": True}, "zero has no meaning for ctf, which takes 8 numbers: import them"),
    ("nx", {"zero": True}, "nx describes the pixels and cannot be set"),
    ("stored_renderbits", {"one": True}, "stored_renderbits describes the pixels"),
    ("mean", {"import_": "t.txt"}, "mean describes the pixels"),
])
def test_a_call_that_makes_no_sense_is_refused(stack, params, options, message):
    refuse(stack, message, params=params, **options)


def test_an_image_without_the_header_is_named(stack):
    set_attribute(stack, 0, "group", np.array([1], "i4"))
    for action in ({"print_": True}, {"export": "t.txt"}):
        refuse(stack, "image 1 of stack.hdf has no group: leave it out, or set it with mrefali header", params="group",
               **action)
    header(stack, "none", one=True)
    write_stack("bare.hdf", small.references())
    refuse("bare.hdf", "image 0 of bare.hdf has no xform.align2d", print_=True)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("quality", np.array([np.nan], "f4"), "quality of image 4 of stack.hdf is nan: a table holds finite numbers only"),
    ("quality", np.array([1, 2], "f4"), "quality of image 4 of stack.hdf is a list of 2 values"),
    ("quality", np.bytes_("two words"), "is 'two words': a column holds one printable word an image"),
    ("quality", np.bytes_("1,5"), "is '1,5': a column holds one printable word an image"),
    ("ctf", np.bytes_("E1 2"), "image 4 of stack.hdf: ctf='E1 2' is not understood"),
])
def test_a_header_that_no_column_can_hold_is_refused(stack, name, value, message):
    set_attribute(stack, 4, name, value)
    refuse(stack, message, params=name, print_=True)


def test_a_scaled_pose_is_refused(stack):
    matrices = np.array(open_stack(stack).column(POSE))
    matrices[9, :2, :2] *= 2
    open_stack(stack).write_columns({POSE: matrices})
    refuse(stack, "xform.align2d of image 9 of stack.hdf has the scale 2: 2-D poses have scale 1", print_=True)


def rows(row, line=None, count=N):
    """``count`` equal rows, one of which may be another."""
    lines = [row] * count
    if line is not None:
        lines[7] = line
    return lines


@pytest.mark.parametrize(("params", "lines", "message"), [
    (POSE, rows("0 0 0 0 1", count=23), "t has 23 rows for 24 images: give one row for each image"),
    (POSE, rows("0 0 0 0 1", "0 0 0 0"), "line 8 of t has 4 columns: give 5 (alpha, sx, sy, mirror, scale)"),
    (POSE, rows("0 0 0 0 1", "0 nan 0 0 1"), "sx in line 8 of t is 'nan': give a finite number"),
    (POSE, rows("0 0 0 0 1", "0 0 1e39 0 1"), "sy in line 8 of t is '1e39': give a finite number"),
    (POSE, rows("0 0 0 0 1", "x 0 0 0 1"), "alpha in line 8 of t is 'x': give a finite number"),
    (POSE, rows("0 0 0 0 1", "0 0 0 2 1"), "mirror in line 8 of t is 2: give 0 or 1"),
    (POSE, rows("0 0 0 0 1", "0 0 0 1 2"), "scale in line 8 of t is 2: give 1, the scale of every 2-D pose"),
    ("quality", rows("1.5", "1.0o"), "quality in line 8 of t is '1.0o': give a finite number"),
    ("quality", rows("name", "inf"), "quality in line 1 of t is 'name': give a finite number"),
    ("quality", rows("1.5", "1_5"), "quality in line 8 of t is '1_5': give a finite number"),
    ("quality", rows("1.5", "nan"), "quality in line 8 of t is 'nan': give a finite number"),
    ("assign", rows("1", "3000000000"), "assign is 3000000000: int32"),
    ("assign", [], "t has 0 rows for 24 images"),
    ("assign", ["index,assign"], "t has 0 rows for 24 images"),
    ("a,b", ["b,c", *rows("1,2")], "t has no column a: it has b, c"),
    (POSE, ["alpha,sx,sy", *rows("1,2,3")], "t has no column mirror: it has alpha, sx, sy"),
    ("assign", ["index,assign", *(f"{i + (i == 6)},1" for i in range(N))], "index in line 8 of t is '7', not 6"),
    ("assign", ["index,assign", *(f"{i},{'' if i == 6 else 1}" for i in range(N))], "assign in line 8 of t is ''"),
    ("ctf", rows("1 2 300 2.5 50 10 0 0", "1 2 300000 2.5 50 10 0 0"), "line 8 of t: ctf: voltage_kV=300000 makes no"),
])
def test_a_table_that_does_not_fit_is_refused(stack, params, lines, message):
    write_lines("t", lines)
    refuse(stack, message, params=params, import_="t")


def test_files_that_cannot_be_used_are_refused(stack):
    refuse(stack, "none.txt does not exist: give a table", error=FileNotFoundError, import_="none.txt")
    refuse(stack, "stack.hdf is no text: give a table", import_="stack.hdf")
    refuse(stack, "stack.hdf exists: give another name, or remove it first", error=FileExistsError,
           export="stack.hdf")


def test_a_refusal_at_the_command_line_is_one_line(stack, capsys):
    shutil.copy(stack, "copy.hdf")
    assert cli.sxheader([stack, f"--params={POSE}", "--export=copy.hdf"]) == 2
    assert cli.sxheader([stack, f"--params={POSE}", "--import=no/table"]) == 2
    assert cli.sxheader(["none.hdf", f"--params={POSE}", "--zero"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "mrefali: error: copy.hdf exists: give another name, or remove it first",
        "mrefali: error: no/table does not exist: give a table, as --export writes it",
        "mrefali: error: none.hdf does not exist"]
