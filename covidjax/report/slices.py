"""Report sections of a slice run: sample slices, the leading map, evidence, map quality, and mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covidjax.data import covidx_ct
from covidjax.data.lesions import LesionSlice
from covidjax.data.lists import CLASSES
from covidjax.explain import catalogue, scores
from covidjax.explain.evidence import combine_evidence, contrast, scale_signed
from covidjax.explain.maps import explain, segment
from covidjax.models.att2 import Att2
from covidjax.models.lesion_weights import LesionModel
from covidjax.report import figures, pictures
from covidjax.report.charts import create_picture
from covidjax.report.leading import describe_lead, list_margins
from covidjax.report.mistakes import build_mistakes
from covidjax.report.page import Table
from covidjax.report.pictures import Example
from covidjax.report.sections import Section

SAMPLES_PER_CLASS = 4
_NUM_ERASED = 24
_NUM_CHOOSING = 12  # for the leading map by erasure, which classifies each slice hundreds of times


def score_explanations(
    model: Att2,
    variables: Any,
    data: covidx_ct.Prepared,
    slices: Sequence[LesionSlice],
    choosing: Sequence[LesionSlice],
    *,
    lesions: LesionModel | None = None,
    occlusion: bool,
) -> dict[str, Any]:
    """Returns `explanations` of results.json: scores of the maps of the model, and which map leads.

    Args:
      model, variables: the slice model.
      data: holds the validation and test slices; up to 24 test slices are used for the erasure and sanity checks.
      slices: slices with lesion masks; may be empty. Then the leading map is chosen by erasure.
      choosing: other slices with lesion masks to choose the leading map on; see `scores.lead_by_lesions`.
      lesions: the lesion model of the run.
      occlusion: whether to score occlusion maps too, which is a hundred times slower.
    """
    images, patients = _load_some(data, 'test', _NUM_ERASED)
    if slices:
        localisation, lead = scores.lead_by_lesions(
            model, variables, slices, choosing, lesions=lesions, occlusion=occlusion
        )
    else:
        localisation = None
        lead = scores.lead_by_erasure(
            model, variables, images, patients, choosing=_load_some(data, 'val', _NUM_CHOOSING)[0]
        )
    faithfulness = scores.score_faithfulness(model, variables, images, lead['best'], lesions=lesions)
    return {
        'localisation': localisation,
        'leading_map': {**lead, 'erasure': faithfulness.pop('erasure_of_best')},
        **faithfulness,
    }


def _load_some(data: covidx_ct.Prepared, split: str, count: int) -> tuple[np.ndarray, list[str]]:
    """Returns up to `count` slices of a split, evenly over the classes, and their patients."""
    chosen = pictures.choose_examples(data.rows[split], count // len(CLASSES))
    numbers = [i for of_class in chosen.values() for i in of_class]
    images = np.stack([data.sources[split][i]['image'] for i in numbers])
    return images, [data.rows[split][i].patient for i in numbers]


def build_slice_sections(
    model: Att2,
    variables: Any,
    data: covidx_ct.Prepared,
    probabilities: np.ndarray,
    explanations: dict[str, Any],
    lesions: LesionModel | None = None,
) -> list[Section]:
    """Returns the sections 'samples', 'attention', 'evidence', 'worth' and 'mistakes'.

    Args:
      model, variables: the slice model.
      data: holds the N test slices.
      probabilities: of the model, [N, K].
      explanations: from `score_explanations`.
      lesions: the lesion model of the run.
    """
    rows, source = data.rows['test'], data.sources['test']
    chosen = pictures.choose_examples(rows, SAMPLES_PER_CLASS)
    numbers = [i for of_class in chosen.values() for i in of_class]
    images = np.stack([source[i]['image'] for i in numbers])
    explained = explain(model, variables, images, lesions=lesions)
    lead = explanations['leading_map']
    maps = None
    if lead['name'] is not None:
        maps = catalogue.compute_maps(explained, images.shape[1], model.combination)
        maps |= catalogue.restrict(maps, catalogue.find_lungs(images))
    evidence = combine_evidence(explained.evidence, images.shape[1], model.combination)
    files = '; '.join(f'{name}: {", ".join(rows[i].file for i in of_class)}' for name, of_class in chosen.items())
    ends = np.cumsum([len(of_class) for of_class in chosen.values()]).tolist()
    places = {name: range(end - len(chosen[name]), end) for name, end in zip(chosen, ends, strict=True)}
    return [
        _build_samples(places, images, files),
        _build_attention(places, images, maps, lead),
        _build_evidence(places, images, np.asarray(evidence), probabilities[numbers].argmax(1), lead),
        _build_worth(explanations),
        build_mistakes(
            probabilities,
            np.array([row.label for row in rows]),
            [row.patient for row in rows],
            [row.file for row in rows],
            lambda i: source[i]['image'][..., 0],
            what='slice',
            column='file',
            note='At most two per patient. Check these first: each is a wrong label, a slice without a lesion, or a '
            'failure of the model.',
        ),
    ]


def _arrange(places: Mapping[str, range], images: np.ndarray, overlays: np.ndarray | None) -> dict[str, list[Example]]:
    """Returns one panel per class; `places` maps a class to its indices in `images` and `overlays`."""
    return {
        name: [Example('', images[i, ..., 0], None if overlays is None else overlays[i]) for i in of_class]
        for name, of_class in places.items()
    }


def _build_samples(places: Mapping[str, range], images: np.ndarray, files: str) -> Section:
    panels = pictures.render_panels(_arrange(places, images, None), 2)
    return Section(
        'samples',
        'Samples',
        [
            create_picture(panels, 'Four test slices of each class'),
            f'The middle slices of evenly spaced patients in the test list (as Fig. 1 of the paper). {files}.',
        ],
    )


def _build_attention(
    places: Mapping[str, range], images: np.ndarray, maps: Mapping[str, np.ndarray] | None, lead: Mapping[str, Any]
) -> Section:
    parts: list[Any] = [describe_lead(lead), list_margins(lead)]
    if maps is not None:
        shown = maps[lead['name']]
        first = [of_class[0] for of_class in places.values()]
        others = ('attention 1', 'attention 2', 'attention 1 x 2')
        lines = pictures.arrange_maps(
            list(places), images[first], {name: maps[name][first] for name in others if name != lead['name']}
        )
        parts += [
            f'The map {lead["name"]!r}, scaled to the range of each slice, and the region at or above its Otsu '
            'threshold (as Fig. 5 and 7 of the paper, which show attention).',
            create_picture(
                pictures.render_panels(_arrange(places, images, shown), 2, scale=lead['name']),
                'The leading map over four slices of each class',
            ),
            create_picture(
                pictures.render_panels(_arrange(places, images, segment(shown)), 2),
                'Outline of the region that the leading map marks, four slices of each class',
            ),
            'Attention, for comparison: one map per module, whatever the predicted class, and the square root of their '
            'product. The table in "Map quality" says how good these maps are.',
            create_picture(
                pictures.render_maps(lines, scale='scaled to 0..1'),
                'A slice of each class with both attention maps and their product',
            ),
        ]
    return Section('attention', 'Leading map', parts)


def _build_evidence(
    places: Mapping[str, range], images: np.ndarray, evidence: np.ndarray, called: np.ndarray, lead: Mapping[str, Any]
) -> Section:
    first = [of_class[0] for of_class in places.values()]
    shares = contrast(evidence[first], called[first])
    titles = [f'{name}, predicted\n{CLASSES[called[i]]}' for name, i in zip(places, first, strict=True)]
    sums = [
        (name, CLASSES[called[i]], *(float(values[place].sum()) for values in shares.values()))
        for place, (name, i) in enumerate(zip(places, first, strict=True))
    ]
    parts: list[Any] = [
        'The exact share of each pixel in the logits: the shares of all pixels and of both modules add up to the logit '
        'of a class less its bias. It says what the model adds up, not where a lesion is.',
        Table('Sums of the evidence over the slice', ('slice', 'predicted', *shares), sums),
    ]
    if lead['name'] is not None:
        lines = pictures.arrange_maps(
            titles, images[first], {name: scale_signed(values) for name, values in shares.items()}, is_signed=True
        )
        parts += [
            'Red is for a class (or for the first of two), blue against it; each map is divided by its largest value. '
            'Compare classes: a number added to all logits changes no probability.',
            create_picture(
                pictures.render_maps(lines, scale='share in the logit, scaled to -1..1'),
                'A slice of each class with its evidence for the predicted class and between classes',
            ),
        ]
    return Section('evidence', 'Evidence', parts)


def _build_worth(explanations: dict[str, Any]) -> Section:
    parts = []
    localisation = explanations['localisation']
    if localisation is None:
        parts.append(
            'Not scored against lesions: these data have no masks. To score the maps on slices with masks, run '
            '--mode=evaluate --outlines=<folder>.'
        )
    else:
        columns = ['map']
        names = {
            'pointing': 'pointing game',
            'energy_lesion': 'energy inside lesion',
            'energy_lung': 'energy inside lung',
            'auc': 'area under ROC',
            'dice': 'Dice of the region',
        }
        for name in names.values():
            columns += [name, 'interval']
        rows = [
            (name, *(value for key in names for value in (scores[key]['mean'], scores[key]['interval'])))
            for name, scores in localisation['maps'].items()
        ]
        chance = localisation['chance']
        rows.append(('chance (no preference)', *(value for key in names for value in (chance.get(key), None))))
        parts += [
            f'Scored on {localisation["num_slices"]:,} slices of {localisation["num_patients"]:,} patients with '
            'outlined lesions. Pointing game: the highest pixel lies in the lesion. Energy: share of the map inside '
            'the lesion or the lung. Area under ROC: lesion pixels against all others. Evidence of a class is of the '
            'predicted one. A map is worth using only if it beats the last rows, which are controls. Lungs are '
            'segmented by a rule (dark regions inside the body), not by hand.',
            Table('Maps against lesions, 95 % intervals by bootstrap over patients', columns, rows),
        ]
    lead = explanations['leading_map']
    erasure = {lead['best']: lead['erasure']} | explanations['erasure']
    parts += [
        f'Erasure: the probability of the predicted class while the highest pixels of a map are blurred (deletion: for '
        f'a good map it falls early) or restored in the blurred slice (insertion: it rises early). Mean over '
        f'{explanations["num_slices"]} test slices.',
        create_picture(figures.render_erasure_curves(erasure), 'Deletion and insertion curves of each map'),
        Table(
            'Area under the mean curves',
            ('map', 'deletion (lower is better)', 'insertion (higher is better)'),
            [(name, curve['deletion_area'], curve['insertion_area']) for name, curve in erasure.items()],
        ),
        'Sanity check: parameters are shuffled layer by layer, starting at the output. A map that does not change does '
        'not show what was learnt. Shuffling the classifier cannot change class-agnostic attention, and must change '
        'evidence. Shuffling only the '
        'tail is a control: with the additive compatibility of the paper its global feature cancels, so nothing '
        'should change.',
        Table(
            'Rank correlation of the maps with those of the intact model',
            ('shuffled', 'attention 1 x 2', 'evidence', 'largest change of a probability'),
            [(r['shuffled'], r['attention'], r['evidence'], r['changed']) for r in explanations['randomisation']],
        ),
    ]
    return Section('worth', 'Map quality', parts)
