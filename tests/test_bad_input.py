"""What the main job refuses: one line that names the culprit, the value, what is allowed and the way out.

Each time the exit status is 2, nothing is created and nothing changed.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import small
from test_io_hdf import ordinary_user

from mrefali import cli
from mrefali.geometry import disc
from mrefali.io import open_stack, write_stack
from mrefali.parallel import LAUNCHER_SIZES, SERIAL
from mrefali.warmup import compile_kernels


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """All is compiled, or the first run that comes as far would say that it compiles."""
    compile_kernels(SERIAL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the small job, entered."""
    small.write(tmp_path)
    write_stack(tmp_path / "mask.hdf", disc(small.BOX, 6)[None].astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(capsys, folder, words, message):
    """Run the main job and hold its one line of stderr against a regular expression."""
    before = small.snapshot(folder)
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"mrefali: error: {message}\n", err), err  # a dot matches no second line
    assert small.snapshot(folder) == before


# ---- files -------------------------------------------------------------------------------------------------

def edit(path, change):
    """Hand ``change`` the group of images of an HDF5 file."""
    with h5py.File(path, "r+") as file:
        change(file["MDF/images"])


def set_header(path, index, name, value):
    edit(path, lambda images: images[str(index)].attrs.create(f"EMAN.{name}", value))


def set_pixels(path, index, pixels):
    """Replace the pixels of one image by those of another shape or type."""
    def change(images):
        del images[f"{index}/image"]
        images[f"{index}/image"] = pixels
    edit(path, change)


def set_one_pixel(path, index, value):
    def change(images):
        images[f"{index}/image"][3, 4] = value
    edit(path, change)


def make_hole(path):
    """Give the first image the number after the last."""
    def change(images):
        images.attrs["imageid_max"] += 1
        images.move("0", str(images.attrs["imageid_max"][0]))
    edit(path, change)


def delete_header(path, index, name):
    edit(path, lambda images: images[str(index)].attrs.pop(f"EMAN.{name}"))


def empty(path):
    def change(images):
        images.clear()
        images.attrs["imageid_max"] = np.array([-1], "i4")
    edit(path, change)


def without_images(path):
    os.remove(path)
    with h5py.File(path, "w") as file:
        file["other"] = 1


def make_directory(path):
    if os.path.exists(path):
        os.remove(path)
    os.mkdir(path)


def write_text(path):
    Path(path).write_text("nobody's HDF5\n")


