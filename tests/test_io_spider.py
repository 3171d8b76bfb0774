"""SPIDER's stacks, against files made word by word, and against Pillow."""

import formats
import numpy as np
import pytest
from formats import IMAGES, spider_header
from PIL import Image

from mrefali.errors import InputError
from mrefali.io import SpiderStack, open_stack
from mrefali.io.spider import write_spider


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("images", [IMAGES, np.tile(IMAGES, (1, 17, 17))[:2, :257, :257]])
def test_images_and_pixel_size_are_read(tmp_path, order, images):
    stack = open_stack(formats.write_spider(tmp_path / "a.spi", images, order, 1.25))
    assert isinstance(stack, SpiderStack)
    assert (stack.n_images, stack.box, stack.pixel_size_A) == (*images.shape[:2], 1.25)
    np.testing.assert_array_equal(stack.read(0, len(images)), images)
    np.testing.assert_array_equal(stack.read_at([1, 0]), images[[1, 0]])


def test_a_file_of_one_image_is_a_stack_of_one(tmp_path):
    (tmp_path / "a.dat").write_bytes(spider_header(">", 16) + IMAGES[0].astype(">f4").tobytes())
    stack = open_stack(tmp_path / "a.dat")
    assert (stack.n_images, stack.pixel_size_A, stack.has_poses()) == (1, None, False)
    np.testing.assert_array_equal(stack.read(0, 1), IMAGES[:1])


@pytest.mark.parametrize("box", [16, 33])
def test_pillow_reads_what_is_written(tmp_path, box):
    images = np.tile(IMAGES, (1, 3, 3))[:3, :box, :box]
    path = str(tmp_path / "a.spi")
    write_spider(path, [images[:2], images[2:]], 3, box, 1.25)
    for i in range(3):
        with Image.open(path) as file:  # anew, for it forgets how many there are once it has gone to one
            assert (file.format, file.n_frames) == ("SPIDER", 3)
            file.seek(i)
            np.testing.assert_array_equal(np.asarray(file), images[i])
    stack = open_stack(path)
    assert stack.pixel_size_A == 1.25
    np.testing.assert_array_equal(stack.read(0, 3), images)


@pytest.mark.parametrize(("words", "message"), [
    ({"w5": 3, "w1": 16}, r"has 16 x 16 x 16 pixels and the form 3: give square 2-D images"),
    ({"w5": -11}, r"the form -11"),
    ({"w2": 8}, r"has 16 x 8 x 1 pixels"),
    ({"w24": -5}, r"is an indexed stack, which cannot be read"),
    ({"w24": 2, "w26": 0}, r"says that its last image is number 0"),
    ({"w24": 2, "w26": float("nan")}, r"says that its last image is number nan"),
    ({"w24": 2, "w26": 2**30}, r"is cut short: it has 2048 bytes, its 1073741824 images of 16 x 16 pixels need"),
    ({"w24": 2, "w26": 1}, r"is cut short"),
])
def test_what_is_no_stack_of_images_is_refused(tmp_path, words, message):
    (tmp_path / "a.spi").write_bytes(spider_header("<", 16, **words) + IMAGES[0].tobytes())
    with pytest.raises(InputError, match=message):
        open_stack(tmp_path / "a.spi")


def test_a_deleted_image_is_named(tmp_path):
    path = tmp_path / "a.spi"
    formats.write_spider(path)
    data = bytearray(path.read_bytes())
    at = 1024 + 2 * 2048 + 4 * 26  # word 27 of the third image
    data[at:at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.spi has no image 3 of 1 to 7 \(deleted\?\)"):
        open_stack(path)


def test_images_beyond_the_last_are_refused_and_unused_places_are_not(tmp_path):
    path = tmp_path / "a.spi"
    formats.write_spider(path)
    whole = bytearray(path.read_bytes())
    whole[4 * 25:4 * 26] = np.float32(5).tobytes()  # word 26, the last image
    path.write_bytes(whole)
    with pytest.raises(InputError, match="a.spi goes on for 4096 bytes beyond the last of the 5 images"):
        open_stack(path)
    for i in (5, 6):  # headers of 1024 bytes, pixels of 1024
        at = 1024 + 2048 * i + 4 * 26
        whole[at:at + 4] = bytes(4)  # word 27, the number of an image in use
    path.write_bytes(whole)
    assert open_stack(path).n_images == 5
