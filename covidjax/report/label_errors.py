"""Pictures and tables of examples whose label is probably wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from covidjax.report import pictures
from covidjax.report.charts import create_picture
from covidjax.report.page import Table
from covidjax.report.sections import Section

NUM_SHOWN = 9  # pictures of each kind
NUM_LISTED = 30
COLUMNS = ('name', 'patient', 'label', 'suggested', 'margin')


def build_label_errors(label_errors: Mapping[str, dict], load_image: Callable[[int], np.ndarray]) -> Section:
    """Returns the section 'labels'.

    Args:
      label_errors: see `label_errors.describe_label_errors`.
      load_image: index of an example -> its slice, uint8 [S, S].
    """
    parts: list[Any] = [
        'Confident learning: an example counts for the most probable class among those whose probability reaches the '
        'mean probability of their own examples. The counts say how many labels of each class are probably another '
        'class. That many are listed, those that the probabilities contradict most. The model did not train on them. A '
        'listed label is a question to a radiologist, not an error: hard cases, and slices without a lesion in a sick '
        'scan, are listed too.'
    ]
    for kind, found in label_errors.items():
        parts.append(describe_count(kind, found))
        suspects = found['suspects']
        if suspects:
            figure = render_suspects(found, load_image)
            parts.append(create_picture(figure, f'The {kind} whose labels are the most suspicious'))
            rows = [[suspect[column] for column in COLUMNS] for suspect in suspects[:NUM_LISTED]]
            parts.append(Table(f'{kind.capitalize()} by margin, the most suspicious first', COLUMNS, rows))
    return Section('labels', 'Labels that may be wrong', parts)


def describe_count(kind: str, found: Mapping[str, Any]) -> str:
    """Returns e.g. '12 of 1,340 slices (0.9%) may have a wrong label.'."""
    count, total = found['num_suspects'], found['num_examples']
    return f'{count:,} of {total:,} {kind} ({count / total:.1%}) may have a wrong label.'


def render_suspects(found: Mapping[str, Any], load_image: Callable[[int], np.ndarray]) -> Figure:
    """Draws the most suspicious examples, each with its label and the suggested class."""
    examples = [
        pictures.Example(f'{s["label"]}, rather\n{s["suggested"]} ({s["margin"]:.2f})', load_image(s['shown']))
        for s in found['suspects'][:NUM_SHOWN]
    ]
    return pictures.render_panels({'': examples}, min(3, len(examples)), width=6 if len(examples) > 1 else 3)
