"""Images as files, in memory."""

import io

import numpy as np
from PIL import Image


def encode(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    """An image, or its pixels as uint8, as the bytes of a file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
