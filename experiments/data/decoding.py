"""From encoded bytes to RGB pixels: libjpeg-turbo for what it reads, Pillow for the rest."""

import io
import math

import numpy as np
import simplejpeg
from PIL import Image


class UnreadableImage(Exception):
    """Bytes that no decoder makes an image of."""


def image_size(encoded: bytes) -> tuple[int, int]:
    """``(height, width)`` in pixels, from the header alone.

    Raises:
        UnreadableImage: the header is damaged, or of no known format.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)  # KeyError: a chroma subsampling without a name
    except (ValueError, KeyError):
        width, height = _open(encoded).size
    return int(height), int(width)


def decode(encoded: bytes) -> np.ndarray:
    """Decodes an image of any common format; grey, CMYK and palette images become RGB, and 16 bits become the upper 8.

    The pixels of a JPEG are those of libjpeg's accurate transform and smooth chroma upsampling, which public weights
    are usually evaluated with. EXIF orientation is ignored, as is usual for classification datasets.

    Args:
        encoded: the file's bytes.

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        UnreadableImage: not an image, or a truncated one.
    """
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        # libjpeg-turbo takes every CMYK image for an inverted one; Pillow reads the marker that tells.
        if colorspace not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(encoded, "RGB")
    except (ValueError, KeyError):
        # Another format under a JPEG's name, or a flaw that strict decoding objects to and Pillow knows to be harmless.
        pass
    image = _open(encoded)
    try:
        if image.mode.startswith("I"):  # grey of 16 bits, all but the darkest of which Pillow would make white
            grey = np.asarray(image).clip(0, 2**16 - 1) >> 8
            return np.repeat(grey.astype(np.uint8)[..., np.newaxis], 3, -1)
        return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage(str(error)) from error


def decode_top(encoded: bytes, rows: int, reduction: float) -> np.ndarray:
    """Decodes the upper part of an image for training, where speed counts and chroma need not be exact to the pixel.

    Of a JPEG, what lies below is not decoded at all, and chroma is upsampled by repetition: that moves a resized crop
    by 0.2 grey levels on average. Other images are decoded by ``decode``.

    Args:
        encoded: the file's bytes.
        rows: how many rows from the top are needed, in pixels of the full size.
        reduction: how many times smaller than its full size the image will be used. A JPEG is decoded at half, three
            eighths, a quarter … of its size where this allows it, antialiased by the JPEG transform itself.

    Returns:
        uint8 ``[height, width, 3]``, with at least ``rows`` rows. The width is that of the whole image, times the
        fraction at which it was decoded.

    Raises:
        UnreadableImage: see ``decode``.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        frame = _frame_header(encoded)
        if colorspace in ("CMYK", "YCCK") or frame is None:
            return decode(encoded)
        # A baseline JPEG has its rows in order, so one that claims to be lower is the top of the same image. Some rows
        # more than needed, as chroma at the lower edge depends on what is below it.
        height = min(int(height), rows + 16)
        encoded = encoded[: frame + 5] + height.to_bytes(2, "big") + encoded[frame + 7 :]
        return simplejpeg.decode_jpeg(
            encoded,
            "RGB",
            fastupsample=True,
            min_height=math.ceil(height / reduction),
            min_width=math.ceil(int(width) / reduction),
            min_factor=2,
            strict=False,  # the rows left over are no mistake
        )
    except (ValueError, KeyError):
        return decode(encoded)


def _frame_header(encoded: bytes) -> int | None:
    """Where the frame header of a whole, baseline JPEG begins; None for any other image.

    A JPEG is a series of segments: 0xFF, a marker byte, a length of two bytes that includes them, and content. The
    content of a frame header is one byte of precision, then the height in two.
    """
    if not encoded.endswith(b"\xff\xd9"):
        return None
    position = 2
    while position + 9 < len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker in (0xC0, 0xC1):
            return position
        if marker == 0xDA or (0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return None
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return None


def _open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from error
