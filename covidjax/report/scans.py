"""Report sections of a scan run: sample scans, attention over slices with its scores, and mistakes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from covidjax.data import covidx_ct, phantom
from covidjax.data.lists import CLASSES
from covidjax.data.sequences import NUM_SLICES, Scan, thin_evenly
from covidjax.explain import catalogue, localisation
from covidjax.explain.maps import explain
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
    """Returns `localisation.score_slice_attention` for phantoms, whose lesions are known; None for other data.

    Args:
      scans: the M test scans.
      data: holds the test slices.
      attention: one array [T] per scan.
    """
    rows, masks = data.rows['test'], data.raw_dir / phantom.MASK_FOLDER
    if not masks.is_dir():
        return None
    shows_lesion = [np.array([(masks / rows[record].file).exists() for record in scan.records]) for scan in scans]
    return localisation.score_slice_attention(attention, shows_lesion)


def create_examples(
    extractor: Att2,
    variables: Any,
    source: Sequence[dict],
    scan: Scan,
    attention_T: np.ndarray,
    shown_map: str | None = 'attention 1 x 2',
) -> tuple[list[Example], list[Example]]:
    """Returns up to 16 evenly spaced slices of a scan: plain, and overlaid with maps.

    Args:
      extractor, variables: the slice model, whose maps are shown.
      source: records of the split.
      scan: a scan of T slices.
      attention_T: of the sequence model. It scales the maps, relative to the highest weight shown.
      shown_map: a name of `catalogue.compute_maps`, or None for no map.
    """
    thinned = thin_evenly(scan, NUM_SLICES) if len(scan.records) > NUM_SLICES else scan
    weights = np.array([attention_T[scan.records.index(record)] for record in thinned.records])
    images = np.stack([source[record]['image'] for record in thinned.records])
    overlays = [None] * len(images)
    if shown_map is not None:
        explained = explain(extractor, variables, images)
        maps = catalogue.compute_map(shown_map, explained, images[..., 0], extractor.combination)
        overlays = maps * (weights / weights.max())[:, None, None]
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
    slice_evidence: dict[str, dict[str, dict]] | None,
    shown_map: str | None,
) -> list[Section]:
    """Returns the sections 'samples', 'attention' and 'mistakes'.

    Args:
      extractor, variables: the slice model.
      data: holds the test slices.
      scans: the M test scans.
      probabilities: of the sequence model, [M, K].
      attention: one array [T] per scan.
      slice_attention: from `score_slice_attention`; None if lesions are unknown.
      slice_evidence: the same scores for the evidence of the slices, by compared classes.
      shown_map: see `create_examples`.
    """
    source = data.sources['test']
    shown = {}
    for label, name in enumerate(CLASSES):
        of_class = [number for number, scan in enumerate(scans) if scan.label == label]
        if of_class:
            shown[name] = of_class[len(of_class) // 2]
    plain, weighted = {}, {}
    for name, number in shown.items():
        title = f'{name}, predicted {CLASSES[probabilities[number].argmax()]}'
        plain[title], weighted[title] = create_examples(
            extractor, variables, source, scans[number], attention[number], shown_map
        )
    names = ', '.join(scans[number].scan for number in shown.values())
    samples = Section(
        'samples',
        'Sample scans',
        [
            f'The middle scan of each class in the test list: {names}. Up to 16 evenly spaced slices from first to '
            'last, with their numbers (as Fig. 2 of the paper).',
            create_picture(pictures.render_panels(plain, _COLUMNS, width=_WIDTH), 'Slices of a scan of each class'),
        ],
    )
    parts = [
        'Above each slice: its number and its attention, which sums to 1 over the scan.'
        + (
            ' No map is shown: none of the slice model beats chance.'
            if shown_map is None
            else f' The map {shown_map!r} of the slice model is weighted by this attention (as Fig. 6 of the paper, '
            'which shows attention).'
        ),
        create_picture(
            pictures.render_panels(
                weighted, _COLUMNS, scale='' if shown_map is None else 'map of a slice, weighted', width=_WIDTH
            ),
            'The same slices with maps, weighted by the attention to the slice',
        ),
    ]
    if slice_attention is None:
        parts.append('Not scored: these data do not say which slices show a lesion.')
    else:
        parts += [
            'How well attention and evidence detect the slices with a lesion, over the scans that have slices with and '
            'without one. The evidence of a slice is its exact share in the logits of the scan.',
            _list_slice_scores('Attention over slices', slice_attention),
            *(
                _list_slice_scores(f'Evidence of slices, {compared}', of_class)
                for compared, of_class in slice_evidence.items()
            ),
        ]

    def load_image(number: int) -> np.ndarray:
        return source[scans[number].records[int(attention[number].argmax())]]['image'][..., 0]

    return [
        samples,
        Section('attention', 'Attention over slices', parts),
        build_mistakes(
            probabilities,
            np.array([scan.label for scan in scans]),
            [scan.patient for scan in scans],
            [scan.scan for scan in scans],
            load_image,
            what='scan',
            column='scan',
            note='Shown: the slice with the highest attention of each scan.',
        ),
    ]


def _list_slice_scores(title: str, scores: dict[str, dict]) -> Table:
    rows = [
        (what, score['mean'], score['interval'], score['number'])
        for what, score in (
            ('area under ROC, slices with a lesion against those without (chance 0.5)', scores['auc']),
            *(
                (f'{text} of {k} {"slice" if k == 1 else "slices"}', scores[f'{key}@{k}'])
                for k in localisation.TOP_K
                for key, text in (('hit', 'lesion among the highest'), ('chance', 'the same for a random choice'))
            ),
        )
    ]
    return Table(title, ('score', 'mean over scans', 'interval', 'scans'), rows)
