"""Figures of slices and attention maps: the paper's figures 1, 2, 5, 6 and 7, and the most confident mistakes.

Shapes: N slices, S their side, T slices of a scan.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from covidjax.data.lists import CLASSES, Row
from covidjax.data.preprocess import Box
from covidjax.report.charts import use_style

LINE_COLOURS = {1: (77, 163, 255), 2: (255, 90, 77), 3: (255, 194, 77)}  # of lungs, lesions and consolidation
_GREY_MAP = {'cmap': 'gray', 'vmin': 0, 'vmax': 255}
_SCALE = ScalarMappable(Normalize(0, 1), 'inferno')  # for overlaid maps
_SIGNED = ScalarMappable(Normalize(-1, 1), 'RdBu_r')  # for overlaid maps that are for or against a class


class Example(NamedTuple):
    """A slice to show.

    Attributes:
      title: text above the slice.
      image: uint8 [S, S].
      overlay: drawn over the slice, [S, S]: a map in [0, 1], a bool mask (outlined), or None.
      is_signed: the map is in [-1, 1]: red is for a class, blue is against it.
    """

    title: str
    image: np.ndarray
    overlay: np.ndarray | None = None
    is_signed: bool = False


def choose_examples(rows: Sequence[Row], per_class: int) -> dict[str, list[int]]:
    """Returns slice indices per class: the middle slices of up to `per_class` patients, evenly spaced in the list.

    The first rows of a list would not do: they share one class and often one patient.
    """
    chosen = {}
    for label, name in enumerate(CLASSES):
        by_patient: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if row.label == label:
                by_patient.setdefault(row.patient, []).append(number)
        patients = list(by_patient.values())
        if patients:
            spread = np.unique(np.linspace(0, len(patients) - 1, per_class).round().astype(int))
            chosen[name] = [patients[i][len(patients[i]) // 2] for i in spread]
    return chosen


def outline_labels(grey_HxW: np.ndarray, labels_HxW: np.ndarray) -> np.ndarray:
    """Draws the outlines of lungs (blue), lesions (red) and consolidation (yellow) into a slice, one pixel wide.

    Args:
      grey_HxW: uint8.
      labels_HxW: uint8; 1 lungs, 2 lesion in the lungs, 3 consolidation in a lesion, 0 elsewhere.

    Returns:
      uint8 [H, W, 3].
    """
    picture = grey_HxW[..., np.newaxis].repeat(3, -1)
    for label, colour in LINE_COLOURS.items():
        inside = labels_HxW >= label
        picture[inside & ~scipy.ndimage.binary_erosion(inside)] = colour
    return picture


def outline_box(title: str, image: np.ndarray, box: Box) -> Example:
    """Returns an uncropped image, uint8 [H, W], with its box outlined."""
    xmin, ymin, xmax, ymax = box
    inside = np.zeros(image.shape, bool)
    inside[max(ymin, 0) : ymax, max(xmin, 0) : xmax] = True
    return Example(title, image, inside)


def arrange_maps(
    titles: Sequence[str], images: np.ndarray, maps: Mapping[str, np.ndarray], *, is_signed: bool = False
) -> list[tuple[str, list[Example]]]:
    """Returns the rows of `render_maps`: each slice plain, then overlaid with each of its maps.

    Args:
      titles: one per slice [N].
      images: uint8 [N, S, S, 1].
      maps: map name -> overlays [N, S, S], as in `Example`.
      is_signed: see `Example`.
    """
    return [
        (
            title,
            [
                Example('slice', image),
                *(Example(name, image, of_kind[i], is_signed) for name, of_kind in maps.items()),
            ],
        )
        for i, (title, image) in enumerate(zip(titles, images[..., 0], strict=True))
    ]


def render_panels(
    panels: Mapping[str, Sequence[Example]], columns: int, *, scale: str = '', width: float = 7.5
) -> Figure:
    """Draws panels of slices side by side; in the paper: normal, pneumonia, COVID-19 from left to right.

    Args:
      panels: panel title -> its slices in reading order.
      columns: slices per row of a panel.
      scale: label of the colour bar; empty if there are no maps.
      width: of all panels together, in inches.
    """
    with use_style():
        lines = max(-(-len(examples) // columns) for examples in panels.values())
        side = width / (columns * len(panels))
        fontsize = min(8, 8 * side)
        titles = [example.title for examples in panels.values() for example in examples]
        title_lines = max(title.count('\n') + bool(title) for title in titles)
        height = lines * (side + title_lines * 1.4 * fontsize / 72) + (0.25 if any(panels) else 0)
        figure = Figure(figsize=(width + (0.7 if scale else 0), height), layout='constrained')
        ratios = [width / len(panels)] * len(panels) + ([0.7] if scale else [])
        parts = figure.subfigures(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
        for part, (title, examples) in zip(parts, panels.items(), strict=False):
            part.suptitle(title, fontsize=10)
            for axes in part.subplots(lines, columns, squeeze=False).ravel():
                axes.axis('off')
            for axes, example in zip(part.axes, examples, strict=False):
                _show(axes, example, fontsize=fontsize)
        if scale:
            figure.colorbar(_SCALE, cax=parts[-1].subplots(), label=scale, ticks=[0, 0.5, 1])
        return figure


def _show(axes: Axes, example: Example, *, fontsize: float) -> None:
    axes.imshow(example.image, **_GREY_MAP)
    axes.set_title(example.title, fontsize=fontsize, pad=2)
    if example.overlay is None:
        return
    if example.overlay.dtype == bool:
        if example.overlay.any():
            axes.contour(example.overlay, [0.5], colors='#ff5a4d', linewidths=0.8)
        return
    scale = _SIGNED if example.is_signed else _SCALE
    axes.imshow(example.overlay, cmap=scale.cmap, norm=scale.norm, alpha=0.55)


def render_maps(rows: Sequence[tuple[str, Sequence[Example]]], *, scale: str) -> Figure:
    """Draws one row per slice, with its title on the left: the slice and its maps.

    Args:
      rows: title and pictures; all rows have the same length, and all maps are signed or none is.
      scale: label of the colour bar.
    """
    with use_style():
        columns = len(rows[0][1])
        side = 6.6 / columns
        figure = Figure(figsize=(7.5, len(rows) * (side + 0.08) + 0.25), layout='constrained')
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, (title, examples) in enumerate(rows):
            for axes, example in zip(grid[line], examples, strict=True):
                _show(axes, example._replace(title=example.title if line == 0 else ''), fontsize=9)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                for spine in axes.spines.values():
                    spine.set_visible(False)
            grid[line][0].set_ylabel(title, fontsize=8)
        is_signed = any(example.is_signed for _, examples in rows for example in examples)
        shown, ticks = (_SIGNED, [-1, 0, 1]) if is_signed else (_SCALE, [0, 0.5, 1])
        figure.colorbar(shown, ax=grid, label=scale, shrink=min(1, 2.5 / len(rows)), ticks=ticks)
        return figure
