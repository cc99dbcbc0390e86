"""Crops and resizing of photographs."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from experiments.data import decoding

Interpolation = Literal["bilinear", "bicubic"]

_CV2_FILTER = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_PILLOW_FILTER = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_ATTEMPTS = 10
_MIN_AREA = 0.08
_MAX_RATIO = 4 / 3

# Uniform numbers that decide one training image: area and aspect ratio for each attempt, place of the crop, flip.
DRAWS = 2 * _ATTEMPTS + 3


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def random_crop_box(draws: Sequence[float], height: int, width: int) -> Box:
    """A random part of an image: 8 % to 100 % of its area, aspect ratio 3/4 to 4/3 (Szegedy et al. 2014, section 6).

    Args:
        draws: at least ``DRAWS − 1`` numbers from ``[0, 1)``.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The first of ten tries that lies within the image; for one so elongated that none does, its middle.
    """
    for area_draw, ratio_draw in zip(draws[:_ATTEMPTS], draws[_ATTEMPTS : 2 * _ATTEMPTS], strict=True):
        area = height * width * (_MIN_AREA + (1 - _MIN_AREA) * area_draw)
        ratio = _MAX_RATIO ** (2 * ratio_draw - 1)
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws[2 * _ATTEMPTS] * (height - box_height + 1))
            left = int(draws[2 * _ATTEMPTS + 1] * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_height, box_width = min(height, round(width * _MAX_RATIO)), min(width, round(height * _MAX_RATIO))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resize(image: np.ndarray, out: np.ndarray, interpolation: Interpolation) -> None:
    """Resizes to a square, antialiased at a third of the cost of a filter as wide as the reduction.

    Reductions up to 1.5 times need no more than interpolation, which reads all pixels. Those up to threefold
    interpolate at twice the wanted resolution and average 2×2 pixels, larger ones average areas. On photographs the
    result differs from that of Pillow's antialiased filter by less than a grey level on average at 128 pixels and more,
    and by 1.2 to 2.2 at 64 and 32.

    Args:
        image: uint8 ``[height, width, 3]``.
        out: uint8 ``[size, size, 3]``, contiguous; holds the result afterwards.
        interpolation: between pixels.
    """
    size = len(out)
    reduction = max(image.shape[:2]) / size
    if reduction > 3:
        cv2.resize(image, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    elif reduction > 1.5:
        image = cv2.resize(image, (2 * size, 2 * size), interpolation=_CV2_FILTER[interpolation])
        cv2.resize(image, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    else:
        cv2.resize(image, (size, size), dst=out, interpolation=_CV2_FILTER[interpolation])


def train_view(encoded: bytes, draws: Sequence[float], out: np.ndarray, interpolation: Interpolation) -> None:
    """A random part of an encoded image, resized to a square and mirrored every other time.

    Args:
        encoded: the file's bytes.
        draws: ``DRAWS`` numbers from ``[0, 1)``, on which alone the view depends.
        out: uint8 ``[size, size, 3]``, contiguous; holds the view afterwards.
        interpolation: between pixels.

    Raises:
        UnreadableImage: see ``decoding.decode``.
    """
    height, width = decoding.image_size(encoded)
    box = random_crop_box(draws, height, width)
    reduction = max(1.0, min(box.height, box.width) / len(out))
    image = decoding.decode_top(encoded, box.top + box.height, reduction)
    scale = image.shape[1] / width
    top, bottom = round(box.top * scale), round((box.top + box.height) * scale)
    left, right = round(box.left * scale), round((box.left + box.width) * scale)
    resize(image[top:bottom, left:right], out, interpolation)
    if draws[-1] < 0.5:
        cv2.flip(out, 1, dst=out)


def eval_view(encoded: bytes, size: int, crop_fraction: float, interpolation: Interpolation) -> np.ndarray:
    """The middle of an encoded image, as torchvision and timm evaluate it.

    The shorter side is resized to ``size / crop_fraction`` by Pillow's antialiased filter, which those use too, and a
    square of ``size`` is cut from the centre.

    Args:
        encoded: the file's bytes.
        size: pixels of the square's side.
        crop_fraction: of the shorter side that is kept, ``0 < crop_fraction ≤ 1``.
        interpolation: between pixels.

    Returns:
        uint8 ``[size, size, 3]``.

    Raises:
        UnreadableImage: see ``decoding.decode``.
    """
    image = Image.fromarray(decoding.decode(encoded))
    # The small excess keeps quotients such as 192 / (192 / 225) from falling to the integer below.
    short = math.floor(size / crop_fraction + 1e-6)
    long = short * max(image.size) // min(image.size)
    width, height = (short, long) if image.width <= image.height else (long, short)
    image = image.resize((width, height), _PILLOW_FILTER[interpolation])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]
