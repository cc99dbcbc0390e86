"""Decoding, crops and resizing of single photographs."""

import io

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from experiments.data import decoding, geometry
from tests.data.images import encode


def scene(height: int, width: int) -> Image.Image:
    """Smooth shapes with fine texture, as photographs have."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    fine = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))


def draws(area: float = 0.0, ratio: float = 0.5, top: float = 0.0, left: float = 0.0, flip: float = 0.9) -> list[float]:
    return [area] * 10 + [ratio] * 10 + [top, left, flip]


def train_view(encoded: bytes, numbers: list[float], size: int) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    geometry.train_view(encoded, numbers, out, "bilinear")
    return out


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).mean())


def test_crop_box_by_hand():
    # 8 % of 100 × 200 pixels is 1,600: a square of 40.
    assert geometry.random_crop_box(draws(), 100, 200) == (0, 0, 40, 40)
    assert geometry.random_crop_box(draws(top=0.999, left=0.999), 100, 200) == (60, 160, 40, 40)
    # Aspect ratio 4/3: width √(1600 · 4/3) = 46.2, height √(1600 · 3/4) = 34.6.
    assert geometry.random_crop_box(draws(ratio=1.0), 100, 200) == (0, 0, 35, 46)


def test_crop_box_takes_the_first_attempt_that_fits():
    numbers = draws(area=1.0)
    numbers[3] = 0.0  # the whole area at ratio 1 is 141 × 141, which does not fit into 100 × 200
    assert geometry.random_crop_box(numbers, 100, 200) == (0, 0, 40, 40)


def test_crop_box_of_an_elongated_image_is_its_middle():
    assert geometry.random_crop_box(draws(area=1.0), 30, 400) == (0, 180, 30, 40)
    assert geometry.random_crop_box(draws(area=1.0), 400, 30) == (180, 0, 40, 30)


def test_crop_boxes_lie_within_the_image():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = rng.integers(1, 300, 2).tolist()
        box = geometry.random_crop_box(rng.random(geometry.DRAWS).tolist(), height, width)
        assert min(box.top, box.left) >= 0
        assert min(box.height, box.width) > 0
        assert box.top + box.height <= height
        assert box.left + box.width <= width


def test_train_view_is_the_crop_itself_where_sizes_agree():
    image = scene(100, 200)
    encoded = encode(image, "PNG")
    view = train_view(encoded, draws(top=0.5, left=0.25), 40)
    expected = np.asarray(image)[30:70, 40:80]
    np.testing.assert_array_equal(view, expected)
    mirrored = train_view(encoded, draws(top=0.5, left=0.25, flip=0.1), 40)
    np.testing.assert_array_equal(mirrored, expected[:, ::-1])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_antialiased_like_pillow(interpolation):
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for side in (48, 96, 150, 256, 320):
        image = scene(side, side)
        ours = np.empty((96, 96, 3), np.uint8)
        geometry.resize(np.asarray(image), ours, interpolation)
        theirs = np.asarray(image.resize((96, 96), filters[interpolation]))
        assert difference(ours, theirs) < 2.0


def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same():
    image = scene(1200, 1600)
    jpeg, png = encode(image, "JPEG", quality=95), encode(image, "PNG")
    assert decoding.decode_top(jpeg, 1200, 4.5).shape == (300, 400, 3)
    assert decoding.decode_top(jpeg, 1200, 1.9).shape == (1200, 1600, 3)
    for top, area in ((0.0, 0.9), (0.7, 0.4)):
        numbers = draws(area=area, top=top, left=0.3)
        fast = train_view(jpeg, numbers, 128)
        full = train_view(png, numbers, 128)
        assert difference(fast, full) < 2.0


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("rows", [1, 40, 41, 47, 120, 133])
def test_the_top_of_a_jpeg_is_that_of_the_whole(subsampling, rows):
    jpeg = encode(scene(133, 90), "JPEG", quality=90, subsampling=subsampling)
    top = decoding.decode_top(jpeg, rows, 1.0)
    assert rows <= len(top) <= rows + 16
    whole = simplejpeg.decode_jpeg(jpeg, "RGB", fastupsample=True)
    np.testing.assert_array_equal(top[:rows], whole[:rows])
    # The scene's colours change far more abruptly than a photograph's.
    assert difference(whole, decoding.decode(jpeg)) < 8


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_the_top_of_a_jpeg_in_another_arrangement(options):
    jpeg = encode(scene(133, 90), "JPEG", quality=90, **options)
    assert difference(decoding.decode_top(jpeg, 50, 1.0)[:50], decoding.decode(jpeg)[:50]) < 8


def test_the_top_of_a_truncated_jpeg_is_refused():
    jpeg = encode(scene(133, 90), "JPEG", quality=90)
    with pytest.raises(decoding.UnreadableImage):
        decoding.decode_top(jpeg[:-200], 10, 1.0)


@pytest.mark.parametrize(("crop_fraction", "short"), [(0.875, 256), (224 / 232, 232), (0.9, 248), (1.0, 224)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_view_resizes_and_crops_as_torchvision_does(crop_fraction, short, interpolation):
    image = scene(300, 413)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    width = int(short * 413 / 300)
    resized = np.asarray(image.resize((width, short), filters[interpolation]))
    top, left = round((short - 224) / 2), round((width - 224) / 2)
    view = geometry.eval_view(encode(image, "PNG"), 224, crop_fraction, interpolation)
    np.testing.assert_array_equal(view, resized[top : top + 224, left : left + 224])


def test_eval_view_of_a_fraction_whose_quotient_is_rounded_down():
    assert 192 / (192 / 225) < 225
    image = scene(300, 413)
    resized = np.asarray(image.resize((309, 225), Image.Resampling.BILINEAR))
    view = geometry.eval_view(encode(image, "PNG"), 192, 192 / 225, "bilinear")
    np.testing.assert_array_equal(view, resized[16:208, 58:250])


def test_eval_view_of_an_upright_image():
    image = scene(413, 300)
    view = geometry.eval_view(encode(image, "PNG"), 224, 224 / 300, "bilinear")
    np.testing.assert_array_equal(view, np.asarray(image)[94:318, 38:262])


def test_jpeg_pixels_are_those_of_the_accurate_decoder():
    jpeg = encode(scene(60, 80), "JPEG", quality=90)
    np.testing.assert_array_equal(decoding.decode(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_of_every_kind_become_rgb(mode, progressive):
    image = scene(60, 80)
    encoded = encode(image.convert(mode), "JPEG", quality=95, progressive=progressive)
    assert decoding.image_size(encoded) == (60, 80)
    pixels = decoding.decode(encoded)
    assert (pixels.shape, pixels.dtype) == ((60, 80, 3), np.uint8)
    assert difference(pixels, np.asarray(image.convert(mode).convert("RGB"))) < 4


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_png_is_read_whatever_it_is_called(mode):
    image = scene(60, 80).convert(mode)
    encoded = encode(image, "PNG")
    assert decoding.image_size(encoded) == (60, 80)
    np.testing.assert_array_equal(decoding.decode(encoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_becomes_that_of_8(file_format):
    grey = np.asarray(scene(60, 80).convert("L"))
    fine = np.random.default_rng(0).integers(0, 256, grey.shape)
    image = Image.fromarray((256 * grey.astype(int) + fine).astype(np.uint16))
    pixels = decoding.decode(encode(image, file_format))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., np.newaxis], 3, -1))


def test_chroma_of_a_fourth_of_the_rows_is_read():
    """As of an image of 4:1:1 that was turned without loss; libjpeg-turbo's binding has no name for it."""
    factors = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411]
    encoded = cv2.imencode(".jpg", np.asarray(scene(64, 64)), factors)[1].tobytes()
    turned = encoded.replace(b"\x01\x41\x00", b"\x01\x14\x00")
    assert turned != encoded
    assert decoding.image_size(turned) == (64, 64)
    assert decoding.decode(turned).shape == decoding.decode_top(turned, 64, 1.0).shape == (64, 64, 3)


def test_orientation_tags_are_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    assert decoding.decode(encode(scene(60, 80), "JPEG", exif=exif)).shape == (60, 80, 3)


def test_bytes_that_are_no_image_are_refused():
    jpeg = encode(scene(60, 80), "JPEG")
    for damaged in (b"", b"not an image", jpeg[: len(jpeg) // 2], jpeg[:100], encode(scene(60, 80), "PNG")[:500]):
        with pytest.raises(decoding.UnreadableImage):
            decoding.decode(damaged)
