"""The third experiment: outlines of lungs and lesions on slices with masks."""

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from covidjax.data.loader import load_eval_batches, load_train_batches
from covidjax.data.masked import LESION, MaskedData, MaskedRow, read_masked
from covidjax.data.preprocess import resize_probabilities
from covidjax.errors import UserError
from covidjax.evaluation.outlines import clear_outside
from covidjax.evaluation.predictions import read_late, write_predictions
from covidjax.evaluation.segmentation import (
    THRESHOLDS,
    SliceMeasures,
    choose_lesion_threshold,
    measure_slice,
    score_slices,
)
from covidjax.experiment import common
from covidjax.experiment.common import PHANTOM_NOTICE, Experiment, Procedure, write_phantoms_once
from covidjax.experiment.config import flatten_config, load_config
from covidjax.experiment.preprocessing import describe_preprocessing
from covidjax.files import report_full_disk, write_json
from covidjax.models.att2 import normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import (
    LesionModel,
    compute_digest,
    holds_lesion_weights,
    load_box,
    read_lesion_weights,
)
from covidjax.models.lesions import LesionNet
from covidjax.models.pretrained import find_weights, load_pretrained
from covidjax.training.checkpoints import Checkpoints, has_checkpoint, open_checkpoints
from covidjax.training.devices import get_axis_name, get_shard, pad_batch_size, place_batch, replicate
from covidjax.training.hosts import is_first
from covidjax.training.losses import create_mask_objective
from covidjax.training.state import TrainState
from covidjax.training.step import pool_masks

if TYPE_CHECKING:
    from covidjax.report.lesions import OutlinedSlice

log = logging.getLogger(__name__)

TITLE = 'EfficientNetLite0-decoder (lesions)'
_NUM_SHOWN = 8  # slices of the report
_DRAWS = 2  # of a slice with lesions in one pass; of the others one


