"""Images of particles as grey pictures, small enough for a page. Imports nothing of ours; Pillow only where used."""

import base64
import importlib.util
import io

import numpy as np

#: Percentiles of the pixels that are shown black and white.
BLACK, WHITE = 0.5, 99.7

#: Grey between the pictures of a strip, and its width in px.
GAP_GREY, GAP = 255, 2


def can_encode():
    """Whether Pillow is installed."""
    return importlib.util.find_spec("PIL") is not None


def grey(image):
    """A picture of an image, each with its own scale of greys.

    Parameters
    ----------
    image : (n, n) array of finite numbers

    Returns
    -------
    (n, n) uint8
        Row 0 is the top of the picture, as files of pictures have it: y of the image grows upward, as EMAN2 shows it.
    """
    black, white = np.percentile(image, [BLACK, WHITE])
    scaled = (np.asarray(image, np.float64) - black) / max(white - black, np.finfo(np.float64).tiny)
    return np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)[::-1]


def fit(picture, side):
    """The picture made smaller, if it is larger than ``side`` px; (m, m) uint8 with m at most ``side``."""
    from PIL import Image

    if len(picture) <= side:
        return picture
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def strip(pictures):
    """Pictures of one size beside one another, (n, n_pictures * (n + GAP) - GAP) uint8."""
    height, width = pictures[0].shape
    row = np.full((height, len(pictures) * (width + GAP) - GAP), GAP_GREY, np.uint8)
    for i, picture in enumerate(pictures):
        row[:, i * (width + GAP):i * (width + GAP) + width] = picture
    return row


def jpeg(picture, quality):
    """The bytes of a JPEG file of a (m, n) uint8 picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def data_uri(jpeg_bytes):
    """What stands for a JPEG file in ``src="..."``, str."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes).decode("ascii")
