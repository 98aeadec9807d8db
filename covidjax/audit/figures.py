"""Plots of an audit."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from covidjax.data.lists import CLASSES
from covidjax.report.charts import COLOURS, FIRST, GREY, SECOND, create_picture, use_style
from covidjax.report.page import Picture


def render_lengths(lengths: Mapping[str, Sequence[int]]) -> Picture:
    """Draws the cumulative share of scans by number of slices, one line per class."""
    with use_style():
        figure = Figure(figsize=(5, 3), layout='constrained')
        axes = figure.subplots()
        for name, values in lengths.items():
            if values:
                ordered = np.sort(values)
                axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), color=COLOURS[name], label=name)
        axes.axvline(16, color=GREY, linestyle='--', linewidth=1, label='16 slices')
        axes.set_xscale('log')
        axes.minorticks_off()
        longest = max(max(values, default=1) for values in lengths.values())
        axes.set_xticks([x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if x <= 2 * longest])
        axes.xaxis.set_major_formatter('{x:.0f}')
        axes.set_xlabel('Slices of a scan')
        axes.set_ylabel('Cumulative share of scans')
        axes.legend()
        return create_picture(figure, 'Cumulative share of scans by their number of slices, one line per class')


def render_shares(counts: Mapping[str, Sequence[int]], name: str) -> Picture:
    """Draws one bar per value: class shares of its patients, with the number of patients."""
    with use_style():
        figure = Figure(figsize=(5, 0.9 + 0.32 * len(counts)), layout='constrained')
        axes = figure.subplots()
        totals = [sum(values) for values in counts.values()]
        labels = [f'{value} ({total:,})' for value, total in zip(counts, totals, strict=True)]
        left = np.zeros(len(counts))
        for label, class_name in enumerate(CLASSES):
            share = np.array([values[label] / sum(values) for values in counts.values()])
            axes.barh(labels, share, left=left, color=COLOURS[class_name], label=class_name)
            left += share
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.set_xlabel(f'Class shares of the patients of each {name} (number of patients)')
        figure.legend(loc='outside upper center', ncols=len(CLASSES))
        return create_picture(figure, f'Class shares of the patients of each {name}')


def render_histograms(values: Mapping[str, np.ndarray], name: str) -> Picture:
    """Draws one histogram per class over common bins; the bars of a class sum to 1."""
    with use_style():
        figure = Figure(figsize=(5, 2.8), layout='constrained')
        axes = figure.subplots()
        low, high = (
            pick(v.min() if pick is min else v.max() for v in values.values() if len(v)) for pick in (min, max)
        )
        bins = np.linspace(low, high if high > low else low + 1, 41)
        for class_name, of_class in values.items():
            if len(of_class):
                share = np.histogram(of_class, bins)[0] / len(of_class)
                axes.stairs(share, bins, color=COLOURS[class_name], linewidth=1.6, label=class_name)
        axes.set_xlabel(name)
        axes.set_ylabel('Share of the class')
        axes.legend()
        return create_picture(figure, f'Histograms per class: {name}')


def render_accuracies(columns: Sequence[str], rows: Sequence[tuple]) -> Picture:
    """Draws accuracy and balanced accuracy with intervals, next to the majority class and chance."""
    with use_style():
        figure = Figure(figsize=(5, 1.4 + 0.5 * len(rows)), layout='constrained')
        axes = figure.subplots()
        kinds = (
            ('accuracy', 'majority class', FIRST, 'o', -0.13),
            ('balanced accuracy', 'chance', SECOND, 's', 0.13),
        )
        for name, guess, colour, marker, offset in kinds:
            of = [dict(zip(columns, row, strict=True)) for row in rows]
            places = np.arange(len(rows)) + offset
            for place, row in zip(places, of, strict=True):
                if row[f'interval of {name}']:
                    axes.plot(row[f'interval of {name}'], [place, place], color=colour)
            axes.plot([row[name] for row in of], places, marker, color=colour, label=name)
            axes.plot([row[guess] for row in of], places, '|', color=colour, markersize=11, label=guess)
        axes.set_yticks(range(len(rows)), [f'{row[0]}\non {row[2]}' for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.03)
        figure.legend(loc='outside upper center', ncols=2, fontsize=9)
        return create_picture(figure, 'Accuracy and balanced accuracy with intervals, majority class and chance')


def render_means(means: Mapping[str, np.ndarray]) -> Picture:
    """Draws the mean thumbnail of each class, [S * S] in 0..1."""
    side = int(np.sqrt(len(next(iter(means.values())))))
    images = {f'mean {name}': values.reshape(side, side) for name, values in means.items()}
    return _render_images([images], 'Mean thumbnail of each class')


def render_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> Picture:
    """Draws the thumbnails [S, S] of each pair of copies side by side, with their file names above."""
    lines = [{f'{a}': x / 255, f'{b} ': y / 255} for x, y, a, b in pairs]
    return _render_images(lines, f'{len(pairs)} pairs of images that are copies, each pair in one row')


def _render_images(lines: Sequence[Mapping[str, np.ndarray]], alt: str) -> Picture:
    with use_style():
        columns = max(map(len, lines))
        figure = Figure(figsize=(5, 0.2 + len(lines) * (4.6 / columns if columns > 2 else 2.3)), layout='constrained')
        grid = figure.subplots(len(lines), columns, squeeze=False)
        for axes_of_line, line in zip(grid, lines, strict=True):
            for axes, (title, image) in zip(axes_of_line, line.items(), strict=False):
                axes.imshow(image, cmap='gray', vmin=0, vmax=1)
                axes.set_title(title if len(title) <= 40 else f'...{title[-37:]}', fontsize=8)
            for axes in axes_of_line:
                axes.axis('off')
        return create_picture(figure, alt)
