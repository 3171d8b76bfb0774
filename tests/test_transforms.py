"""Poses applied to the pixels: the convention, how exact the interpolations are, and what the new stack holds."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import small
from conftest import JIT
from test_io_hdf import contents

import mrefali
from mrefali import average, cli, fourier, transforms
from mrefali.errors import InputError
from mrefali.geometry import identity_poses, make_poses
from mrefali.io import open_stack, write_images, write_stack
from mrefali.reference import fourier_shift
from mrefali.simulation import Views, render

# at the highest frequency the narrowest blob has 3e-6 of its spectrum left, and all lie 6 sigmas within the border
BLOBS = Views(40, np.array([[(-3.0, 1.0), (2.5, 3.5), (4.0, -2.0)]]), np.array([1.7, 1.6, 1.8]),
              np.array([1, 0.8, 0.6]))


def random_poses(n, seed=5):
    rng = np.random.default_rng(seed)
    return make_poses(rng.uniform(0, 360, n), *rng.uniform(-2, 2, (2, n)), np.arange(n) % 2)


# ---- arrays -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("box", [40, 41])
def test_fourier_carries_blobs_onto_their_view(box):
    views = Views(box, BLOBS.centres, BLOBS.sigmas, BLOBS.heights)
    poses = random_poses(6)
    kind = np.zeros(6, int)
    moved = fourier.transform(render(views, kind, poses), poses)
    expected = render(views, kind, identity_poses(6))
    assert np.abs(moved - expected).max() < 1e-5


def test_fourier_errs_much_less_than_quadratic():
    poses, kind = random_poses(4 if JIT else 1), np.zeros(4 if JIT else 1, int)
    images, expected = render(BLOBS, kind, poses), render(BLOBS, kind, identity_poses(len(kind)))
    quadratic, exact = (np.abs(transform(images, poses) - expected).max()
                        for transform in (average.transform, fourier.transform))
    assert quadratic < 0.05  # the two agree on where to
    assert exact < quadratic / 1000


@pytest.mark.parametrize("box", [16, 17])
def test_a_shift_alone_is_a_fourier_shift(box):
    images = np.random.default_rng(1).standard_normal((2, box, box)).astype(np.float32)
    moved = fourier.transform(images, make_poses([0, 0], [1.5, 3], [-0.25, -2]))
    np.testing.assert_allclose(moved[0], fourier_shift(images[0], (1.5, -0.25)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved[1], np.roll(images[1], (-2, 3), (0, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("box", [16, 17])
def test_quarter_turns_and_flips_only_move_pixels(box):
    images = np.random.default_rng(2).standard_normal((3, box, box)).astype(np.float32)
    moved = fourier.transform(images, make_poses([0, 90, 180], 0, 0, [1, 0, 0]))
    c, i = box // 2, np.arange(box)
    flipped = (2 * c - i) % box
    np.testing.assert_array_equal(moved[0], images[0][:, flipped])
    # alpha=90 carries +y to +x: out(x, y) = in(-y, x)
    np.testing.assert_allclose(moved[1], images[1].T[flipped], rtol=0, atol=1e-5)
    np.testing.assert_allclose(moved[2], images[2][flipped][:, flipped], rtol=0, atol=1e-5)


def test_a_turn_there_and_back_loses_nothing():
    image = render(BLOBS, np.zeros(1, int), identity_poses(1))
    turned = image
    for alpha in (37, 113, 210):
        turned = fourier.transform(turned, make_poses([alpha]))
    assert np.abs(turned - image).max() < 1e-5


# ---- files ------------------------------------------------------------------------------------------------

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
    refuse(stack, "there is no folder no", "no/out.hdf", FileNotFoundError)
    refuse(stack, "bdb:out is a database", "bdb:out")
    refuse(stack, "interpolation=linear is not known: give quadratic or fourier", interpolation="linear")
    refuse("refs.hdf", "image 0 of refs.hdf has no xform.align2d: set it with mrefali header")
    refuse("none.hdf", "none.hdf does not exist", error=FileNotFoundError)


def test_a_pixel_that_is_no_number_names_its_image(stack, monkeypatch):
    with h5py.File(stack, "r+") as file:
        file["MDF/images/2/image"][3, 4] = np.inf
    monkeypatch.setattr(transforms, "BLOCK_BYTES", 4 * small.BOX**2)
    refuse(stack, "image 2 of stack.hdf has a pixel that is NaN or infinite", interpolation="fourier")
