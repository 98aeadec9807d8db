"""The part of a scan run's report that shows scans: their slices, attention over them, what it is worth, mistakes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from covidjax.data import covidx_ct, phantom
from covidjax.data.lists import CLASSES
from covidjax.data.sequences import NUM_SLICES, Scan, thin_evenly
from covidjax.evaluation.outputs import compute_outputs
from covidjax.explain import localisation
from covidjax.explain.maps import combine_attention
from covidjax.models.att2 import Att2
from covidjax.report import pictures
from covidjax.report.charts import create_picture
from covidjax.report.mistakes import build_mistakes
from covidjax.report.page import Table
from covidjax.report.pictures import Example
from covidjax.report.sections import Section

_COLUMNS, _WIDTH = 4, 10.0


def score_slice_attention(
    scans: Sequence[Scan], data: covidx_ct.Prepared, attention: Sequence[np.ndarray]
) -> dict[str, dict] | None:
    """Returns `localisation.score_slice_attention` of phantoms, whose lesions are known; None of other data.

    Args:
      scans: M test scans.
      data: with the test slices.
      attention: per scan [T].
    """
    rows, masks = data.rows['test'], data.raw_dir / phantom.MASK_FOLDER
    if not masks.is_dir():
        return None
    shows_lesion = [np.array([(masks / rows[record].file).exists() for record in scan.records]) for scan in scans]
    return localisation.score_slice_attention(attention, shows_lesion)


def create_examples(
    extractor: Att2, variables: Any, source: Sequence[dict], scan: Scan, attention_T: np.ndarray
) -> tuple[list[Example], list[Example]]:
    """Returns at most 16 slices of a scan, spread evenly, as they are and under their attention.

    Args:
      extractor, variables: the slice model, whose maps ('attention 1 x 2') are shown.
      source: records of the split.
      scan: T slices.
      attention_T: of the sequence model; the highest of those shown keeps the strength of its map.
    """
    thinned = thin_evenly(scan, NUM_SLICES) if len(scan.records) > NUM_SLICES else scan
    weights = np.array([attention_T[scan.records.index(record)] for record in thinned.records])
    images = np.stack([source[record]['image'] for record in thinned.records])
    attention = compute_outputs(extractor, variables, images).attention
    overlays = combine_attention(attention, images.shape[1]) * (weights / weights.max())[:, None, None]
    shown = list(zip(thinned.slices, weights, images[..., 0], overlays, strict=True))
    return (
        [Example(str(index), image) for index, _, image, _ in shown],
        [Example(f'{index}: {weight:.3f}', image, overlay) for index, weight, image, overlay in shown],
    )


def build_scan_sections(
    extractor: Att2,
    variables: Any,
    data: covidx_ct.Prepared,
    scans: Sequence[Scan],
    probabilities: np.ndarray,
    attention: Sequence[np.ndarray],
    slice_attention: dict[str, dict] | None,
) -> list[Section]:
    """Returns the sections.

    Args:
      extractor, variables: the slice model.
      data: with the test slices.
      scans: M test scans.
      probabilities: of the sequence model, [M, K].
      attention: per scan [T].
      slice_attention: of `score_slice_attention`, None where no lesions are known.
    """
    source = data.sources['test']
    shown = {}
    for label, name in enumerate(CLASSES):
        of_class = [number for number, scan in enumerate(scans) if scan.label == label]
        if of_class:
            shown[name] = of_class[len(of_class) // 2]
    plain, weighted = {}, {}
    for name, number in shown.items():
        title = f'{name}, called {CLASSES[probabilities[number].argmax()]}'
        plain[title], weighted[title] = create_examples(extractor, variables, source, scans[number], attention[number])
    names = ', '.join(scans[number].scan for number in shown.values())
    samples = Section(
        'samples',
        'Scans',
        [
            f'The middle scan of each class in the test list, {names}: up to 16 slices spread evenly from first to '
            'last, with their numbers (as Fig. 2 of the paper).',
            create_picture(pictures.render_panels(plain, _COLUMNS, width=_WIDTH), 'Slices of a scan of each class'),
        ],
    )
    parts = [
        'The maps of both attention modules of the slice model, weighted by the attention of the sequence model to the '
        'slice (as Fig. 6 of the paper). Above a slice: its number and its attention, which sums to 1 over the scan.',
        create_picture(
            pictures.render_panels(weighted, _COLUMNS, scale='attention 1 x 2 of a slice, weighted', width=_WIDTH),
            'The same slices with attention maps, weighted by the attention to the slice',
        ),
    ]
    if slice_attention is None:
        parts.append('Not scored against infected slices: these data do not tell which slices show a lesion.')
    else:
        rows = [
            (what, score['mean'], score['interval'], score['number'])
            for what, score in (
                ('area under ROC: slices with a lesion above those without (chance 0.5)', slice_attention['auc']),
                *(
                    (f'{text} of {k} {"slice" if k == 1 else "slices"}', slice_attention[f'{key}@{k}'])
                    for k in localisation.TOP_K
                    for key, text in (
                        ('hit', 'a lesion among the highest'),
                        ('chance', 'the same for a random choice'),
                    )
                ),
            )
        ]
        parts += [
            'Does attention find the slices that show a lesion? Only scans with both kinds of slices can tell.',
            Table('Attention over slices', ('score', 'mean over scans', 'interval', 'scans'), rows),
        ]

    def load_image(number: int) -> np.ndarray:
        return source[scans[number].records[int(attention[number].argmax())]]['image'][..., 0]

    return [
        samples,
        Section('attention', 'Which slices the model looks at', parts),
        build_mistakes(
            probabilities,
            np.array([scan.label for scan in scans]),
            [scan.patient for scan in scans],
            [scan.scan for scan in scans],
            load_image,
            what='scan',
            column='scan',
            note='Of each scan, the slice with the highest attention.',
        ),
    ]
