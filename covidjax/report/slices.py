"""Report sections of a slice run: sample slices, attention maps, map quality, and mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covidjax.data import covidx_ct
from covidjax.data.lesions import LesionSlice
from covidjax.data.lists import CLASSES
from covidjax.explain import scores
from covidjax.explain.maps import explain, segment
from covidjax.models.att2 import Att2
from covidjax.report import figures, pictures
from covidjax.report.charts import create_picture
from covidjax.report.mistakes import build_mistakes
from covidjax.report.page import Table
from covidjax.report.pictures import Example
from covidjax.report.sections import Section

SAMPLES_PER_CLASS = 4
_NUM_ERASED = 24


def score_explanations(
    model: Att2, variables: Any, data: covidx_ct.Prepared, slices: Sequence[LesionSlice], *, occlusion: bool
) -> dict[str, Any]:
    """Returns `explanations` of results.json: scores of the maps of the model.

    Args:
      model, variables: the slice model.
      data: holds the test slices; up to 24 of them are used for the erasure and sanity checks.
      slices: slices with lesion masks; may be empty.
      occlusion: whether to score occlusion maps too, which is a hundred times slower.
    """
    chosen = pictures.choose_examples(data.rows['test'], _NUM_ERASED // len(CLASSES))
    images = np.stack([data.sources['test'][i]['image'] for numbers in chosen.values() for i in numbers])
    return {
        'localisation': scores.score_localisation(model, variables, slices, occlusion=occlusion) if slices else None,
        **scores.score_faithfulness(model, variables, images),
    }


def build_slice_sections(
    model: Att2,
    variables: Any,
    data: covidx_ct.Prepared,
    probabilities: np.ndarray,
    slices: Sequence[LesionSlice],
    explanations: dict[str, Any],
) -> list[Section]:
    """Returns the sections 'samples', 'attention', 'worth' and 'mistakes'.

    Args:
      model, variables: the slice model.
      data: holds the N test slices.
      probabilities: of the model, [N, K].
      slices: slices with lesion masks; may be empty.
      explanations: from `score_explanations`.
    """
    rows, source = data.rows['test'], data.sources['test']
    chosen = pictures.choose_examples(rows, SAMPLES_PER_CLASS)
    numbers = [i for of_class in chosen.values() for i in of_class]
    images = np.stack([source[i]['image'] for i in numbers])
    called = probabilities[numbers].argmax(1)
    maps = scores.compute_maps(explain(model, variables, images, called), images.shape[1])
    files = '; '.join(f'{name}: {", ".join(rows[i].file for i in of_class)}' for name, of_class in chosen.items())
    ends = np.cumsum([len(of_class) for of_class in chosen.values()]).tolist()
    places = {name: range(end - len(chosen[name]), end) for name, end in zip(chosen, ends, strict=True)}
    return [
        _build_samples(places, images, files),
        _build_attention(places, images, maps, called),
        _build_worth(slices, maps, explanations),
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
    places: Mapping[str, range], images: np.ndarray, maps: Mapping[str, np.ndarray], called: np.ndarray
) -> Section:
    regions = _arrange(places, images, segment(maps['attention 1 x 2']))
    first = [of_class[0] for of_class in places.values()]
    lines = pictures.arrange_maps(
        [f'{name}, predicted\n{CLASSES[called[i]]}' for name, i in zip(places, first, strict=True)],
        images[first],
        {kind: maps[kind][first] for kind in ('attention 1', 'attention 2', 'attention 1 x 2', 'Grad-CAM')},
    )
    return Section(
        'attention',
        'Attention maps',
        [
            'Attention is class-agnostic: each module has one map, whatever the predicted class. Module 1 has a finer '
            'grid than module 2. Each map is scaled to its own range (as Fig. 5 of the paper).',
            *(
                create_picture(
                    pictures.render_panels(_arrange(places, images, maps[kind]), 2, scale=kind),
                    f'Attention of module {module} over four slices of each class',
                )
                for module, kind in ((1, 'attention 1'), (2, 'attention 2'))
            ),
            'Both modules combined: the square root of the product of their maps. The outline is the region at or '
            'above its Otsu threshold (as Fig. 7 of the paper).',
            create_picture(
                pictures.render_panels(regions, 2),
                'Outline of the region that both modules attend to, four slices of each class',
            ),
            'Grad-CAM, for comparison, depends on the class: here the predicted one.',
            create_picture(
                pictures.render_maps(lines, scale='scaled to 0..1'),
                'A slice of each class with both attention maps, their product and Grad-CAM',
            ),
        ],
    )


def _build_worth(slices: Sequence[LesionSlice], maps: dict, explanations: dict[str, Any]) -> Section:
    parts = []
    localisation = explanations['localisation']
    if localisation is None:
        parts.append(
            'Not scored against lesions: these data have no masks. To score the maps on slices with masks, run '
            '--mode=evaluate --lesions=<folder>.'
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
            'the lesion or the lung. Area under ROC: lesion pixels against all others. Grad-CAM is of the true class. '
            'A map is worth using only if it beats the last three rows, which are controls. Lungs are segmented by a '
            'rule (dark regions inside the body), not by hand.',
            Table('Maps against lesions, 95 % intervals by bootstrap over patients', columns, rows),
        ]
    erasure = explanations['erasure']
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
        'not show what was learnt. Shuffling the classifier cannot change class-agnostic attention. Shuffling only the '
        'tail is a control: with the additive compatibility of the paper its global feature cancels, so nothing '
        'should change.',
        Table(
            'Rank correlation of the maps with those of the intact model',
            ('shuffled', 'attention 1 x 2', 'Grad-CAM', 'largest change of a probability'),
            [(r['shuffled'], r['attention'], r['grad_cam'], r['changed']) for r in explanations['randomisation']],
        ),
    ]
    return Section('worth', 'Map quality', parts)
