"""Image file to square grey slice, the network input. Preparation and prediction share this code.

This module imports only numpy and Pillow because every preparation worker imports it.
"""

import contextlib
import functools
import io
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

# CT slices are 512 to 1024 pixels wide. A far larger image is a decompression bomb or damaged.
MAX_PIXELS = 64_000_000
WINDOW_WIDTH_HU, WINDOW_LEVEL_HU = 1500, -600  # of COVIDx CT: lungs in the middle, soft tissue bright

Box = tuple[int, int, int, int]


def load_slice(path: str, box: Box | None, size: int) -> np.ndarray:
    """Reads an image file, crops it to the body, converts it to grey and resizes it.

    Args:
      path: an image in a format that Pillow reads. A truncated image is an error; it is not padded.
      box: xmin, ymin, xmax, ymax in pixels, half-open, clipped to the image; None is the whole image.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size], 0 to 255.

    Raises:
      ValueError: the file is missing, damaged, not an image or larger than `MAX_PIXELS`, or the box misses the image.
        The message is the reason on one line, without the path.
    """
    with open_image(path) as image:
        return crop_grey_resize(image, box, size)


@contextlib.contextmanager
def open_image(file: str | BinaryIO) -> Iterator[Image.Image]:
    """Yields an open image. Errors on opening it and inside the block become a ValueError as in `load_slice`."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns about images between one and two times its own limit.
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            image = Image.open(file)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f'more than {MAX_PIXELS:,} pixels, taken for a decompression bomb') from error
    except Image.UnidentifiedImageError as error:
        raise ValueError('not an image') from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except Exception as error:  # decoders can raise anything on damaged bytes
        raise ValueError(' '.join(str(error).split()) or type(error).__name__) from error


def crop_grey_resize(image: Image.Image, box: Box | None, size: int) -> np.ndarray:
    """Crops an image to a box, converts it to grey and resizes it to a square. Does not keep the aspect ratio.

    Args:
      image: any size; 16-bit images are scaled to 8 bits.
      box: xmin, ymin, xmax, ymax in pixels, half-open, clipped to the image; None is the whole image.
      size: side of the result in pixels; the filter is bicubic with antialiasing.

    Returns:
      uint8 [size, size], 0 to 255.

    Raises:
      ValueError: the box misses the image, or the pixels have neither 8 nor 16 bits.
    """
    if box is not None:
        image = image.crop(_clip_box(box, image.width, image.height))
    return np.asarray(convert_grey(image).resize((size, size), Image.Resampling.BICUBIC))


def apply_window(hu: np.ndarray) -> np.ndarray:
    """Maps Hounsfield units of any shape to uint8 grey values by the COVIDx CT window, -1350 to 150 HU."""
    low = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2
    return np.round((hu.astype(np.float32) - low).clip(0, WINDOW_WIDTH_HU) * (255 / WINDOW_WIDTH_HU)).astype(np.uint8)


def encode_slices(tasks: Sequence[tuple[str, Box]], size: int, main_pid: int) -> list[tuple[bytes, str]]:
    """Loads slices and encodes them as PNG. This is one task of a preparation worker.

    Args:
      tasks: (path, box) of each slice.
      size: side of the result in pixels.
      main_pid: process that waits for the result; a worker exits soon after that process ends.

    Returns:
      For each task (bytes of a grey PNG [size, size], ''), or (b'', reason) if the slice is unreadable.
    """
    if os.getpid() != main_pid:
        _exit_with(main_pid)
    results = []
    for path, box in tasks:
        try:
            results.append((encode_png(load_slice(path, box, size)), ''))
        except ValueError as error:
            results.append((b'', str(error)))
    return results


@functools.cache  # one watcher thread per process
def _exit_with(main_pid: int) -> None:
    """Exits this worker when its parent ends. Otherwise an orphaned worker would wait for work and keep its memory."""

    def watch() -> None:
        while os.getppid() == main_pid:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width] as a grey PNG."""
    buffer = io.BytesIO()
    # Level 3 takes 60 % of the time of the default level 6 and gives 10 % more bytes.
    Image.fromarray(pixels).save(buffer, format='PNG', compress_level=3)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decodes a grey PNG to uint8 [height, width, 1]."""
    return np.asarray(Image.open(io.BytesIO(data)))[..., np.newaxis]


def _clip_box(box: Box, width: int, height: int) -> Box:
    xmin, ymin, xmax, ymax = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    if xmin >= xmax or ymin >= ymax:
        raise ValueError(f'the box {" ".join(map(str, box))} misses the image of {width} x {height} pixels')
    return xmin, ymin, xmax, ymax


def convert_grey(image: Image.Image) -> Image.Image:
    """Converts an image to mode L. Raises ValueError for floating-point pixels or values outside 16 bits."""
    if image.mode == 'F':
        raise ValueError('floating-point pixels; save the slice with 8 or 16 bits')
    if not image.mode.startswith('I'):
        return image.convert('L')
    # Pillow clips these modes at 255.
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f'pixels from {pixels.min()} to {pixels.max()}; save the slice with 8 or 16 bits')
    return Image.fromarray(np.round(pixels / 257).astype(np.uint8))
