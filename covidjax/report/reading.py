"""The part of a prediction's page on how the scan was read and cropped."""

import datetime
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from covidjax.data.preprocess import Box
from covidjax.data.scan.volume import Volume
from covidjax.report.charts import create_picture, use_style
from covidjax.report.page import Table
from covidjax.report.sections import Section

CROPS = {
    'body': "each slice to the body, the largest region above Otsu's threshold",
    'lungs': 'each slice to the lungs, black outside them',
}


def build_reading(volume: Volume, summary: dict[str, Any], boxes: Sequence[Box]) -> Section:
    """Returns the section 'reading'.

    Args:
      volume: the scan; of its slices the middle one is enough.
      summary: prediction.json.
      boxes: crop boxes of all slices.
    """
    count, reading = summary['input']['num_slices'], summary['reading']
    facts = [
        ('input', volume.name),
        ('sha256', volume.sha256),
        ('kind', volume.kind),
        ('slices', f'{count:,}'),
        *volume.facts,
        ('crop', CROPS[reading['region']]),
        ('written', datetime.datetime.now().astimezone().isoformat(' ', 'minutes')),
        ('seconds', ', '.join(f'{stage} {s:.1f}' for stage, s in summary['seconds'].items())),
    ]
    left, top, right, bottom = boxes[count // 2]
    with use_style():
        figure = Figure(figsize=(3.2, 3.2), layout='constrained')
        axes = figure.subplots()
        axes.imshow(volume.slices[len(volume.slices) // 2], cmap='gray', vmin=0, vmax=255)
        corner, *sides = (left - 0.5, top - 0.5), right - left, bottom - top
        axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor='#ff5a4d', linewidth=1.2))
        axes.axis('off')
    return Section(
        'reading',
        'Input and cropping',
        [
            *(f'{note[0].upper()}{note[1:]}.' for note in reading['notes']),
            Table('Input', ('property', 'value'), facts),
            'The middle slice and its crop box:',
            create_picture(figure, 'The uncropped middle slice with its crop box'),
        ],
    )
