"""Checks of images and boxes: missing, unreadable, unusual size or depth, blank, box outside the image."""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from covidjax.audit import figures
from covidjax.audit.check import BROKEN, LOOK, NOT_CHECKED, OK, Check, count_things, join_words
from covidjax.audit.copies import Place
from covidjax.audit.dataset import Dataset, make_printable
from covidjax.audit.measure import Images
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.report.page import Table

_DARKEST, _BRIGHTEST = 5, 235  # limits of the mean grey value (0 to 255); beyond them a slice shows hardly anything
_MIN_SIDE = 16  # pixels; a smaller box holds no body
_MAX_ASPECT = 4.0
_MAX_ROWS = 12
_DEPTHS = {'L': '8-bit grey', '1': '1-bit', 'P': '8-bit palette', 'RGB': '8-bit colour', 'RGBA': '8-bit colour, alpha'}

TITLES = {
    'images.missing': 'Rows without a file',
    'images.unlisted': 'Files without a row',
    'images.readable': 'Readable images',
    'images.format': 'Sizes and bit depths',
    'images.brightness': 'Blank and extreme images',
    'images.identical': 'Identical images',
    'images.near_identical': 'Nearly identical images',
}


def check_files(dataset: Dataset, files: set[str]) -> list[Check]:
    """Compares the rows of the lists with the files of the image folder."""
    listed = {row.file: split for split, part in dataset.splits.items() for row in part.rows}
    missing = [f'{file} ({split})' for file, split in listed.items() if file not in files]
    reason = f'{count_things(len(missing), "row")} of {len(listed):,} without a file.' if missing else ''
    checks = [
        Check(
            'images.missing',
            TITLES['images.missing'],
            BROKEN if missing else OK,
            reason or f'Each of {count_things(len(listed), "row")} has its file.',
            missing,
        )
    ]
    title = TITLES['images.unlisted']
    if len(dataset.splits) < len(SPLITS):
        verdict, unlisted = NOT_CHECKED, []
        reason = 'Not all three lists are there: files of the others look like files without a row.'
    else:
        unlisted = sorted(make_printable(file) for file in files - listed.keys() - dataset.bad_files)
        verdict = LOOK if unlisted else OK
        reason = (
            f'{count_things(len(unlisted), "file")} of {len(files):,} without a row.'
            if unlisted
            else f'Each of {count_things(len(files), "file")} has its row.'
        )
    checks.append(Check('images.unlisted', title, verdict, reason, unlisted))
    return checks


def check_images(images: Images, places: Sequence[Place]) -> list[Check]:
    """Checks readability, sizes, bit depths and brightness of the images."""
    faults = [f'{make_printable(file)}: {reason}' for file, reason in images.faults.items()]
    number = len(images.index)
    title = TITLES['images.readable']
    if faults:
        reason = f'{count_things(len(faults), "image")} of {number + len(faults):,} cannot be read.'
        checks = [Check('images.readable', title, BROKEN, reason, faults)]
    else:
        verdict = OK if number else NOT_CHECKED
        checks = [Check('images.readable', title, verdict, f'All {count_things(number, "image")} could be read.')]
    if not number:
        reason = 'No image could be read.'
        return checks + [Check(n, TITLES[n], NOT_CHECKED, reason) for n in ('images.format', 'images.brightness')]
    labels = np.array([place.row.label for place in places])
    return [*checks, _check_format(images, labels), _check_brightness(images, places, labels)]


def _check_format(images: Images, labels: np.ndarray) -> Check:
    depths = [_DEPTHS.get(mode, '16-bit grey' if mode.startswith('I;16') else f'mode {mode}') for mode in images.modes]
    sizes = [f'{width} x {height}' for width, height in images.sizes.tolist()]
    by_depth, by_size = _count_by(depths, labels), _count_by(sizes, labels)
    tables = [
        Table('Bit depths', ('pixels', *CLASSES), [(depth, *counts) for depth, counts in by_depth]),
        Table('Commonest sizes', ('size', *CLASSES), [(size, *counts) for size, counts in by_size[:_MAX_ROWS]]),
    ]
    reason = (
        f'{count_things(len(by_depth), "bit depth")} ({join_words([depth for depth, _ in by_depth])}) and '
        f'{count_things(len(by_size), "size")}, from {images.sizes.min()} to {images.sizes.max()} pixels a side.'
    )
    return Check('images.format', TITLES['images.format'], LOOK if len(by_depth) > 1 else OK, reason, tables=tables)


