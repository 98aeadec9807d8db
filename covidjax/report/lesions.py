"""The report of a lesion model: scores by source, outlines beside the masks, volumes, and limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covidjax.report.charts import create_picture
from covidjax.report.figures import render_volume_errors
from covidjax.report.page import Table, write_page
from covidjax.report.pictures import Example, render_panels
from covidjax.report.sections import Section

# Names of scores in results.json, and what they are.
SCORES = {
    'dice': 'Dice of lesions, mean over slices with lesions',
    'dice_pooled': 'Dice of lesions, over a volume',
    'auc': 'AUC of lesion pixels',
    'auc_in_lungs': 'AUC of lesion pixels inside the outlined lungs',
    'grey_auc_in_lungs': 'the same of plain grey',
    'pointing': 'highest probability lies in a lesion',
    'consolidation_dice': 'Dice of consolidation',
    'lungs_dice': 'Dice of lungs',
    'infected_slices_auc': 'AUC of slices with lesions, in a volume',
    'false_share': 'share of the lungs called lesion, slices without',
}
LOOKALIKES = (
    'Oedema, fibrosis, tumours, atelectasis and lungs that are not filled by a breath look like lesions to this model.'
)


class OutlinedSlice(NamedTuple):
    """A slice to show.

    Attributes:
      name: of the slice.
      image: uint8 [S, S].
      outlined, called: the lesions by the mask and by the model, bool [S, S].
    """

    name: str
    image: np.ndarray
    outlined: np.ndarray
    called: np.ndarray


def write_lesion_report(
    path: Path, results: dict[str, Any], examples: Sequence[OutlinedSlice], further: Sequence[Section]
) -> None:
    """Writes report.html of a lesion model.

    Args:
      path: of the page.
      results: results.json.
      examples: slices with lesions.
      further: sections about the training.
    """
    dice, auc = results['dice'], results['auc']
    headline = (
        f'Dice of lesions {describe(dice)}, area under the ROC curve of their pixels {describe(auc)}, over '
        f'{results["num_lesion_slices"]} slices with lesions of {results["num_patients"]} patients.'
    )
    write_page(
        path,
        'run.html',
        title=f'{results["model"]} on {results["data"]}',
        notice=results['notice'],
        warnings=[],
        headline=headline,
        sections=[build_scores(results), *_build_volumes(results), build_examples(examples), *further, build_limits()],
    )


def describe(score: dict[str, Any]) -> str:
    """Returns e.g. '0.712 [0.650, 0.770]', 'not known' if no slice has what the score needs."""
    if score['mean'] is None:
        return 'not known'
    interval = '' if score['low'] is None else f' [{score["low"]:.3f}, {score["high"]:.3f}]'
    return f'{score["mean"]:.3f}{interval}'


def build_scores(results: dict[str, Any]) -> Section:
    """Returns the section 'scores': every score, of all slices and of each source."""
    groups = {'all': results, **results['sources']}
    rows = [(text, *(describe(group[name]) for group in groups.values())) for name, text in SCORES.items()]
    rows.append(('slices', *(group['num_slices'] for group in groups.values())))
    rows.append(('slices with lesions', *(group['num_lesion_slices'] for group in groups.values())))
    rows.append(('patients', *(group['num_patients'] for group in groups.values())))
    best = results['best']
    text = f'The threshold of the lesion probability is {results["threshold"]:g}, chosen on validation slices.'
    if best is not None:
        text += f' The best one on these slices would be {best["threshold"]:g}, with Dice {describe(best["dice"])}.'
    return Section(
        'scores',
        'Scores',
        [text, Table('Means with 95 % intervals by bootstrap over patients', ('score', *groups), rows)],
    )


def _build_volumes(results: dict[str, Any]) -> list[Section]:
    units = ('percent', 'ml')
    if max(results[f'volume_error_{unit}']['n'] for unit in units) < 2:
        return []
    columns = ('volume', 'outlined, % of the lungs', 'called, %', 'outlined, ml', 'called, ml', 'Dice')
    values = [f'{kind}_{unit}' for unit in units for kind in ('outlined', 'predicted')]
    rows = [(v['name'], *(v[value] for value in values), v['dice']) for v in results['volumes']]
    return [
        Section(
            'volumes',
            'Volumes',
            [
                'Difference of the called and the outlined lesions, against their mean (Bland and Altman 1986). The '
                'lines are the mean difference and the limits of agreement.',
                create_picture(render_volume_errors(results), 'Difference against mean of the lesion volumes'),
                Table('Lesions of each volume', columns, rows),
            ],
        )
    ]


def build_examples(examples: Sequence[OutlinedSlice]) -> Section:
    """Returns the section 'examples': each slice with the mask and with the model's outline."""
    panels = {
        'mask': [Example(shorten(s.name), s.image, s.outlined) for s in examples],
        'model': [Example('', s.image, s.called) for s in examples],
    }
    picture = create_picture(render_panels(panels, 2), 'Slices with the lesions of the mask and of the model')
    return Section('examples', 'Outlines', ['Slices with lesions, spread evenly over the test slices.', picture])


def shorten(name: str) -> str:
    """Returns the end of a long name."""
    return name if len(name) <= 24 else f'...{name[-21:]}'


def build_limits() -> Section:
    """Returns the section 'limits'."""
    return Section(
        'limits',
        'Limits of use',
        [
            'Research use only. This is not a medical device; no output of it may guide the care of a patient.',
            LOOKALIKES,
            'The outlines say where lungs are denser than usual. They do not say of what: COVID-19, another pneumonia '
            'or something else.',
            'The threshold was chosen on the validation slices. Other scanners and other habits of outlining may need '
            'another one.',
        ],
    )
