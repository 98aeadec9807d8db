"""Rows and tables of slices as SVG, without matplotlib: twenty times as fast for the many slices of a prediction.

A page of a scan shows some fifty slices. matplotlib makes axes with ticks for each of them and takes two seconds.
Lengths are points (1/72 inch), as in figures of matplotlib, whose style these pictures share.
"""

import base64
import functools
import io
from collections.abc import Sequence
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
from PIL import Image

from covidjax.data.preprocess import Box
from covidjax.report.charts import SCHEME
from covidjax.report.page import Picture
from covidjax.report.pictures import Example

_OUTLINE = '#ff5a4d'
_ALPHA = 0.3  # of maps over slices; matplotlib's SVG applies its 0.55 twice
_GAP = 6.0
_LINE = 1.25  # height of a line of text, in font sizes
_MAP, _SIGNED_MAP = 'inferno', 'RdBu_r'  # as in `pictures`
_BAR = 50.0  # width of the colour bar with its labels


def draw_tiles(examples: Sequence[Example], columns: int, alt: str, *, width: float = 7.5) -> Picture:
    """Draws slices in reading order, each below its title.

    Args:
      examples: at least one.
      columns: slices in a row.
      alt: text alternative.
      width: in inches.
    """
    size = min(8.0, 8 * width / columns)
    top = max(example.title.count('\n') + bool(example.title) for example in examples) * _LINE * size + 2
    pitch = 72 * width / columns
    side = pitch - _GAP
    parts = []
    for number, example in enumerate(examples):
        x, y = number % columns * pitch, number // columns * (top + side + _GAP / 2)
        parts.append(_write_lines(example.title, x + side / 2, y + top - 3, size))
        parts.append(_draw_example(example, x, y + top, side))
    lines = -(-len(examples) // columns)
    return _finish(parts, width, lines * (top + side + _GAP / 2), alt)


def draw_rows(rows: Sequence[tuple[str, Sequence[Example]]], alt: str, *, scale: str) -> Picture:
    """Draws a row per slice, with its title on the left and a colour bar on the right: the slice and its maps.

    Args:
      rows: title and pictures; all rows have the same length, and all maps are signed or none is.
      alt: text alternative.
      scale: label of the colour bar.
    """
    left, top = 26.0, 16.0
    pitch = (72 * 7.5 - left - _BAR) / len(rows[0][1])
    side = pitch - _GAP
    parts = [
        _write_lines(example.title, left + i * pitch + side / 2, top - 4, 9) for i, example in enumerate(rows[0][1])
    ]
    for line, (title, examples) in enumerate(rows):
        y = top + line * pitch
        parts.append(_write_lines(title, left - 5, y + side / 2, 8, is_upright=True))
        parts += [_draw_example(example, left + i * pitch, y, side) for i, example in enumerate(examples)]
    height = top + len(rows) * pitch
    is_signed = any(example.is_signed for _, examples in rows for example in examples)
    length = min(180.0, height - top - _GAP)
    middle = (top + height - _GAP) / 2
    parts.append(_draw_bar(left + len(rows[0][1]) * pitch, middle - length / 2, length, scale, is_signed))
    return _finish(parts, 7.5, height, alt)


def draw_box(image: np.ndarray, box: Box, alt: str, *, width: float = 3.2) -> Picture:
    """Draws a slice, uint8 [H, W], with a box."""
    height = 72 * width * image.shape[0] / image.shape[1]
    factor = 72 * width / image.shape[1]
    left, top, right, bottom = (factor * side for side in box)
    frame = (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="none" '
        f'stroke="{_OUTLINE}" stroke-width="1.2"/>'
    )
    return _finish([_embed(image, 0, 0, 72 * width, height), frame], width, height, alt)


def _draw_example(example: Example, x: float, y: float, side: float) -> str:
    overlay = example.overlay
    if overlay is None or overlay.dtype == bool:
        outline = '' if overlay is None else _trace(overlay, x, y, side)
        return _embed(example.image, x, y, side, side) + outline
    colours = _list_colours(example.is_signed)
    units = (overlay + 1) / 2 if example.is_signed else overlay
    over = colours[(units * 256).clip(0, 255).astype(np.uint8)]
    blended = (1 - _ALPHA) * example.image[..., np.newaxis] + _ALPHA * over
    return _embed(np.round(blended).astype(np.uint8), x, y, side, side)


@functools.cache
def _list_colours(is_signed: bool) -> np.ndarray:
    """Returns the 256 colours of a map from its lowest value to its highest, float [256, 3] up to 255."""
    return 255 * matplotlib.colormaps[_SIGNED_MAP if is_signed else _MAP](np.arange(256))[:, :3]


def _trace(mask_HxW: np.ndarray, x: float, y: float, side: float) -> str:
    """Returns the edges between the pixels inside and outside a mask; the edge of the slice is none."""
    rows, columns = np.nonzero(np.diff(mask_HxW.astype(np.int8), axis=0))
    steps = [f'M{column} {row + 1}h1' for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
    rows, columns = np.nonzero(np.diff(mask_HxW.astype(np.int8), axis=1))
    steps += [f'M{column + 1} {row}v1' for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
    factor = side / mask_HxW.shape[1]
    return (
        f'<path d="{"".join(steps)}" transform="translate({x:.1f} {y:.1f}) scale({factor:.4f})" fill="none" '
        f'stroke="{_OUTLINE}" stroke-width="{0.8 / factor:.2f}" stroke-linecap="round"/>'
        if steps
        else ''
    )


def _draw_bar(x: float, y: float, height: float, label: str, is_signed: bool) -> str:
    """Returns a colour bar with its three ticks and its label."""
    middle, ticks = y + height / 2, ('1', '0', '\N{MINUS SIGN}1') if is_signed else ('1.0', '0.5', '0.0')
    colours = np.round(_list_colours(is_signed)[::-1, np.newaxis]).astype(np.uint8)
    parts = [_embed(colours, x, y, 9, height, stretch=True)]
    parts += [
        _write_lines(tick, x + 12, y + place * height + 3, 8, anchor='start')
        for tick, place in zip(ticks, (0, 0.5, 1), strict=True)
    ]
    return ''.join(parts) + _write_lines(label, x + 42, middle, 9, is_upright=True)


def _embed(pixels: np.ndarray, x: float, y: float, width: float, height: float, *, stretch: bool = False) -> str:
    """Returns an image element of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format='PNG', compress_level=3)
    data = base64.b64encode(buffer.getvalue()).decode()
    fit = ' preserveAspectRatio="none"' if stretch else ''
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        f'{fit} href="data:image/png;base64,{data}"/>'
    )


def _write_lines(
    text: str, x: float, y: float, size: float, *, anchor: str = 'middle', is_upright: bool = False
) -> str:
    """Returns the lines of a text, the last one on y; upright text reads from bottom to top."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if is_upright else ''
    lines = text.split('\n') if text else []
    return ''.join(
        f'<text x="{x:.1f}" y="{y - (len(lines) - 1 - i) * _LINE * size:.1f}" font-size="{size:.1f}" '
        f'text-anchor="{anchor}"{turn}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )


def _finish(parts: Sequence[str], width: float, height: float, alt: str) -> Picture:
    """Returns the picture of some elements; the width is in inches, the height in points."""
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{72 * width:.0f}pt" height="{height:.0f}pt" '
        f'viewBox="0 0 {72 * width:.0f} {height:.1f}" font-family="DejaVu Sans, sans-serif" fill="currentColor">'
        f'{SCHEME}{"".join(parts)}</svg>'
    )
    return Picture(alt, f'data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}', width)