def cut_short(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:len(data) // 2])


FILES = {
    "missing": (os.remove, "{0} does not exist"),
    "directory": (make_directory, "{0} is a directory: give an HDF5 file"),
    "not-hdf5": (write_text, "{0} is not an HDF5 file, nor of another format that is known [(]bdb, MRC, STAR, "
                          "[.]cs, SPIDER, [.]npy[)]: give one that EMAN2, RELION, cryoSPARC or SPIDER wrote"),
    "cut-short": (cut_short, "{0} cannot be opened, HDF5 says: .*; copy it again if it is cut short or damaged"),
    "no-images-group": (without_images, "{0} has no group /MDF/images: it is HDF5, but no EMAN2 stack"),
    "hole": (make_hole, "{0} has no image 0, though imageid_max=.*: .* without holes; .*"),
    "empty": (empty, r"{0} has no images \(imageid_max=-1\): give a stack of at least one"),
    "not-square": (lambda path: set_pixels(path, 0, np.ones((20, 18), "f4")),
                   "image 0 of {0} is 18 x 20 pixels: only square images can be used; pad or clip them"),
    "volume": (lambda path: set_pixels(path, 0, np.ones((20, 20, 20), "f4")),
               "image 0 of {0} is a volume of 20 slices: give a stack of 2-D images"),
    "fourier": (lambda path: set_header(path, 0, "is_complex", np.array([1], "i4")),
                r"image 0 of {0} is a Fourier transform \(is_complex=1\): give images in real space"),
}


@pytest.mark.parametrize("name", ["stack.hdf", "refs.hdf", "mask.hdf"])
@pytest.mark.parametrize("spoil", FILES)
def test_a_file_that_is_no_stack_is_refused(folder, capsys, name, spoil):
    change, message = FILES[spoil]
    change(name)
    refuse(capsys, folder, ["mask.hdf", *small.WORDS], message.format(name))


@pytest.mark.parametrize("name", ["stack.hdf", "refs.hdf"])
@pytest.mark.parametrize(("value", "index"), [(np.nan, 1), (np.inf, 0), (-np.inf, 1)])
def test_a_pixel_that_is_no_number_names_its_image(folder, capsys, name, value, index):
    set_one_pixel(name, index, value)
    refuse(capsys, folder, small.WORDS, f"{name}: image {index} has a NaN or infinite pixel: remove or repair it")


def test_the_whole_stack_is_looked_through_before_the_first_iteration(folder, capsys):
    set_one_pixel("stack.hdf", small.N_PARTICLES - 1, np.nan)
    refuse(capsys, folder, small.WORDS, "stack.hdf: image 23 has a NaN or infinite pixel: remove or repair it")


def test_the_first_bad_image_is_named(folder, capsys):
    set_one_pixel("stack.hdf", 15, np.nan)
    set_one_pixel("stack.hdf", 9, np.inf)
    refuse(capsys, folder, small.WORDS, "stack.hdf: image 9 has a NaN or infinite pixel: remove or repair it")


@pytest.mark.parametrize("name", ["stack.hdf", "refs.hdf"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20, 12345.678])
def test_a_constant_image_is_refused(folder, capsys, name, value):
    set_pixels(name, 1, np.full((20, 20), value, "f4"))
    refuse(capsys, folder, small.WORDS, f"{name}: image 1 is constant under the mask: remove it")


def test_an_image_that_is_constant_under_the_mask_alone_is_refused(folder, capsys):
    set_pixels("stack.hdf", 1, np.where(disc(small.BOX, 6), 1, small.particles()[0]).astype("f4"))
    refuse(capsys, folder, small.WORDS, "stack.hdf: image 1 is constant under the mask: remove it")


def test_images_of_unequal_size_are_refused(folder, capsys):
    set_pixels("stack.hdf", 5, np.ones((22, 22), "f4"))
    refuse(capsys, folder, small.WORDS,
           "image 5 of stack.hdf is 22 x 22 pixels, image 0 is 20 x 20: all images of a stack must have one size")


def test_references_of_another_size_are_refused(folder, capsys):
    write_stack("refs.hdf", np.random.default_rng(0).random((2, 24, 24)))
    refuse(capsys, folder, small.WORDS,
           "refs.hdf: references of 24 x 24 px, but the particles of stack.hdf have 20 x 20: give references of the "
           "same box")


def test_a_particle_without_a_pose_names_the_command_that_sets_it(folder, capsys):
    delete_header("stack.hdf", 7, "xform.align2d")
    refuse(capsys, folder, small.WORDS, "image 7 of stack.hdf has no xform.align2d: set it with "
           "mrefali header stack.hdf --params=xform.align2d --zero")
    assert cli.main(["header", "stack.hdf", "--params=xform.align2d", "--zero"]) == 0
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0


@pytest.mark.parametrize("sizes", [(2.5, 2.6), (1.2, 2.4)])
def test_unequal_pixel_sizes_are_refused(folder, capsys, sizes):
    for name, size in zip(("stack.hdf", "refs.hdf"), sizes, strict=True):
        set_header(name, 0, "apix_x", np.array([size]))
    refuse(capsys, folder, small.WORDS, f"refs.hdf: pixel size {sizes[1]} A, but the particles of stack.hdf have "
           f"{sizes[0]} A: scale the references, or correct apix_x, apix_y in one of the files")


@pytest.mark.parametrize("size", [None, 1.0, 2.5000001])
def test_a_pixel_size_that_is_unknown_or_the_same_is_no_conflict(folder, size):
    if size is None:
        delete_header("refs.hdf", 0, "apix_x")
    else:
        set_header("refs.hdf", 0, "apix_x", np.array([size]))
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0


@pytest.mark.parametrize(("mask", "message"), [
    (np.ones((1, 24, 24)),
     "mask.hdf: a mask of 24 x 24 px, but the particles have 20 x 20: give a mask of the same box"),
    (np.zeros((1, 20, 20)),
     r"mask.hdf: no pixel of the mask is above 0.5 \(largest 0\): give a mask that is 1 where the particle is"),
    (np.full((1, 20, 20), 0.5), r"mask.hdf: no pixel of the mask is above 0.5 \(largest 0.5\): give .*"),
    (np.ones((2, 20, 20)), "mask.hdf: 2 images: a mask is one"),
])
def test_a_mask_that_is_none_is_refused(folder, capsys, mask, message):
    write_stack("mask.hdf", mask)
    refuse(capsys, folder, ["mask.hdf", *small.WORDS], message)


def test_a_mask_with_nan_is_refused(folder, capsys):
    set_one_pixel("mask.hdf", 0, np.nan)
    refuse(capsys, folder, ["mask.hdf", *small.WORDS],
           "mask.hdf: the mask has a NaN or infinite pixel: give numbers from 0 to 1")


# ---- places ------------------------------------------------------------------------------------------------

@pytest.fixture
def open_folder(monkeypatch):
    """The small job in a folder that an ordinary user may write to (pytest's own, made by root, cannot be entered)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        small.write(folder)
        for file in folder.iterdir():
            file.chmod(0o666)
        monkeypatch.chdir(folder)
        yield folder
        folder.chmod(0o777)


@pytest.mark.parametrize("name", ["stack.hdf", "refs.hdf"])
def test_a_file_that_may_not_be_read_is_refused(open_folder, capsys, name):
    before = small.snapshot(open_folder)
    os.chmod(name, 0)
    with ordinary_user():
        assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS]) == 2
    assert capsys.readouterr() == ("", f"mrefali: error: {name} cannot be opened (Permission denied): allow it with "
                                       "chmod or choose another file\n")
    os.chmod(name, 0o666)
    assert small.snapshot(open_folder) == before


def test_a_stack_that_may_not_be_written_is_refused(open_folder, capsys):
    os.chmod("stack.hdf", 0o444)
    with ordinary_user():
        refuse(capsys, open_folder, small.WORDS, r".*/stack.hdf cannot be written to, but the headers of "
               r"stack.hdf have to be: allow it with chmod u\+w, or work on a copy")


def test_a_folder_that_may_not_be_written_is_refused(open_folder, capsys):
    open_folder.chmod(0o555)
    with ordinary_user():
        refuse(capsys, open_folder, small.WORDS,
               "out cannot be made: no permission to write into /.*, give a place you may write to")


@pytest.mark.parametrize("make", [make_directory, write_text, lambda path: os.symlink("nowhere", path)],
                         ids=["directory", "file", "dead-link"])
def test_an_outdir_that_exists_is_refused(folder, capsys, make):
    make("out")
    refuse(capsys, folder, small.WORDS, "out: the output directory exists already: give a new name, remove it, .*")


def test_an_outdir_in_no_folder_is_refused(folder, capsys):
    shutil.copyfile("stack.hdf", "copy.hdf")
    before = small.snapshot(folder)
    assert cli.main(["mref_ali2d", "copy.hdf", "refs.hdf", "none/out", *small.WORDS]) == 2
    assert re.fullmatch("mrefali: error: none/out cannot be made: there is no folder /.*/none, make it first\n",
                        capsys.readouterr().err)
    assert small.snapshot(folder) == before


def test_places_are_looked_at_before_the_pixels(folder, capsys):
    set_one_pixel("stack.hdf", 0, np.nan)
    make_directory("out")
    refuse(capsys, folder, small.WORDS, "out: the output directory exists already: give a new name, remove it, .*")


@pytest.mark.parametrize("value", [np.array([1, 2], "f4"), np.array([1.5], "f4"), np.array([np.nan], "f4"),
                                   np.array([3e9], "f8"), np.bytes_("one")], ids=str)
def test_a_class_that_is_no_whole_number_is_refused_with_its_image(folder, capsys, value):
    assert cli.main(["header", "stack.hdf", "--params=assign", "--zero"]) == 0
    set_header("stack.hdf", 7, "assign", value)
    capsys.readouterr()
    refuse(capsys, folder, small.WORDS, "stack.hdf: image 7 has assign='.*', which is no class: set it with mrefali "
           "header stack.hdf --params=assign --zero")
    assert cli.main(["header", "stack.hdf", "--params=assign", "--zero"]) == 0
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0


def test_a_class_that_is_a_whole_number_in_another_form_is_taken(folder):
    assert cli.main(["header", "stack.hdf", "--params=assign", "--zero"]) == 0
    set_header("stack.hdf", 7, "assign", np.array([3.0], "f4"))
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0
    assert small.read_table("out/poses_before.csv")["assign"] == [3.0 if i == 7 else 0.0 for i in range(24)]


# ---- the CTF -----------------------------------------------------------------------------------------------

GOOD_CTF = "E1.5 0 0 50 10 300 2 2.5 0 0 0"


@pytest.mark.parametrize(("value", "message"), [
    (None, "stack.hdf: image 7 has no header ctf: set it, or leave --CTF out"),
    (GOOD_CTF.replace("300", "3"), "stack.hdf: image 7: ctf: voltage_kV=3 makes no sense: 10 to 3000 is allowed; .*"),
    (GOOD_CTF.replace("300", "300000"), "stack.hdf: image 7: ctf: voltage_kV=300000 makes no sense: 10 to 3000 .*"),
    (GOOD_CTF.replace("2.5", "0"), "stack.hdf: image 7: ctf: pixel_size_A=0 makes no sense: 0.01 to 1000 is .*"),
    (GOOD_CTF.replace("2.5", "nan"), "stack.hdf: image 7: ctf: pixel_size_A=nan makes no sense: 0.01 to 1000 .*"),
    (GOOD_CTF.replace("2.5", "2.6"), "stack.hdf: image 7 has a CTF of pixel size 2.6 A, but image 0 of 2.5 A: a stack "
     "has one pixel size"),
    ("O1.5 50 1", r"stack.hdf: image 7: ctf='O1.5 50 1' is not understood: give E and at least 8 numbers .*"),
    ("none", r"stack.hdf: image 7: ctf='none' is not understood: .*"),
    (np.array([7], "i4"), "stack.hdf: image 7: ctf='7' is not understood: .*"),
])
def test_a_ctf_that_is_absent_or_makes_no_sense_is_refused_with_its_image(folder, capsys, value, message):
    if value is None:
        delete_header("stack.hdf", 7, "ctf")
    else:
        set_header("stack.hdf", 7, "ctf", np.bytes_(value) if isinstance(value, str) else value)
    refuse(capsys, folder, [*small.WORDS, "--CTF"], message)


def test_the_ctf_is_not_looked_at_without_the_option(folder, capsys):
    delete_header("stack.hdf", 7, "ctf")
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0
    assert capsys.readouterr().err == ""


def test_a_ctf_applied_that_says_neither_yes_nor_no_is_refused(folder, capsys):
    set_header("stack.hdf", 7, "ctf_applied", np.array([2], "i4"))
    refuse(capsys, folder, [*small.WORDS, "--CTF"], r"stack.hdf: image 7 has ctf_applied=2: 0 \(not multiplied by the "
           r"CTF\) or 1 \(multiplied\) is allowed")


# ---- options -----------------------------------------------------------------------------------------------

WHOLE, NUMBER = "a whole number", "a finite number"


@pytest.mark.parametrize(("words", "message"), [
    *[([f"--{name}={value}"], f"--{name}={value} is not allowed: give {WHOLE} .*")
      for name in ("ou", "ir", "rs", "maxit", "center") for value in ("abc", "2.5", "1e3", "nan")],
    *[([f"--{name}={value}"], f"--{name}={value} is not allowed: give {NUMBER} .*")
      for name in ("xr", "yr", "ts", "snr") for value in ("abc", "nan", "inf", "1e999")],
    (["--ou=9"], r"ou=9 does not fit a 20-pixel image: give 1 to 8 \(below n/2 - 1\), or -1 for n//2 - 2"),
    (["--ou=70"], "ou=70 does not fit a 20-pixel image: give 1 to 8 .*"),
    (["--ou=0"], "ou=0 does not fit a 20-pixel image: give 1 to 8 .*"),
    (["--ou=-2"], "ou=-2 does not fit a 20-pixel image: give 1 to 8 .*"),
    (["--ir=0"], "ir=0 is not allowed: give 1 to ou=8"),
    (["--ir=-1"], "ir=-1 is not allowed: give 1 to ou=8"),
    (["--ou=5", "--ir=6"], "ir=6 is not allowed: give 1 to ou=5"),
    (["--rs=0"], "rs=0 is not allowed: give a whole number of at least 1"),
    (["--rs=-1"], "rs=-1 is not allowed: give a whole number of at least 1"),
    (["--xr=-3"], "xr=-3(.0)? is not allowed: give the half-range of the search in px, 0 or more"),
    (["--yr=-0.5"], "yr=-0.5 is not allowed: give the half-range of the search in px, 0 or more"),
    (["--ts=0"], "ts=0(.0)? is not allowed: give a translation step in px of at least 0.01"),
    (["--ts=1e-6"], "ts=1e-06 is not allowed: give a translation step in px of at least 0.01"),
    (["--ts=-1"], "ts=-1(.0)? is not allowed: give a translation step in px of at least 0.01"),
    (["--maxit=-1"], "maxit=-1 is not allowed: give a number of iterations, or 0 for at most 10 with auto-stop"),
    (["--snr=0"], "snr=0(.0)? is not allowed: give a signal-to-noise ratio above 0"),
    (["--snr=-0.3"], "snr=-0.3 is not allowed: give a signal-to-noise ratio above 0"),
    (["--center=5"], r"center=5 is not allowed: give 0 \(none\), 1 \(phase centre of gravity\), -1 \(mean .*"),
    (["--vanished=lost"], "vanished=lost is not allowed: give random, split, keep, reseed"),
    (["--assignment=fair"], "assignment=fair is not known: give best, likeliest, capped, equal"),
    (["--center_limit=0"], "center_limit=0(.0)? is not allowed: give a distance in px above 0"),
    (["--function=ref_lowpass"], "function=ref_lowpass is not allowed: give .*"),
    (["--function=ref_lowpass,0.7"], "function=ref_lowpass,0.7,0.2 is not allowed: give a cutoff .*"),
    (["--function=ref_symmetry,x"], "function=ref_symmetry,x is not allowed: give ref_symmetry,ORDER, with numbers"),
    (["--function=none.py:name"], "function=none.py:name: there is no file none.py: give path/to/file.py:name"),
    (["--function=:x"], "function=:x: '' names no module: give module:name or path/to/file.py:name"),
    (["--function=json:name"], "function=json:name: json has no function name: .*"),
    (["--function=ref_ali3d"], "function=ref_ali3d is not known: give one of ref_ali2d.*"),
    (["--threads=-1"], "threads=-1 is not allowed: give 1 to [0-9]+ .*, or 0 for all of them"),
    (["--maxiter=3"], r"unknown option --maxiter: did you mean --maxit\?"),
    (["--ctf"], r"unknown option --ctf: did you mean --CTF\?"),
    (["--mask_file=m.hdf"], r"unknown option --mask_file: did you mean --mask\?"),
    (["--zzz"], "unknown option --zzz: see mrefali mref_ali2d --help"),
    (["mask.hdf", "extra"], "extra is one argument too many: the call is mrefali mref_ali2d STACK REFS OUTDIR .*"),
])
def test_an_option_out_of_range_or_of_the_wrong_kind_is_refused(folder, capsys, words, message):
    refuse(capsys, folder, words, message)


@pytest.mark.parametrize("variable", LAUNCHER_SIZES)
def test_many_processes_without_mpi_are_refused(folder, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "4")
    refuse(capsys, folder, small.WORDS, "MPI=False, but a launcher started 4 processes, which would all do the same "
           r"run: give --MPI \(in Python MPI=True\), or start one process")


def test_one_process_of_a_launcher_needs_no_mpi(folder, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    assert cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--maxit=1"]) == 0
    assert None not in open_stack("stack.hdf").column("assign")


def test_a_number_of_processes_that_is_none_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "x")
    refuse(capsys, folder, small.WORDS, "PMI_SIZE=x in the environment, where an MPI launcher puts the number of "
           "processes it started, is no number: unset PMI_SIZE")


def test_a_reference_function_whose_file_fails_keeps_its_traceback_and_nothing_is_created(folder, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    Path("own.py").write_text("1 / 0\n")
    before = small.snapshot(folder)
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        cli.main(["mref_ali2d", "stack.hdf", "refs.hdf", "out", *small.WORDS, "--function=own.py:flat"])
    assert str(caught.traceback[-1].path).endswith("own.py")
    assert small.snapshot(folder) == before
