"""Every kind of attention trained with the same budget and seeds, and compared in accuracy, AUC and where it looks.

Shapes: M seeds, N slices of the test split, L of them with a lesion mask, K classes, S side of a slice, P patients, R
resamples of them.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from covidjax import experiment, slice_experiment
from covidjax.data import covidx_ct, phantom
from covidjax.data.lists import Row
from covidjax.data.loader import load_eval_batches
from covidjax.data.preprocess import load_slice
from covidjax.evaluation import localisation
from covidjax.evaluation.metrics import draw_resamples, group_by_patient
from covidjax.evaluation.over_seeds import Estimate, average, estimate_auc, estimate_mean, subtract, summarise
from covidjax.evaluation.patient_level import compute_patient_scores
from covidjax.evaluation.predictions import softmax
from covidjax.files import replace_file, write_json
from covidjax.models.att2 import Att2, Att2Outputs, normalise
from covidjax.training.checkpoints import open_checkpoints
from covidjax.training.config import check_config, flatten_config
from covidjax.training.workdir import lock_workdir

REFERENCE = 'additive-concat'  # the paper's; differences are taken from it, or from the first variant without it
_TITLES = {
    'accuracy': 'accuracy',
    'auc': 'AUC',
    'auc_covid19_pneumonia': 'AUC, COVID-19 against pneumonia, per patient',
    'combined/pointing': 'pointing game',
    'combined/energy': 'energy in lesion',
    'combined/auc': 'map AUC',
}

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What the runs of one variant make of the N test slices, M runs with a seed each.

    Attributes:
      probabilities: [M, N, K].
      maps: per module float32 [M, L, h, w], of the L slices with a lesion mask.
    """

    probabilities: np.ndarray
    maps: list[np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Att2, variables: dict[str, Any], batch: dict[str, jax.Array]) -> Att2Outputs:
    return model.apply(variables, normalise(batch['image']), train=False)


def create_config(base: ConfigDict, compatibility: str, combination: str, seed: int) -> ConfigDict:
    """Returns the config of one run."""
    config = base.copy_and_resolve_references().unlock()
    config.seed = seed
    config.model.compatibility, config.model.combination = compatibility, combination
    return config.lock()


def load_masks(raw_dir: Path, rows: Sequence[Row], size: int) -> dict[int, np.ndarray]:
    """Returns bool masks [S, S] in the frame of the prepared slices, by number of the row, where they show a lesion."""
    masks = {}
    for i, row in enumerate(rows):
        path = raw_dir / phantom.MASK_FOLDER / row.file
        if path.exists():
            mask = load_slice(str(path), row.box, size) >= 128
            if mask.any() and not mask.all():
                masks[i] = mask
    return masks


def predict(config: ConfigDict, data: covidx_ct.Prepared, workdir: Path, chosen: Sequence[int]) -> Outcome:
    """Returns the outcome of one finished run (M is 1); `chosen` are the slices whose maps are kept."""
    with open_checkpoints(workdir) as checkpoints:
        variables = slice_experiment.restore_best(config, checkpoints)
    model = slice_experiment.create_model(config.model)
    logits, maps = [], []
    for batch in load_eval_batches(data.sources['test'], batch_size=config.train.batch_size):
        outputs = jax.device_get(_apply(model, variables, batch))
        real = batch['mask'] > 0
        logits.append(outputs.logits[real])
        keep = real & np.isin(batch['index'], chosen)
        maps.append([attention[keep] for attention in outputs.attention])
    return Outcome(
        softmax(np.concatenate(logits))[None], [np.concatenate(module)[None] for module in zip(*maps, strict=True)]
    )


