"""What a scan carries, on a page: outlined slices, volumes, the course along the scan, and remarks.

Shapes: T slices of a scan, S side of a slice as the lesion model sees it, h = S / 4.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

import covidjax
from covidjax.data.preprocess import Box
from covidjax.data.scan.volume import Volume
from covidjax.evaluation.burden import SIDES, THIRDS, Burden
from covidjax.report.charts import FIRST, GREY, SECOND, create_picture, use_style
from covidjax.report.lesions import LOOKALIKES
from covidjax.report.page import Table, write_page
from covidjax.report.pictures import outline_labels
from covidjax.report.reading import build_reading
from covidjax.report.sections import Section

_COLUMNS = 4


class ShownSlice(NamedTuple):
    """A slice of the page.

    Attributes:
      number: of the slice, from 1.
      image: uint8 [S, S].
      labels: uint8 [S, S]; 1 lungs, 2 lesion, 3 consolidation, 0 elsewhere.
    """

    number: int
    image: np.ndarray
    labels: np.ndarray


class Outlined(NamedTuple):
    """The outlines of a scan.

    Attributes:
      summary: the part 'lesions' of prediction.json.
      burden: what the scan carries.
      probabilities: of lungs, lesion, and consolidation given lesion, float16 [T, h, h, 3].
      features: see `sick.compute_features`, [3].
      shown: slices of the page.
    """

    summary: dict[str, Any]
    burden: Burden
    probabilities: np.ndarray
    features: np.ndarray
    shown: list[ShownSlice]


class LesionPrediction(NamedTuple):
    """The prediction of a lesion model alone.

    Attributes:
      summary: content of prediction.json.
      boxes: boxes of the body in all slices of the scan.
      outlined: the outlines.
    """

    summary: dict[str, Any]
    boxes: list[Box]
    outlined: Outlined


def write_lesion_page(path: Path, volume: Volume, prediction: LesionPrediction, results: dict[str, Any]) -> None:
    """Writes prediction.html of a lesion model alone; for the arguments see `write_prediction_page`."""
    summary = prediction.summary
    warnings = [f'Forced in spite of: {doubt}' for doubt in summary['forced']]
    warnings += [f'{warning[0].upper()}{warning[1:]}.' for warning in summary['warnings']]
    write_page(
        path,
        'prediction.html',
        title=f'{summary["input"]["name"]}: lungs and lesions',
        notice=summary['notice'] and f'the model was trained on {summary["notice"]}',
        warnings=warnings,
        headline=f'{describe_burden(summary["lesions"])}.',
        bars=[],
        sections=[
            build_burden(prediction.outlined),
            build_reading(volume, summary, prediction.boxes),
            Section(
                'limits',
                'Limits of use',
                [
                    'Research use only. This is not a medical device; no output of it may guide the care of a patient.',
                    LOOKALIKES,
                    Table(
                        'Model',
                        ('property', 'value'),
                        [
                            ('model', results['model']),
                            ('trained on', results['data']),
                            ('SHA-256 of its weights', summary['lesions']['digest']),
                            ('code', f'covidjax {covidjax.__version__}'),
                        ],
                    ),
                ],
            ),
        ],
    )


def describe_burden(lesions: dict[str, Any]) -> str:
    """Returns e.g. 'Lesions in 2.3 % of the lungs (84 of 3,650 ml), 45 infected slices, grade 1 (up to 25 %)'.

    Args:
      lesions: part 'lesions' of prediction.json.
    """
    if lesions['lesions_percent'] is None:
        return 'No lungs found'
    volumes = ''
    if lesions['lungs_ml'] is not None:
        volumes = f' ({lesions["lesions_ml"]:,.0f} of {lesions["lungs_ml"]:,.0f} ml)'
    count = lesions['num_infected']
    return (
        f'Lesions in {format_percent(lesions["lesions_percent"])} of the lungs{volumes}, {count} infected '
        f'slice{"" if count == 1 else "s"}, grade {lesions["grade"]} ({lesions["grade_says"]})'
    )


def format_percent(percent: float) -> str:
    """Returns e.g. '12 %', '2.3 %', '0.04 %'."""
    return f'{percent:.0f} %' if percent >= 10 else f'{percent:.1f} %' if percent >= 1 else f'{percent:.2f} %'


def build_burden(outlined: Outlined) -> Section:
    """Returns the section 'lesions'."""
    lesions = outlined.summary
    amounts = {
        'whole lungs': lesions,
        **{f'{side} lung': lesions['sides'][side] for side in SIDES},
        **{f'{third} third': lesions['thirds'][third] for third in THIRDS},
    }
    columns = ('part', 'lungs, ml', 'lesions, ml', 'lesions, %', 'consolidation, ml', 'consolidation, %')
    fields = ('lungs_ml', 'lesions_ml', 'lesions_percent', 'consolidation_ml', 'consolidation_percent')
    rows = [(name, *(amount[field] for field in fields)) for name, amount in amounts.items()]
    facts = []
    if lesions['lesions_hu'] is not None:
        facts.append(f'The lesions have {lesions["lesions_hu"]:.0f} Hounsfield units on average.')
    if lesions['grade'] is not None:
        facts.append(f'Grade {lesions["grade"]}, {lesions["grade_says"]}: {lesions["grade_rule"]}.')
    return Section(
        'lesions',
        'Lungs and lesions',
        [
            f'{describe_burden(lesions)}. The lungs are found {lesions["lungs_found"]}.',
            *(f'Note: {remark}.' for remark in lesions['remarks']),
            'Outlined: lungs in blue, lesions in red, consolidation in yellow.',
            create_picture(_render_slices(outlined.shown), 'Slices with outlined lungs and lesions'),
            Table('Lesions by part of the lungs', columns, rows),
            create_picture(_render_course(lesions['slices']), 'Area of the lungs and share of lesions, slice by slice'),
            f'Infected slices have {lesions["infected_rule"]}.',
            *facts,
            LOOKALIKES,
        ],
    )


def _render_slices(shown: list[ShownSlice]) -> Figure:
    lines, columns = -(-len(shown) // _COLUMNS), min(_COLUMNS, len(shown))
    width = 7.5 if columns > 1 else 3
    with use_style():
        figure = Figure(figsize=(width, lines * (width / columns + 0.2)), layout='constrained')
        for axes in figure.subplots(lines, columns, squeeze=False).ravel():
            axes.axis('off')
        for axes, one in zip(figure.axes, shown, strict=False):
            # Drawn at twice the size, so that the lines are thin.
            image, labels = (part.repeat(2, 0).repeat(2, 1) for part in (one.image, one.labels))
            axes.imshow(outline_labels(image, labels))
            axes.set_title(str(one.number), fontsize=8)
        return figure


def _render_course(slices: list[dict[str, Any]]) -> Figure:
    numbers = [s['number'] for s in slices]
    has_mm = slices[0]['lungs_cm2'] is not None
    with use_style():
        figure = Figure(figsize=(7.5, 3.4), layout='constrained')
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(numbers, [s['lungs_cm2' if has_mm else 'lungs_percent'] for s in slices], color=FIRST)
        above.set(ylabel='Lungs, cm²' if has_mm else 'Lungs, % of slice')
        below.plot(numbers, [s['lesions_percent'] for s in slices], color=SECOND)
        for s in slices:
            if s['is_infected']:
                below.axvline(s['number'], color=GREY, linewidth=0.6, alpha=0.5)
        below.set(ylabel='Lesions, % of lungs', xlabel='Slice, from head to feet (grey: infected)')
        below.set_ylim(bottom=0)
        return figure