def create_variables(model: LesionNet, image_size: int, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters and batch statistics."""
    return model.init(key, jnp.zeros((1, image_size, image_size, 1)), train=False)


def create_model(config: ConfigDict) -> LesionNet:
    """Returns the model of the config section `model`."""
    return LesionNet(mirror=config.mirror)


def find_start(pretrained: str) -> Path | None:
    """Returns the file behind `config.model.pretrained`, None for a start from scratch.

    Raises:
      UserError: there is no such file.
    """
    return find_weights(pretrained) if pretrained else None


def restore_best(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    create = functools.partial(create_variables, create_model(config.model), config.data.image_size)
    return common.restore_best(create, checkpoints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlining(Experiment):
    """An experiment that outlines lungs and lesions: what `test` needs as well.

    Attributes:
      data: slices with masks.
      model: the network.
    """

    data: MaskedData
    model: LesionNet


class Drawn(Sequence):
    """The records of a training split in the order of one pass: those with lesions twice."""

    def __init__(self, data: MaskedData):
        self.records = data.sources['train']
        self.places = [i for i, row in enumerate(data.rows['train']) for _ in range(_DRAWS if row.has_lesion else 1)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[self.places[index]]


@functools.partial(compile_fast, static_argnums=0)
def _apply(model: LesionNet, variables: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Returns the probabilities [B, S / 4, S / 4, 3], the loss [B] and the score [B] of every example."""
    logits = model.apply(variables, normalise(batch['image']), train=False)
    losses_B, scores_B = create_mask_objective().compute(logits, {**batch, 'planes': pool_masks(batch['masks'])})
    return replicate((jax.nn.sigmoid(logits), losses_B, scores_B))


def create_predictor(
    model: LesionNet, data: MaskedData, batch_size: int
) -> Callable[[dict[str, Any], str], Iterator[tuple[int, np.ndarray, float, float]]]:
    """Returns a function (variables, split) -> (record, probabilities [h, h, 3], loss, score) of every slice."""
    batch_size = pad_batch_size(batch_size)

    def predict(variables: dict[str, Any], split: str) -> Iterator[tuple[int, np.ndarray, float, float]]:
        count, variables = len(data.sources[split]), fold_batch_norm(variables)
        batches = load_eval_batches(data.sources[split], batch_size=batch_size, shard=get_shard())
        computed = (_apply(model, variables, place_batch(batch)) for batch in batches)
        for number, outputs in enumerate(read_late(computed)):
            probabilities, losses_B, scores_B = jax.device_get(outputs)
            for i in range(min(batch_size, count - number * batch_size)):
                yield number * batch_size + i, probabilities[i], float(losses_B[i]), float(scores_B[i])

    return predict


def create_experiment(config: ConfigDict, data: MaskedData) -> Outlining:
    """Returns the experiment of a config on its data."""
    model = create_model(config.model)
    trained = model.clone(axis_name=get_axis_name(config.train.parallelism))
    predict = create_predictor(model, data, config.train.batch_size)
    drawn = Drawn(data)

    def load_weights(variables: dict[str, Any]) -> dict[str, Any]:
        path = find_start(config.model.pretrained)
        if path is None:
            return variables
        return (
            read_lesion_weights(path, '').variables if holds_lesion_weights(path) else load_pretrained(variables, path)
        )

    def forward(variables: dict[str, Any], images: jax.Array, _: dict) -> tuple[jax.Array, Any]:
        logits, updates = trained.apply(variables, images, train=True, mutable=['batch_stats'])
        return logits, updates['batch_stats']

    def load_batches(first_step: int, shard: tuple[int, int]) -> Iterator[dict]:
        return load_train_batches(
            drawn, batch_size=config.train.batch_size, seed=config.seed, first_step=first_step, shard=shard
        )

    def load_host_batches(state: TrainState) -> Iterator[dict]:
        return load_batches(int(state.step), get_shard())

    def name_batch(step: int) -> list[str]:
        indices = next(load_batches(step, (0, 1)))['index']
        return [data.rows['train'][drawn.places[i]].name for i in indices]

    def validate(variables: dict[str, Any]) -> tuple[float, float]:
        found = [(loss, score) for _, _, loss, score in predict(variables, 'val')]
        has_lesion = [row.has_lesion for row in data.rows['val']]
        losses, scores = np.array(found).T
        return float(losses.mean()), float(scores[has_lesion].mean())

    return Outlining(
        config=config,
        data=data,
        model=model,
        create_variables=functools.partial(create_variables, model, config.data.image_size),
        load_weights=load_weights,
        forward=forward,
        objective=create_mask_objective(),
        is_frozen=lambda path: False,
        load_batches=load_host_batches,
        name_batch=name_batch,
        steps_per_epoch=config.train.steps_per_epoch or -(-len(drawn) // config.train.batch_size),
        validate=validate,
    )


def load_data(config: ConfigDict, workdir: Path) -> MaskedData:
    """Loads the folders of the config section `data`; without one, phantoms that are written to the workdir.

    Raises:
      UserError: see `masked.read_masked`.
    """
    folders = [Path(name).expanduser() for name in config.raw_dir.split(',') if name]
    if not folders:
        log.warning('no directory after --config: using %s', PHANTOM_NOTICE)
        folders = [write_phantoms_once(workdir, config.phantom_seed)]
    data = read_masked(folders, config.image_size, [name for name in config.sources.split(',') if name])
    for split, rows in data.rows.items():
        number = sum(row.has_lesion for row in rows)
        log.info('%s: %s slices, %s with lesions', split, f'{len(rows):,}', f'{number:,}')
    return data


def train(config: ConfigDict, workdir: Path, data: MaskedData | None = None) -> dict[str, Any]:
    """Runs or resumes the experiment, prints its summary and returns its results (see `common.train`).

    Raises:
      UserError: bad config, data or workdir.
    """
    if not has_checkpoint(workdir):
        find_start(config.model.pretrained)
    return common.train(config, workdir, PROCEDURE, data)


def evaluate(workdir: Path) -> dict[str, Any]:
    """Tests the best model of a run again and writes the same files as the end of `train`."""
    return common.evaluate(workdir, PROCEDURE)


def load_lesions(name: str) -> LesionModel:
    """Loads a trained lesion model.

    Args:
      name: 'box' (the model that comes with this package), the workdir of a finished run, or an exported .safetensors
        file.

    Raises:
      UserError: there is no such model.
    """
    if name == 'box':
        return load_box()
    path = Path(name).expanduser()
    if path.suffix == '.safetensors':
        return read_lesion_weights(path, name)
    config = load_config(path)
    if config.name != 'lesions':
        raise UserError(f'{path} is a run of {config.name}, not of configs/lesions.py')
    results, rules = (common.load_output(path, file) for file in ('results.json', 'calibration.json'))
    with open_checkpoints(path) as checkpoints:
        variables = jax.device_get(restore_best(config, checkpoints))
    model, size = create_model(config.model), config.data.image_size
    return LesionModel(
        name, model, variables, size, rules['threshold'], results['notice'], rules['digest'], results['data']
    )


def measure(
    model: LesionNet, variables: dict[str, Any], data: MaskedData, split: str, batch_size: int
) -> tuple[list[SliceMeasures], dict[int, np.ndarray]]:
    """Returns the measures of every slice of a split, and the lesion probabilities [S, S] of the slices to show."""
    rows, records = data.rows[split], data.sources[split]
    with_lesions = [i for i, row in enumerate(rows) if row.has_lesion]
    spread = np.linspace(0, max(len(with_lesions) - 1, 0), _NUM_SHOWN).round().astype(int)
    chosen = {with_lesions[i] for i in spread if with_lesions}
    measures, shown = [], {}
    for i, probabilities, *_ in create_predictor(model, data, batch_size)(variables, split):
        row, record = rows[i], records[i]
        image_SxS = record['image'][..., 0]
        large = resize_probabilities(clear_outside(probabilities, image_SxS), image_SxS.shape)
        measures.append(
            measure_slice(
                large,
                record['masks'][..., 0],
                row.known,
                image_SxS,
                patient=row.patient,
                volume=row.volume,
                spacing_mm=row.spacing_mm,
            )
        )
        if i in chosen:
            shown[i] = large[..., 1]
    return measures, shown


def evaluate_outside(workdir: Path, folders: Sequence[Path], split: str) -> dict[str, Any]:
    """Tests a finished run, at its own threshold, on other slices with masks; writes external/<name>/ in the workdir.

    Slices of patients, or with pixels, that the run was trained or validated on are left out and counted.

    Args:
      workdir: of the run.
      folders: see `masked.read_masked`.
      split: 'test', or 'all' for the slices of all splits.

    Returns:
      The content of results.json.

    Raises:
      UserError: the run or a folder can't be read, or no slice is left.
    """
    from covidjax.report.lesions import write_lesion_report  # see `common.test`

    lesions, config = load_lesions(str(workdir)), load_config(workdir)
    inside = load_data(config.data, workdir)
    outside, num_left_out = exclude_seen(read_masked(folders, lesions.image_size, for_training=False), inside, split)
    name = '+'.join(folder.resolve().name for folder in folders)
    measures, shown = measure(lesions.model, lesions.variables, outside, 'test', config.train.batch_size)
    rows = outside.rows['test']
    results = {
        'data': name,
        'notice': lesions.notice,
        'model': TITLE,
        'split': split,
        'num_left_out': num_left_out,
        **score(measures, [row.source for row in rows], lesions.threshold),
        'environment': common.describe_environment(),
    }
    folder = workdir / 'external' / name
    with report_full_disk(workdir):
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / 'predictions.csv', tabulate(rows, measures, lesions.threshold))
        examples = choose_examples(outside, 'test', shown, lesions.threshold)
        write_lesion_report(folder / 'report.html', results, examples, [])
        write_json(folder / 'results.json', results)
    print(
        '\n'.join([*format_scores(results), '', *_describe_left_out(num_left_out), f'Report: {folder / "report.html"}'])
    )
    return results


def _describe_left_out(number: int) -> list[str]:
    return [f'{number:,} slices were left out: the run has seen their patients or pixels.'] if number else []


def exclude_seen(outside: MaskedData, inside: MaskedData, split: str) -> tuple[MaskedData, int]:
    """Returns the slices of `outside` that a run on `inside` has not seen, all as 'test', and how many were left out.

    Raises:
      UserError: none is left.
    """
    seen_patients, seen_pixels = set(), set()
    for of_split in ('train', 'val'):
        for row, record in zip(inside.rows[of_split], inside.sources[of_split], strict=True):
            seen_patients.add((row.source, row.patient))
            seen_pixels.add(_hash(record['image']))
    rows, records, number = [], [], 0
    for of_split in outside.rows if split == 'all' else ['test']:
        for row, record in zip(outside.rows[of_split], outside.sources[of_split], strict=True):
            number += 1
            if (row.source, row.patient) not in seen_patients and _hash(record['image']) not in seen_pixels:
                rows.append(row)
                records.append(record)
    if not rows:
        raise UserError(
            f'{", ".join(map(str, outside.folders))}: the run was trained on all {number:,} slices of the split '
            f'{split!r}: pass other data, or --split=all'
        )
    return outside._replace(rows={'test': rows}, sources={'test': records}), number - len(rows)


def _hash(image: np.ndarray) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def score(measures: Sequence[SliceMeasures], sources: Sequence[str], threshold: float) -> dict[str, Any]:
    """Returns `score_slices` of all slices, and of those of each source under 'sources'."""
    by_source = {
        source: score_slices([m for m, s in zip(measures, sources, strict=True) if s == source], threshold)
        for source in sorted(set(sources))
    }
    return {**score_slices(measures, threshold), 'sources': by_source}


def test(experiment: Outlining, checkpoints: Checkpoints, history: Sequence[dict], workdir: Path) -> dict[str, Any]:
    """Tests the model of the best epoch and writes results.json (last), predictions.csv, calibration.json, report.html.

    The threshold of the lesion probability is chosen on validation and stored in calibration.json.

    Returns:
      The content of results.json. With several processes, only the first writes and returns it; others return {}.
    """
    from covidjax.report import sections  # see `common.test`
    from covidjax.report.lesions import write_lesion_report

    start = time.perf_counter()
    config, data = experiment.config, experiment.data
    variables = restore_best(config, checkpoints)
    batch_size = config.train.batch_size
    of_val, _ = measure(experiment.model, variables, data, 'val', batch_size)
    of_test, shown = measure(experiment.model, variables, data, 'test', batch_size)
    if not is_first():
        return {}
    threshold = choose_lesion_threshold(of_val)
    variables = jax.device_get(variables)
    results = {
        'data': describe_folders(config.data),
        'notice': '' if config.data.raw_dir else PHANTOM_NOTICE,
        'model': TITLE,
        'split': 'test',
        **score(of_test, [row.source for row in data.rows['test']], threshold),
        'dataset': {
            'raw_dir': config.data.raw_dir,
            'fingerprint': data.fingerprint,
            'image_size': config.data.image_size,
            'slices': {split: count_slices(data, split) for split in data.rows},
            'sources': sorted({row.source for rows in data.rows.values() for row in rows}),
            'num_dropped': 0,
        },
        'training': common.describe_training(experiment, history),
        'environment': common.describe_environment(),
    }
    write_predictions(workdir / 'predictions.csv', tabulate(data.rows['test'], of_test, threshold))
    write_json(workdir / 'calibration.json', {'threshold': threshold, 'digest': compute_digest(variables)})
    write_json(workdir / 'preprocessing.json', describe_preprocessing(config, data.fingerprint))
    examples = choose_examples(data, 'test', shown, threshold)
    training = sections.build_training(results, flatten_config(config), history, experiment.objective.score)
    write_lesion_report(workdir / 'report.html', results, examples, [training])
    results['training']['test_seconds'] = round(time.perf_counter() - start, 1)
    write_json(workdir / 'results.json', results)
    return results


def describe_folders(config: ConfigDict) -> str:
    """Returns the names of the folders, or 'phantoms'."""
    return ', '.join(Path(name).name for name in config.raw_dir.split(',') if name) or 'phantoms'


def count_slices(data: MaskedData, split: str) -> dict[str, int]:
    """Returns the number of slices of a split with and without lesions."""
    number = sum(row.has_lesion for row in data.rows[split])
    return {'with lesions': number, 'without': len(data.rows[split]) - number}


def choose_examples(
    data: MaskedData, split: str, shown: dict[int, np.ndarray], threshold: float
) -> 'list[OutlinedSlice]':
    """Returns the slices to show, given their lesion probabilities by number."""
    from covidjax.report.lesions import OutlinedSlice  # see `common.test`

    records, examples = data.sources[split], []
    for i, probabilities in sorted(shown.items()):
        image, masks = records[i]['image'][..., 0], records[i]['masks'][..., 0]
        examples.append(
            OutlinedSlice(data.rows[split][i].name, image, (masks & LESION) > 0, probabilities >= threshold)
        )
    return examples


def tabulate(rows: Sequence[MaskedRow], measures: Sequence[SliceMeasures], threshold: float) -> dict[str, list]:
    """Returns the columns of predictions.csv: numbers of pixels outlined and called, and the AUC, of every slice."""
    at = THRESHOLDS.index(threshold)
    return {
        'name': [row.name for row in rows],
        'patient': [row.patient for row in rows],
        'source': [row.source for row in rows],
        'volume': [row.volume for row in rows],
        'slice': [row.slice_index for row in rows],
        'lesion_outlined': [m.lesion for m in measures],
        'lesion_called': [None if m.called is None else int(m.called[at]) for m in measures],
        'lesion_both': [None if m.hits is None else int(m.hits[at]) for m in measures],
        'lungs_called': [m.lungs_called for m in measures],
        'auc': [m.auc for m in measures],
    }


def format_scores(results: dict[str, Any]) -> list[str]:
    """Returns the lines of a table of the scores, of all slices and of each source."""
    from covidjax.report.lesions import SCORES, describe  # see `common.test`

    groups = {'all': results, **results['sources']}
    width = max(len(text) for text in SCORES.values()) + 2
    lines = ['', f'{"":<{width}}' + ''.join(f'{name:<22}' for name in groups)]
    for name, text in SCORES.items():
        lines.append(f'{text:<{width}}' + ''.join(f'{describe(group[name]):<22}' for group in groups.values()))
    lines.append(f'{"slices":<{width}}' + ''.join(f'{group["num_slices"]:<22,}' for group in groups.values()))
    return lines


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns the summary printed at the end of a run."""
    lines = format_scores(results)
    training = results['training']
    return '\n'.join(
        [
            *lines,
            '',
            'Brackets: 95% intervals, bootstrap over patients.',
            *([f'Data: {results["notice"]}.'] if results['notice'] else []),
            f'Tested: epoch {training["best_epoch"]} of {training["num_epochs"]} (lowest validation loss), threshold '
            f'{results["threshold"]:g}.',
            f'Report: {workdir / "report.html"}',
            f'Results, predictions and figures: {workdir}',
        ]
    )


PROCEDURE = Procedure(load_data, create_experiment, test, format_summary)
