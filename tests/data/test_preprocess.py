import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from covidjax.data import preprocess


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def make_noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_bomb(width, height):
    """Returns a tiny PNG whose header declares a huge size."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    body = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 100)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


def test_crop_without_resizing_is_exact():
    pixels = make_noise(20, 30)
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), (7, 3, 17, 13), 10)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, pixels[3:13, 7:17])


def test_crop_comes_before_resizing():
    pixels = np.full((40, 40), 255, np.uint8)
    pixels[10:30, 10:30] = 50  # filtering before cropping would mix in the white border
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), (10, 10, 30, 30), 8)
    np.testing.assert_array_equal(out, 50)


def test_box_is_clipped_to_the_image():
    pixels = make_noise(8, 8)
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), (-5, -1, 99, 8), 8)
    np.testing.assert_array_equal(out, pixels)


@pytest.mark.parametrize('box', [(8, 0, 12, 4), (0, 9, 4, 12), (-4, 0, 0, 4)])
def test_box_beside_the_image(box):
    with pytest.raises(ValueError, match='misses the image of 8 x 8'):
        preprocess.crop_grey_resize(Image.fromarray(make_noise(8, 8)), box, 4)


def test_aspect_ratio_is_not_kept_and_reduction_is_antialiased():
    pixels = np.zeros((64, 128), np.uint8)
    pixels[:, ::2] = 200  # alternating columns: 100 with antialiasing, 0 or 200 without
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), None, 16)
    assert out.shape == (16, 16)
    np.testing.assert_allclose(out[:, 2:-2].astype(float), 100, atol=4)


def test_colours_become_luma():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 100, 200, 50
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), None, 4)
    np.testing.assert_allclose(out.astype(float), 0.299 * 100 + 0.587 * 200 + 0.114 * 50, atol=1)


@pytest.mark.parametrize('mode', ['1', 'P', 'LA', 'RGBA'])
def test_modes_agree_with_grey(mode):
    grey = Image.fromarray(np.where(make_noise(12, 12) > 127, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(preprocess.crop_grey_resize(grey.convert(mode), (1, 2, 11, 12), 10), grey_crop(grey))


def grey_crop(image):
    return np.asarray(image)[2:12, 1:11]


@pytest.mark.parametrize('dtype', [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype):
    pixels = (make_noise(9, 9).astype(np.int64) * 257).astype(dtype)
    out = preprocess.crop_grey_resize(Image.fromarray(pixels), (1, 1, 9, 9), 8)
    np.testing.assert_array_equal(out, pixels[1:, 1:] // 257)


def test_sixteen_bit_png_file(tmp_path):
    pixels = np.array([[0, 65535], [257 * 100, 257 * 7]], np.uint16)
    path = save(tmp_path / 'a.png', pixels)
    np.testing.assert_array_equal(preprocess.load_slice(path, None, 2), [[0, 255], [100, 7]])


def test_pixels_out_of_range():
    with pytest.raises(ValueError, match='floating-point'):
        preprocess.crop_grey_resize(Image.fromarray(np.zeros((4, 4), np.float32)), None, 4)
    with pytest.raises(ValueError, match='from -1000 to'):
        preprocess.crop_grey_resize(Image.fromarray(np.full((4, 4), -1000, np.int32)), None, 4)


def test_unreadable_files(tmp_path):
    save(tmp_path / 'whole.png', make_noise(64, 64))
    whole = (tmp_path / 'whole.png').read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    cases = {
        'truncated.png': whole[: len(whole) // 2],
        'header.png': whole[:20],
        'damaged.png': bytes(damaged),
        'text.png': b'not an image at all',
        'empty.png': b'',
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r'\w') as caught:
            preprocess.load_slice(str(tmp_path / name), None, 8)
        assert '\n' not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValueError, match='No such file'):
        preprocess.load_slice(str(tmp_path / 'absent.png'), None, 8)
    with pytest.raises(ValueError, match='directory'):
        preprocess.load_slice(str(tmp_path), None, 8)


@pytest.mark.parametrize(('width', 'height'), [(8001, 8000), (10_000, 10_000), (60_000, 60_000)])
def test_decompression_bomb(tmp_path, width, height):
    limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / 'bomb.png').write_bytes(make_bomb(width, height))
    with pytest.raises(ValueError, match='more than 64,000,000 pixels'):
        preprocess.load_slice(str(tmp_path / 'bomb.png'), None, 8)
    assert limits == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_png_round_trip():
    pixels = make_noise(5, 7)
    out = preprocess.decode_png(preprocess.encode_png(pixels))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, pixels[..., np.newaxis])


def test_batch_keeps_order_and_reasons(tmp_path):
    paths = [save(tmp_path / f'{i}.png', make_noise(8, 8, seed=i)) for i in range(3)]
    tasks = [(paths[2], (0, 0, 8, 8)), (str(tmp_path / 'absent.png'), (0, 0, 8, 8)), (paths[0], (0, 0, 8, 8))]
    first, absent, last = preprocess.encode_slices(tasks, 8, os.getpid())
    np.testing.assert_array_equal(preprocess.decode_png(first[0])[..., 0], make_noise(8, 8, seed=2))
    assert absent == (b'', 'No such file or directory')
    np.testing.assert_array_equal(preprocess.decode_png(last[0])[..., 0], make_noise(8, 8, seed=0))
