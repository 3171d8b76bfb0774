"""``mrefali montage``: the picture of a stack, of class averages and of a run; and what is refused."""

import finished
import numpy as np
import pytest
from PIL import Image

import mrefali
from mrefali import cli, plots, sheets
from mrefali.io import open_stack


@pytest.fixture
def outdir(tmp_path):
    return finished.write(tmp_path, vanished=(2,))


def test_a_run_gives_a_picture_of_its_classes(tmp_path, outdir, capsys):
    assert cli.main(["montage", outdir, str(tmp_path / "run.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run.png: 6 images\n"
    with Image.open(tmp_path / "run.png") as picture:
        image = np.asarray(picture.convert("L"))
    assert image.shape[1] > 400
    assert (image[:, 0] == 255).all()


def test_class_averages_are_sorted_by_size_or_by_number(outdir):
    stack = open_stack(f"{outdir}/multi_ref.hdf")
    counts = stack.column("ave_n")
    images, captions = sheets._tiles(stack, "size", 400)
    assert captions == [f"{k}: {counts[k]}" for k in np.argsort(-np.array(counts), kind="stable")]
    assert images[-1] is None  # it vanished
    images, captions = sheets._tiles(stack, "number", 4)
    assert captions == [f"{k}: {counts[k]}" for k in range(4)]
    np.testing.assert_array_equal(images[1], stack.read(1, 2)[0])


def test_of_a_long_stack_the_first_are_shown_and_the_line_says_so(tmp_path, outdir, capsys):
    words = ["montage", f"{tmp_path}/stack.hdf", str(tmp_path / "few.png"), "--most=5", "--columns=5"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/few.png: 5 of 60 images\n"
    with Image.open(tmp_path / "few.png") as picture:
        width, height = picture.size
    assert width > 4 * height / 1.3


def test_a_tile_shows_its_image_with_y_growing_upward():
    image = np.zeros((8, 8))
    image[6, 1] = 1  # high y, low x: upper left
    axes, = plots.montage([image], ["0"]).axes
    shown = axes.images[0].get_array()
    assert np.unravel_index(shown.argmax(), shown.shape) == (1, 1)


@pytest.mark.parametrize(("words", "message"), [
    (["out.jpg"], "out.jpg is not allowed: give a file name that ends in .png"),
    (["there.png"], "there.png exists: give another name, or remove it first"),
    (["no/out.png"], "no/out.png cannot be made: there is no folder /"),
    (["out.png", "--order=name"], "order=name is not known: give size or number"),
    (["out.png", "--columns=-1"], "columns=-1 is not allowed"),
    (["out.png", "--most=0"], "most=0 is not allowed: give at least 1"),
])
def test_a_bad_call_is_refused_and_writes_nothing(tmp_path, outdir, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_bytes(b"mine")
    assert cli.main(["montage", outdir, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    assert (tmp_path / "there.png").read_bytes() == b"mine"


def test_no_image_makes_no_montage():
    with pytest.raises(mrefali.InputError, match="there is no image to show"):
        plots.montage([], [])
