"""Ablation of the attention: variants trained with equal budget and seeds, compared by accuracy, AUC and localisation.

Shapes: M seeds, N slices of the test split, L slices with a lesion, K classes, S side of a slice, P patients, R
resamples of the patients.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from covidjax.data import covidx_ct
from covidjax.data.lesions import LesionSlice, read_phantom_lesions
from covidjax.data.lists import Row
from covidjax.evaluation.metrics import draw_resamples, group_by_patient
from covidjax.evaluation.over_seeds import Estimate, average, estimate_auc, estimate_mean, subtract, summarise
from covidjax.evaluation.patient_level import compute_patient_scores
from covidjax.evaluation.predictions import softmax
from covidjax.experiment import common, slices
from covidjax.experiment.config import check_config, flatten_config
from covidjax.experiment.workdir import lock_workdir
from covidjax.explain import localisation
from covidjax.explain.maps import combine_attention, explain
from covidjax.files import replace_file, write_json
from covidjax.training.checkpoints import open_checkpoints

REFERENCE = 'additive-concat'  # the paper's variant; if absent, differences are taken to the first variant
_TITLES = {
    'accuracy': 'accuracy',
    'auc': 'AUC',
    'auc_covid19_pneumonia': 'AUC, COVID-19 against pneumonia, per patient',
    'pointing': 'pointing game',
    'energy': 'energy in lesion',
    'map_auc': 'map AUC',
}
_SCORES = {
    'pointing': localisation.compute_pointing,
    'energy': localisation.compute_energy,
    'map_auc': localisation.compute_rank_auc,
}

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Predictions and localisation scores of one variant on the test slices: M runs, one per seed.

    Attributes:
      probabilities: [M, N, K].
      localisation: [M, L] by name in `_SCORES`, for the combined attention map on slices with a lesion.
    """

    probabilities: np.ndarray
    localisation: dict[str, np.ndarray]


def create_config(base: ConfigDict, compatibility: str, combination: str, seed: int) -> ConfigDict:
    """Returns the config of one run."""
    config = base.copy_and_resolve_references().unlock()
    config.seed = seed
    config.model.compatibility, config.model.combination = compatibility, combination
    return config.lock()


def predict(config: ConfigDict, data: covidx_ct.Prepared, workdir: Path, lesions: Sequence[LesionSlice]) -> Outcome:
    """Returns the outcome of one finished run, with M = 1."""
    model = slices.create_model(config.model)
    with open_checkpoints(workdir) as checkpoints:
        variables = slices.restore_best(config, checkpoints)
    logits = slices.create_predictor(model, data, config.train.batch_size)(variables, 'test')
    scores = {}
    if lesions:
        explained = explain(model, variables, np.stack([s.image for s in lesions]))
        scores = score_maps(combine_attention(explained.attention, config.data.image_size), lesions)
    return Outcome(softmax(logits)[np.newaxis], {name: values[np.newaxis] for name, values in scores.items()})


def score_maps(maps: Sequence[np.ndarray], lesions: Sequence[LesionSlice]) -> dict[str, np.ndarray]:
    """Returns the localisation scores of maps [S, S]: float [L] by name in `_SCORES`."""
    return {
        name: np.array([score(m, s.lesion) for m, s in zip(maps, lesions, strict=True)], float)
        for name, score in _SCORES.items()
    }