def _count_by(values: Sequence[str], labels: np.ndarray) -> list[tuple[str, list[int]]]:
    """Returns each value with its counts per class, most common value first."""
    counted = Counter(zip(values, labels.tolist(), strict=True))
    return [(v, [counted[v, label] for label in range(len(CLASSES))]) for v, _ in Counter(values).most_common()]


def _check_brightness(images: Images, places: Sequence[Place], labels: np.ndarray) -> Check:
    low, high, mean = images.ranges.T
    faults = []
    for i in np.flatnonzero((low == high) | (mean < _DARKEST) | (mean > _BRIGHTEST)):
        kind = 'blank' if low[i] == high[i] else 'nearly black' if mean[i] < _DARKEST else 'nearly white'
        faults.append(f'{places[i].row.file}: {kind}, mean grey {mean[i]:.1f} of 255')
    rows = []
    for label, name in enumerate(CLASSES):
        if (labels == label).any():
            rows.append((name, *(float(q) for q in np.quantile(mean[labels == label], (0, 0.05, 0.5, 0.95, 1)))))
    if faults:
        verdict, reason = LOOK, f'{count_things(len(faults), "image")} blank, nearly black or nearly white.'
    else:
        medians = join_words([f'{row[0]} {row[3]:.0f}' for row in rows])
        verdict, reason = OK, f'No image is blank or extreme; the median mean grey, of 255: {medians}.'
    table = Table('Mean grey value of an image', ('class', 'lowest', '5 %', 'median', '95 %', 'highest'), rows)
    check = Check('images.brightness', TITLES['images.brightness'], verdict, reason, faults, [table])
    values = {name: mean[labels == label] for label, name in enumerate(CLASSES)}
    check.pictures.append(
        functools.partial(figures.render_histograms, values, 'Mean grey value of an image (0 to 255)')
    )
    return check


def check_boxes(dataset: Dataset, images: Images | None) -> Check:
    """Checks for boxes outside the image, too small or of unusual shape; tabulates their area by class."""
    rows = [(split, row) for split, part in dataset.splits.items() for row in part.rows]
    boxes = np.array([row.box for _, row in rows])
    labels = np.array([row.label for _, row in rows])
    sizes = np.zeros((len(rows), 2))
    if images is not None:
        for i, (_, row) in enumerate(rows):
            if row.file in images.index:
                sizes[i] = images.sizes[images.index[row.file]]
    known = sizes[:, 0] > 0
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    aspect = width / height
    misses = known & ((boxes[:, :2] >= sizes).any(1))
    outside = (boxes[:, :2] < 0).any(1) | (known & (boxes[:, 2:] > sizes).any(1))
    findings = {
        'missing the image': misses,
        'reaching beyond the image and clipped': outside & ~misses,
        f'with a side of less than {_MIN_SIDE} pixels': np.minimum(width, height) < _MIN_SIDE,
        f'with sides in a ratio above {_MAX_ASPECT:.0f} to 1': np.maximum(aspect, 1 / aspect) > _MAX_ASPECT,
    }
    faults = [
        f'{rows[i][1].file} ({rows[i][0]}): box {" ".join(map(str, rows[i][1].box))}, {what}'
        for what, found in findings.items()
        for i in np.flatnonzero(found)
    ]
    # If every image was measured, use areas relative to the image: resizing does not change them.
    whole = known.all()
    area = width * height / (sizes.prod(1) if whole else 1)
    tables = []
    for title, values in (('Width of a box over its height', aspect), (_name_area(whole), area)):
        quantiles = [
            (name, *(float(q) for q in np.quantile(values[labels == label], (0, 0.05, 0.5, 0.95, 1))))
            for label, name in enumerate(CLASSES)
            if (labels == label).any()
        ]
        tables.append(Table(title, ('class', 'lowest', '5 %', 'median', '95 %', 'highest'), quantiles))
    unknown = '' if whole else ' (upper edges only where an image was measured)'
    if faults:
        verdict = BROKEN if misses.any() else LOOK
        kinds = [f'{found.sum():,} {what}' for what, found in findings.items() if found.any()]
        reason = f'Of {len(rows):,} boxes, {join_words(kinds)}{unknown}.'
    else:
        verdict, reason = OK, f'All {len(rows):,} boxes lie in their image and are of usual shape{unknown}.'
    check = Check('boxes', 'Boxes', verdict, reason, faults, tables)
    by_class = {name: area[labels == label] for label, name in enumerate(CLASSES)}
    check.pictures.append(functools.partial(figures.render_histograms, by_class, _name_area(whole)))
    return check


def _name_area(whole: bool) -> str:
    return 'Area of a box over that of its image' if whole else 'Area of a box in pixels'
