"""A page of the result as a DICOM secondary capture, for viewers that show no reports. Needs highdicom.

Shapes: R slices that the verdict rests on, S side of a slice as the model sees it.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from covidjax.data.lists import CLASSES
from covidjax.predict.dicom_report import MAKER, list_sentences
from covidjax.report.burden import LesionPrediction, Outlined
from covidjax.report.charts import COLOURS, use_style
from covidjax.report.pictures import outline_labels
from covidjax.report.prediction import Prediction

_SERIES = 9003  # series number
_BODY_PART = 'CHEST'
_WIDTH_INCHES, _DPI = 8.3, 110
_LINE = 108  # characters
_COLUMNS = 5


class _Picture(NamedTuple):
    """A picture of the page: uint8 [S, S] or [S, S, 3], its title, and a map [S, S] over it."""

    image: np.ndarray
    title: str = ''
    overlay: np.ndarray | None = None


def create_page(
    headers: Sequence[Dataset],
    prediction: Prediction | LesionPrediction,
    maps_RxSxS: np.ndarray | None,
    name: str | None,
    maker: dict[str, str],
) -> Dataset:
    """Returns a page in colour: the result in words, and slices.

    Args:
      headers: of the slices of the scan, from head to feet.
      prediction: of the scan.
      maps_RxSxS: the leading map of the slices that the verdict rests on, in [0, 1], if there is one.
      name: of this map.
      maker: see `dicom_results.describe_maker`.
    """
    from highdicom.sc import SCImage

    canvas = FigureCanvasAgg(_render_page(prediction, maps_RxSxS, name))
    canvas.draw()
    page = SCImage.from_ref_dataset(
        headers[0],
        np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]),
        photometric_interpretation='RGB',
        bits_allocated=8,
        coordinate_system='PATIENT',
        patient_orientation=('L', 'P'),
        series_instance_uid=generate_uid(),
        series_number=_SERIES,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=f'{MAKER}: page (research use only)',
        **maker,
    )
    page.SourceImageSequence = []
    for number in _list_numbers(prediction):
        source = headers[number - 1]
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        page.SourceImageSequence.append(reference)
    page.BodyPartExamined = _BODY_PART
    page.BurnedInAnnotation = 'NO'  # its text identifies nobody
    return page


def _list_numbers(prediction: Prediction | LesionPrediction) -> list[int]:
    """Returns the numbers of the slices of the page."""
    rests_on = prediction.summary.get('rests_on', [])
    outlined = [] if prediction.outlined is None else [one.number for one in _choose(prediction.outlined)]
    return sorted({*rests_on, *outlined})


def _choose(outlined: Outlined) -> list:
    places = np.unique(np.linspace(0, len(outlined.shown) - 1, _COLUMNS).round().astype(int))
    return [outlined.shown[place] for place in places]


def _render_page(prediction: Prediction | LesionPrediction, maps_RxSxS: np.ndarray | None, name: str | None) -> Figure:
    summary, rows, captions = prediction.summary, [], []
    if 'verdict' in summary:
        places = prediction.get_top_places()
        images = [prediction.images[place] for place in places]
        rows.append([_Picture(image, f'slice {n}') for image, n in zip(images, summary['rests_on'], strict=True)])
        captions.append('Slices that the verdict rests on')
        if maps_RxSxS is not None:
            rows.append([_Picture(image, overlay=one) for image, one in zip(images, maps_RxSxS, strict=True)])
            captions.append(f'{name}; what the model weighed, not a lesion')
    if prediction.outlined is not None:
        chosen = _choose(prediction.outlined)
        rows.append([_Picture(outline_labels(one.image, one.labels), f'slice {one.number}') for one in chosen])
        captions.append('Outlines: lungs blue, lesions red, consolidation yellow')
    lines = [line for sentence in list_sentences(summary) for line in textwrap.wrap(sentence, _LINE)]
    heights = [0.7 + 0.17 * len(lines), *[1.5] * ('verdict' in summary), *[2.2] * len(rows)]
    with use_style():
        size = (_WIDTH_INCHES, sum(heights))
        figure = Figure(figsize=size, dpi=_DPI, facecolor='white', layout='constrained')
        words, *strips = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        title = f'{MAKER}: {summary.get("verdict", "lungs and lesions")}'
        words.text(0.02, 1 - 0.12 / heights[0], title, va='top', fontsize=18, weight='bold', color='black')
        words.text(0.02, 1 - 0.6 / heights[0], '\n'.join(lines), va='top', fontsize=9, color='black')
        if 'verdict' in summary:
            _draw_bars(strips.pop(0), [summary['probabilities'][one] for one in CLASSES])
        for strip, pictures, caption in zip(strips, rows, captions, strict=True):
            _draw_strip(strip, pictures, caption)
        return figure


def _draw_bars(figure: SubFigure, shares: Sequence[float]) -> None:
    axes = figure.subplots()
    axes.barh(CLASSES, shares, color=[COLOURS[one] for one in CLASSES])
    for row, share in enumerate(shares):
        axes.text(min(share, 0.93) + 0.01, row, f'{share:.3f}', va='center', color='black')
    axes.set(xlim=(0, 1), xlabel='Probability')
    axes.invert_yaxis()
    axes.tick_params(colors='black')
    axes.xaxis.label.set_color('black')


def _draw_strip(figure: SubFigure, pictures: Sequence[_Picture], caption: str) -> None:
    [grid] = figure.subplots(1, _COLUMNS, squeeze=False)
    for axes in grid:
        axes.axis('off')
    for axes, picture in zip(grid, pictures, strict=False):
        axes.imshow(picture.image, cmap='gray', vmin=0, vmax=255)
        axes.set_title(picture.title, fontsize=9, color='black')
        if picture.overlay is not None:
            axes.imshow(picture.overlay, cmap='inferno', vmin=0, vmax=1, alpha=0.55)
    figure.suptitle(caption, fontsize=9, weight='bold', color='black')