def estimate(
    outcome: Outcome, rows: Sequence[Row], lesions: Sequence[LesionSlice], resamples_RxP: np.ndarray
) -> dict[str, Estimate]:
    """Returns the metrics of one variant.

    Returns:
      'accuracy' per slice; 'auc', the mean one-vs-rest AUC over the classes present (with two classes, their AUC);
      'auc_covid19_pneumonia' per patient if both classes are present; the scores of `_SCORES` if there are lesions.
    """
    labels = np.array([row.label for row in rows])
    patients = [row.patient for row in rows]
    groups = group_by_patient(patients)
    p = outcome.probabilities
    figures = {'accuracy': estimate_mean((p.argmax(-1) == labels).astype(float), groups, resamples_RxP)}

    present = np.unique(labels)
    if len(present) == 2:
        low, high = present
        figures['auc'] = estimate_auc(p[..., high] - p[..., low], labels == high, groups, resamples_RxP)
    elif len(present) > 2:
        figures['auc'] = average([estimate_auc(p[..., k], labels == k, groups, resamples_RxP) for k in present])

    by_run = [compute_patient_scores(one, labels, patients) for one in p]
    _, is_covid19, names = by_run[0]
    if is_covid19.any() and not is_covid19.all():
        number = dict(zip(patients, groups, strict=True))
        figures['auc_covid19_pneumonia'] = estimate_auc(
            np.stack([scores for scores, _, _ in by_run]),
            is_covid19,
            np.array([number[name] for name in names]),
            resamples_RxP,
        )

    lesion_groups = _number_patients(rows, lesions)
    for name, values in outcome.localisation.items():
        figures[name] = estimate_mean(values, lesion_groups, resamples_RxP)
    return figures


def _number_patients(rows: Sequence[Row], lesions: Sequence[LesionSlice]) -> np.ndarray:
    """Returns the patient index of each lesion, as numbered by `group_by_patient`, int [L]."""
    patients = [row.patient for row in rows]
    number = dict(zip(patients, group_by_patient(patients).tolist(), strict=True))
    return np.array([number[s.patient] for s in lesions], int)


