"""Poses applied to the pixels of a file: what the new stack holds, and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import small
from test_io_hdf import contents

import mrefali
from mrefali import average, cli, fourier, transforms
from mrefali.errors import InputError
from mrefali.io import open_stack, write_images, write_stack


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """``stack.hdf`` of four particles in the current folder."""
    monkeypatch.chdir(tmp_path)
    full, _ = small.write(tmp_path)
    images = open_stack(full)
    write_stack("stack.hdf", images.read(0, 4), [images.header(i) | {"members": np.arange(i + 2), "assign": i}
                                                 for i in range(4)])
    return "stack.hdf"


@pytest.mark.parametrize(("words", "transform"), [
    ([], average.transform), (["--interpolation=quadratic"], average.transform),
    (["--interpolation=fourier"], fourier.transform)])
def test_the_new_stack_holds_the_moved_pixels(stack, capsys, words, transform):
    before = contents(stack)
    assert cli.sxtransform2d([stack, "out.hdf", *words]) == 0
    assert contents(stack) == before
    source, moved = open_stack(stack), open_stack("out.hdf")
    np.testing.assert_array_equal(moved.read(0, 4), transform(source.read(0, 4), source.poses()))
    assert moved.poses().tolist() == [(0.0, 0.0, 0.0, 0)] * 4
    assert "out.hdf: 4 images of stack.hdf moved by their poses" in capsys.readouterr().out


def test_all_other_headers_are_carried_over(stack):
    mrefali.transform2d(stack, "out.hdf", interpolation="fourier")
    before, after = contents(stack), contents("out.hdf")
    assert before.keys() == after.keys()
    changed = {key[1] for key in before if key[1] and before[key] != after[key]}
    assert changed <= {f"EMAN.{name}" for name in (
        "xform.align2d", "mean", "sigma", "minimum", "maximum", "square_sum", "mean_nonzero", "sigma_nonzero")}
    assert open_stack("out.hdf").column("sigma") == pytest.approx(
        open_stack("out.hdf").read(0, 4).std(axis=(1, 2), ddof=1).tolist(), rel=1e-5)
    assert open_stack("out.hdf").pixel_size_A == small.PIXEL_SIZE_A


@pytest.mark.parametrize("per_block", [1, 3])
def test_blocks_change_nothing(stack, monkeypatch, per_block):
    mrefali.transform2d(stack, "whole.hdf", interpolation="fourier")
    monkeypatch.setattr(transforms, "BLOCK_BYTES", per_block * 4 * small.BOX**2)
    mrefali.transform2d(stack, "blocks.hdf", interpolation="fourier")
    assert contents("blocks.hdf") == contents("whole.hdf")


def test_images_are_written_as_they_come(tmp_path):
    """The next image is asked for when the last is in the file."""
    path, sizes = tmp_path / "stream.hdf", []

    def pairs():
        for i in range(3):
            (part,) = tmp_path.iterdir()
            sizes.append(part.stat().st_size)
            yield np.full((200, 200), i, np.float32), {"number": i}

    write_images(path, pairs(), 1.5)
    assert sizes[0] < sizes[1] < sizes[2]
    assert open_stack(path).column("number") == [0, 1, 2]
    assert open_stack(path).pixel_size_A == 1.5
    np.testing.assert_array_equal(open_stack(path).read(0, 3)[:, 7, 8], [0, 1, 2])


def refuse(stack, message, out="out.hdf", error=InputError, **options):
    files = {path: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(error) as refusal:
        mrefali.transform2d(stack, out, **options)
    assert message in str(refusal.value)
    assert {path: path.read_bytes() for path in Path().iterdir()} == files


def test_what_cannot_be_done_is_refused_and_leaves_nothing(stack):
    refuse(stack, "refs.hdf exists: give another name, or remove it first", "refs.hdf", FileExistsError)
    refuse(stack, "./stack.hdf is the stack itself, whose pixels stay as they are", "./stack.hdf", FileExistsError)
    refuse(stack, "no/out.hdf cannot be made: there is no folder /", "no/out.hdf", FileNotFoundError)
    refuse(stack, "bdb:out is a database", "bdb:out")
    refuse(stack, "interpolation=linear is not known: give quadratic or fourier", interpolation="linear")
    refuse("refs.hdf", "image 0 of refs.hdf has no xform.align2d: set it with mrefali header")
    refuse("none.hdf", "none.hdf does not exist", error=FileNotFoundError)


def test_a_pixel_that_is_no_number_names_its_image(stack, monkeypatch):
    with h5py.File(stack, "r+") as file:
        file["MDF/images/2/image"][3, 4] = np.inf
    monkeypatch.setattr(transforms, "BLOCK_BYTES", 4 * small.BOX**2)
    refuse(stack, "image 2 of stack.hdf has a pixel that is NaN or infinite", interpolation="fourier")