def score_maps(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each localisation score of each slice, float [L], of maps [S, S]."""
    scores = [localisation.compute_localisation(one, mask) for one, mask in zip(maps, masks, strict=True)]
    return {name: np.array([score[name] for score in scores], float) for name in localisation.SCORES}


def estimate(
    outcome: Outcome, rows: Sequence[Row], masks: dict[int, np.ndarray], resamples_RxP: np.ndarray
) -> dict[str, Estimate]:
    """Returns the figures of one variant.

    Returns:
      'accuracy' of slices; 'auc', the mean over the classes of one against the rest, or of the two there are; where
      both are there, 'auc_covid19_pneumonia' per patient; and, where there are masks, '<map>/<score>' of every map.
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

    if masks:
        size = next(iter(masks.values())).shape[0]
        lesion_groups = groups[list(masks)]
        for name, enlarge in {
            'attention1': lambda maps: localisation.upsample_maps(maps[0], size),
            'attention2': lambda maps: localisation.upsample_maps(maps[1], size),
            'combined': lambda maps: localisation.combine_maps(maps, size),
        }.items():
            runs = [score_maps(enlarge([m[i] for m in outcome.maps]), list(masks.values())) for i in range(len(p))]
            for score in localisation.SCORES:
                values = np.stack([run[score] for run in runs])
                figures[f'{name}/{score}'] = estimate_mean(values, lesion_groups, resamples_RxP)
    return figures


def estimate_references(
    rows: Sequence[Row], masks: dict[int, np.ndarray], resamples_RxP: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Returns the localisation of maps that know nothing of the slice: a flat one and one about the centre."""
    if not masks:
        return {}
    size = next(iter(masks.values())).shape[0]
    groups = group_by_patient([row.patient for row in rows])[list(masks)]
    references = {}
    for name, one in {
        'flat map (chance)': np.ones((size, size)),
        'centre': localisation.create_centre_map(size),
    }.items():
        scores = score_maps([one] * len(masks), list(masks.values()))
        references[name] = {
            f'combined/{score}': estimate_mean(values[None], groups, resamples_RxP) for score, values in scores.items()
        }
    return references


def format_cell(summary: dict[str, Any] | None) -> str:
    """Returns e.g. '0.865 [0.851, 0.879] [0.827, 0.899]': mean, interval over seeds, interval over patients."""
    if summary is None:
        return ''
    intervals = (summary['over_seeds'], summary['over_patients'])
    return ' '.join([f'{summary["mean"]:.3f}', *(f'[{i[0]:.3f}, {i[1]:.3f}]' if i else '[-]' for i in intervals)])


def format_table(by_row: dict[str, dict[str, Any]]) -> str:
    """Returns a markdown table, a row per variant, of those columns that any row has."""
    columns = [name for name in _TITLES if any(name in row for row in by_row.values())]
    lines = ['| | ' + ' | '.join(_TITLES[name] for name in columns) + ' |', '|---' * (len(columns) + 1) + '|']
    for row, summaries in by_row.items():
        lines.append(f'| {row} | ' + ' | '.join(format_cell(summaries.get(name)) for name in columns) + ' |')
    return '\n'.join(lines)


def format_report(comparison: dict[str, Any]) -> str:
    """Returns the comparison as markdown."""
    counts = comparison['test']
    lines = [
        '# Ablation of the attention',
        '',
        f'Seeds {", ".join(map(str, comparison["seeds"]))}, equal budget, best epoch by validation loss. Test split: '
        f'{counts["slices"]:,} slices of {counts["patients"]} patients, {counts["lesion_slices"]:,} of them with a '
        'lesion mask. Each cell: mean over the seeds, 95 % interval over seeds (Student), 95 % interval over patients '
        '(bootstrap). Localisation is that of the geometric mean of both attention maps.',
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
    """Trains what is missing, compares all runs and writes ablation.json and ablation.md.

    Args:
      base: config of the slice experiment; its seed, compatibility and combination are those of no run.
      seeds, compatibilities, combinations: every triple of them is a run.
      output: created if absent; the workdir of a run is <output>/<compatibility>-<combination>/seed<seed>.

    Returns:
      The content of ablation.json: by variant and figure (see `estimate`) the dicts of `over_seeds.summarise`, the same
      for 'references' that know nothing of the slice, and the 'differences' to one variant.

    Raises:
      UserError: bad config, data or folder.
    """
    variants = [f'{compatibility}-{combination}' for compatibility in compatibilities for combination in combinations]
    runs = {(variant, seed): create_config(base, *variant.split('-'), seed) for variant in variants for seed in seeds}
    for config in runs.values():
        check_config(config)
    outcomes = {}
    with lock_workdir(output):
        data = experiment.load_data(base.data, output)
        rows = data.rows['test']
        raw_dir = Path(base.data.raw_dir).expanduser() if base.data.raw_dir else output / 'phantoms'
        masks = load_masks(raw_dir, rows, base.data.image_size)
        for i, ((variant, seed), config) in enumerate(runs.items(), start=1):
            workdir = output / variant / f'seed{seed}'
            log.info('run %d of %d: %s', i, len(runs), workdir)
            baselines = slice_experiment.train(config, workdir, data)['baselines']  # the same in all runs
            outcomes[variant, seed] = predict(config, data, workdir, list(masks))

    resamples = draw_resamples(len({row.patient for row in rows}), seed=0)
    figures = {}
    for variant in variants:
        parts = [outcomes[variant, seed] for seed in seeds]
        outcome = Outcome(
            np.concatenate([part.probabilities for part in parts]),
            [np.concatenate(module) for module in zip(*(part.maps for part in parts), strict=True)],
        )
        figures[variant] = estimate(outcome, rows, masks, resamples)
    reference = REFERENCE if REFERENCE in figures else variants[0]

    def summarise_all(by_name: dict[str, Estimate]) -> dict[str, Any]:
        return {name: summarise(one) for name, one in by_name.items()}

    comparison = {
        'config': flatten_config(base),
        'notice': experiment.PHANTOM_NOTICE if not base.data.raw_dir else '',
        'environment': experiment.describe_environment(),
        'seeds': list(seeds),
        'test': {
            'slices': len(rows),
            'patients': resamples.shape[1],
            'lesion_slices': len(masks),
            'classes': experiment.count_classes([row.label for row in rows]),
        },
        'variants': {variant: summarise_all(by_name) for variant, by_name in figures.items()},
        'references': {
            **{name: summarise_all(by_name) for name, by_name in estimate_references(rows, masks, resamples).items()},
            **{
                name: {'accuracy': {'mean': one['accuracy'], 'over_seeds': None, 'over_patients': one['interval']}}
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
