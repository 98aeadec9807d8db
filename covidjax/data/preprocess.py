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
WINDOW_HU = (WINDOW_LEVEL_HU - WINDOW_WIDTH_HU // 2, WINDOW_LEVEL_HU + WINDOW_WIDTH_HU // 2)
FURTHER_WINDOWS_HU = ((-1000, 400), (-1200, 600))  # other usual lung windows

REGIONS = ('body', 'lungs')  # what is left of a slice
MAX_GROWTH = 1_000_000_000  # bytes; a worker that grows by more is replaced

Box = tuple[int, int, int, int]


def load_slice(path: str, box: Box | None, size: int, region: str = 'body') -> np.ndarray:
    """Reads an image file, crops it to the body or to the lungs, converts it to grey and resizes it.

    Args:
      path: an image in a format that Pillow reads. A truncated image is an error; it is not padded.
      box: xmin, ymin, xmax, ymax in pixels, half-open, clipped to the image; None is the whole image.
      size: side of the result in pixels.
      region: 'body' is the box; 'lungs' is what `slice_lungs.find_lungs_in_slice` finds in the box, on black.

    Returns:
      uint8 [size, size], 0 to 255.

    Raises:
      ValueError: the file is missing, damaged, not an image or larger than `MAX_PIXELS`, the box misses the image, or
        no lungs are found. The message is the reason on one line, without the path.
    """
    with open_image(path) as image:
        return resize(cut_region(image, box, region)[0], size)


def cut_region(image: Image.Image, box: Box | None, region: str) -> tuple[np.ndarray, Box]:
    """Cuts a region out of an image (see `load_slice`); returns its grey values uint8 [h, w] and its box in the image.

    Raises:
      ValueError: see `load_slice`.
    """
    xmin, ymin, xmax, ymax = _clip_box(box or (0, 0, image.width, image.height), image.width, image.height)
    grey = np.asarray(convert_grey(image.crop((xmin, ymin, xmax, ymax))))
    if region == 'body':
        return grey, (xmin, ymin, xmax, ymax)
    from covidjax.data.slice_lungs import cut_to_lungs, find_lungs_in_slice  # loads scipy, which 'body' does not need

    lungs = find_lungs_in_slice(grey)
    if lungs is None:
        raise ValueError('no lungs found in it')
    cut, (left, top, right, bottom) = cut_to_lungs(grey, lungs)
    return cut, (xmin + left, ymin + top, xmin + right, ymin + bottom)


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """Resizes grey values uint8 [h, w] to [size, size]; bicubic with antialiasing, aspect ratio not kept."""
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))


def resize_probabilities(probabilities_hxwxC: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes probabilities of any float type bilinearly, with half-pixel centres: float32 [H, W, C] for `shape` H, W.

    A smaller shape gives averages.
    """
    planes = np.moveaxis(probabilities_hxwxC.astype(np.float32), -1, 0)
    resized = [Image.fromarray(plane).resize(shape[::-1], Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], -1)


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
    """Crops an image to a box, converts it to grey and resizes it: uint8 [size, size] (see `cut_region`, `resize`)."""
    return resize(cut_region(image, box, 'body')[0], size)


def apply_window(hu: np.ndarray, window_hu: tuple[int, int] = WINDOW_HU) -> np.ndarray:
    """Maps Hounsfield units of any shape to uint8 grey values: the ends of the window to 0 and 255.

    The default is the COVIDx CT window, -1350 to 150 HU.
    """
    low, high = window_hu
    return np.round((hu.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)


def encode_slices(
    tasks: Sequence[tuple[str, Box]], size: int, main_pid: int, region: str = 'body'
) -> list[tuple[bytes, str]]:
    """Loads slices and encodes them as PNG. This is one task of a preparation worker.

    Args:
      tasks: (path, box) of each slice.
      size: side of the result in pixels.
      main_pid: process that waits for the result; a worker exits soon after that process ends.
      region: see `load_slice`.

    Returns:
      For each task (bytes of a grey PNG [size, size], ''), or (b'', reason) if the slice is unreadable.
    """
    set_up_worker(main_pid)
    results = []
    for path, box in tasks:
        try:
            results.append((encode_png(load_slice(path, box, size, region)), ''))
        except ValueError as error:
            results.append((b'', str(error)))
    return results


def set_up_worker(main_pid: int) -> None:
    """Sets up a worker process: it exits with its parent, and a model that it runs takes one CPU core, no accelerator.

    loky replaces a worker whose memory has grown by 300 MB since its first task. Here it may grow by `MAX_GROWTH`: a
    model, the libraries of pages or one scan take 300 MB, and new workers would load everything again.

    Does nothing in the main process. Call it before the first import of jax.
    """
    if os.getpid() != main_pid:
        exit_with_parent(main_pid)
        os.environ.update(JAX_PLATFORMS='cpu', NPROC='1')
        from joblib.externals.loky import process_executor

        process_executor._MAX_MEMORY_LEAK_SIZE = MAX_GROWTH


@functools.cache  # one watcher thread per process
def exit_with_parent(main_pid: int) -> None:
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


def compute_otsu_threshold(values: np.ndarray) -> float:
    """Returns the threshold with the largest between-class variance (Otsu 1979), over 256 bins.

    Values below the threshold are the low group. For constant values the threshold is that value
    and the group is empty.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    if values.dtype == np.uint8:  # the same counts from 256 values
        greys = np.arange(256, dtype=np.uint8)
        weights = np.bincount(values.ravel(), minlength=256)
        counts, edges = np.histogram(greys, bins=256, range=(low, high), weights=weights)
    else:
        counts, edges = np.histogram(values, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sums = np.cumsum(counts * centres)
    with np.errstate(divide='ignore', invalid='ignore'):
        means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (total - below)
    between = np.nan_to_num(below * (total - below) * (means[0] - means[1]) ** 2)
    # All thresholds in a gap of empty bins tie: take the middle.
    best = np.flatnonzero(between == between.max())
    return float(edges[1:-1][best].mean())