def estimate_references(
    rows: Sequence[Row], lesions: Sequence[LesionSlice], resamples_RxP: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Returns the localisation scores of two maps that ignore the slice: a flat one and a centred one."""
    if not lesions:
        return {}
    size, groups = lesions[0].lesion.shape[0], _number_patients(rows, lesions)
    maps = {'flat map (chance)': np.ones((size, size)), 'centre': localisation.create_centre_map(size)}
    return {
        name: {
            score: estimate_mean(values[np.newaxis], groups, resamples_RxP)
            for score, values in score_maps([one] * len(lesions), lesions).items()
        }
        for name, one in maps.items()
    }


def format_cell(summary: dict[str, Any] | None) -> str:
    """Returns e.g. '0.865 [0.851, 0.879] [0.827, 0.899]': mean, interval over seeds, interval over patients."""
    if summary is None:
        return ''
    intervals = (summary['over_seeds'], summary['over_patients'])
    return ' '.join([f'{summary["mean"]:.3f}', *(f'[{i[0]:.3f}, {i[1]:.3f}]' if i else '[-]' for i in intervals)])


def format_table(by_row: dict[str, dict[str, Any]]) -> str:
    """Returns a markdown table with one row per variant; columns without any value are left out."""
    columns = [name for name in _TITLES if any(name in row for row in by_row.values())]
    lines = ['| | ' + ' | '.join(_TITLES[name] for name in columns) + ' |', '|---' * (len(columns) + 1) + '|']
    for row, summaries in by_row.items():
        lines.append(f'| {row} | ' + ' | '.join(format_cell(summaries.get(name)) for name in columns) + ' |')
    return '\n'.join(lines)


def format_report(comparison: dict[str, Any]) -> str:
    """Returns the content of ablation.md."""
    counts = comparison['test']
    lines = [
        '# Ablation of the attention',
        '',
        f'Seeds {", ".join(map(str, comparison["seeds"]))}, equal budget, best epoch by validation loss. Test split: '
        f'{counts["slices"]:,} slices of {counts["patients"]} patients, {counts["lesion_slices"]:,} of them with a '
        'known lesion. Each cell: mean over the seeds, 95 % interval over seeds (Student), 95 % interval over patients '
        '(bootstrap). Localisation is scored on the geometric mean of both attention maps.',
        *([f'Data: {comparison["notice"]}.'] if comparison['notice'] else []),
        '',
        format_table({**comparison['variants'], **comparison['references']}),
        '',
    ]
    if comparison['differences']:
        lines += [f'Difference to {comparison["reference"]}, paired by seed and patient:', '']
        lines += [format_table(comparison['differences']), '']
    return '\n'.join(lines)


def compare(
    base: ConfigDict, seeds: Sequence[int], compatibilities: Sequence[str], combinations: Sequence[str], output: Path
) -> dict[str, Any]:
    """Trains the missing runs, compares all runs and writes ablation.json and ablation.md.

    Args:
      base: config of the slice experiment; each run replaces its seed, compatibility and combination.
      seeds, compatibilities, combinations: every triple of them is one run.
      output: created if absent; the workdir of a run is <output>/<compatibility>-<combination>/seed<seed>.

    Returns:
      The content of ablation.json. 'variants' has a dict of `over_seeds.summarise` by variant and metric (see
      `estimate`), 'references' the same for baselines that ignore the slice, 'differences' the same relative to the
      variant 'reference'.

    Raises:
      UserError: bad config, data or folder.
    """
    variants = [f'{compatibility}-{combination}' for compatibility in compatibilities for combination in combinations]
    runs = {(variant, seed): create_config(base, *variant.split('-'), seed) for variant in variants for seed in seeds}
    for config in runs.values():
        check_config(config)
    outcomes = {}
    with lock_workdir(output):
        data = common.load_data(base.data, output)
        rows = data.rows['test']
        lesions = read_phantom_lesions(
            data.raw_dir, rows, base.data.image_size, base.data.region
        )  # none where there are no masks
        for i, ((variant, seed), config) in enumerate(runs.items(), start=1):
            workdir = output / variant / f'seed{seed}'
            log.info('run %d of %d: %s', i, len(runs), workdir)
            baselines = slices.train(config, workdir, data)['baselines']  # the same in all runs
            outcomes[variant, seed] = predict(config, data, workdir, lesions)

    resamples = draw_resamples(len({row.patient for row in rows}), seed=0)
    figures = {}
    for variant in variants:
        parts = [outcomes[variant, seed] for seed in seeds]
        outcome = Outcome(
            np.concatenate([part.probabilities for part in parts]),
            {name: np.concatenate([part.localisation[name] for part in parts]) for name in parts[0].localisation},
        )
        figures[variant] = estimate(outcome, rows, lesions, resamples)
    reference = REFERENCE if REFERENCE in figures else variants[0]

    def summarise_all(by_name: dict[str, Estimate]) -> dict[str, Any]:
        return {name: summarise(one) for name, one in by_name.items()}

    comparison = {
        'config': flatten_config(base),
        'notice': common.PHANTOM_NOTICE if not base.data.raw_dir else '',
        'environment': common.describe_environment(),
        'seeds': list(seeds),
        'test': {
            'slices': len(rows),
            'patients': resamples.shape[1],
            'lesion_slices': len(lesions),
            'classes': common.count_classes([row.label for row in rows]),
        },
        'variants': {variant: summarise_all(by_name) for variant, by_name in figures.items()},
        'references': {
            **{name: summarise_all(by_name) for name, by_name in estimate_references(rows, lesions, resamples).items()},
            **{
                name: {
                    'accuracy': {
                        'mean': one['accuracy'],
                        'over_seeds': None,
                        'over_patients': one['intervals']['accuracy'],
                    }
                }
                for name, one in baselines.items()
            },
        },
        'reference': reference,
        'differences': {
            variant: summarise_all({name: subtract(one, figures[reference][name]) for name, one in by_name.items()})
            for variant, by_name in figures.items()
            if variant != reference
        },
    }
    write_json(output / 'ablation.json', comparison)
    with replace_file(output / 'ablation.md') as temporary:
        temporary.write_text(format_report(comparison))
    return comparison
