"""The part of a prediction's page on how the scan was read and cropped."""

import datetime
from collections.abc import Sequence
from typing import Any

from covidjax.data.preprocess import Box
from covidjax.data.scan.volume import Volume
from covidjax.report.page import Table
from covidjax.report.sections import Section
from covidjax.report.tiles import draw_box

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
    picture = draw_box(
        volume.slices[len(volume.slices) // 2],
        boxes[count // 2],
        'The uncropped middle slice with its crop box',
    )
    return Section(
        'reading',
        'Input and cropping',
        [
            *(f'{note[0].upper()}{note[1:]}.' for note in reading['notes']),
            Table('Input', ('property', 'value'), facts),
            'The middle slice and its crop box:',
            picture,
        ],
    )
