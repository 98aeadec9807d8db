"""The paper's first approach from config to results: ResNet50-ATT2 on single slices."""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from covidjax import experiment, slice_report
from covidjax.data import covidx_ct, published
from covidjax.data.lesions import LesionSlice, read_lesion_folder, read_phantom_lesions
from covidjax.data.lists import CLASSES, find_version
from covidjax.data.loader import load_eval_batches, load_train_batches
from covidjax.data.scans import group_scans
from covidjax.evaluation import baselines
from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.metrics import compute_metrics, format_table
from covidjax.evaluation.patient_level import compute_patient_level, format_comparison
from covidjax.evaluation.predictions import compute_logits, softmax, write_predictions
from covidjax.evaluation.scan_votes import fit_vote_rules
from covidjax.evaluation.screening import evaluate_rules, fit_rules
from covidjax.fast import compile_fast
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.pretrained import find_weights, load_pretrained
from covidjax.training.checkpoints import Checkpoints, has_checkpoint, open_checkpoints
from covidjax.training.devices import get_axis_name, get_shard, pad_batch_size, place_batch, replicate
from covidjax.training.hosts import is_first
from covidjax.training.workdir import save_config

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path, data: covidx_ct.Prepared | None = None) -> dict[str, Any]:
    """Runs the experiment, or goes on with it where it stopped, prints its summary and returns its results.

    Args:
      config: see configs/att2.py.
      workdir: created if absent. Afterwards it holds config.json, checkpoints/, metrics.jsonl, tensorboard/,
        results.json, predictions.csv, calibration.json, novelty.npz, report.html, training_curves.png and
        confusion_matrix.png; with phantoms also phantoms/.
      data: what `config.data` says, if it is open already.

    Raises:
      UserError: bad config, data or workdir.
    """

    def execute() -> dict[str, Any]:
        if config.data.raw_dir and data is None:
            find_version(Path(config.data.raw_dir).expanduser())  # a mistyped one is told before a hub is asked
        # Looked for before the long work, and only as long as no trained weights have taken their place.
        if config.model.pretrained and not has_checkpoint(workdir):
            find_weights(config.model.pretrained)
        opened = data or experiment.load_data(config.data, workdir)
        save_config(workdir, config)
        with open_checkpoints(workdir) as checkpoints:
            history = fit(config, opened, checkpoints, workdir)
            return test(config, opened, checkpoints, history, workdir, lesions_dir=None, occlusion=False)

    return experiment.run(config, workdir, execute, format_summary)


def evaluate(workdir: Path, lesions_dir: Path | None = None, *, occlusion: bool = False) -> dict[str, Any]:
    """Tests the best model of a workdir again and writes the same files as the end of `train`.

    Args:
      workdir: of a run.
      lesions_dir: slices with outlined lesions on which maps are scored (see `lesions.read_lesion_folder`).
      occlusion: also scores occlusion maps, which is slow.
    """
    return experiment.evaluate(
        workdir, functools.partial(test, lesions_dir=lesions_dir, occlusion=occlusion), format_summary
    )


def create_model(config: ConfigDict) -> Att2:
    """Returns the model of the section `model`."""
    return Att2(
        stage_sizes=tuple(config.stage_sizes),
        width=config.width,
        block=config.block,
        stem=config.stem,
        tail_blocks=config.tail_blocks,
        num_classes=len(CLASSES),
        compatibility=config.compatibility,
        combination=config.combination,
    )


def create_variables(model: Att2, image_size: int, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters and batch statistics, the tail's included."""
    return model.init(key, jnp.zeros((1, image_size, image_size, 1)), train=False, full=True)


# Of the module, so that validation and test share one compilation.
@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Att2, variables: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    return replicate(model.apply(variables, normalise(batch['image']), train=False).logits)


def create_predictor(
    model: Att2, data: covidx_ct.Prepared, batch_size: int
) -> Callable[[dict[str, Any], str], np.ndarray]:
    """Returns (variables, split) -> logits of the split's slices [N, K] in evaluation mode."""
    apply = functools.partial(_apply, model)
    batch_size = pad_batch_size(batch_size)

    def predict(variables, split):
        batches = load_eval_batches(data.sources[split], batch_size=batch_size, shard=get_shard())
        return compute_logits(apply, variables, map(place_batch, batches), len(data.sources[split]))

    return predict


def fit(config: ConfigDict, data: covidx_ct.Prepared, checkpoints: Checkpoints, workdir: Path) -> list[dict]:
    """Trains the model of the config, from pretrained weights or from scratch; returns the history of `loop.fit`."""
    model = create_model(config.model)
    predict = create_predictor(model, data, config.train.batch_size)

    trained = model.clone(axis_name=get_axis_name(config.train.parallelism))
    rows = data.rows['train']

    def load_batches(first_step, shard):
        return load_train_batches(
            data.sources['train'],
            batch_size=config.train.batch_size,
            seed=config.seed,
            first_step=first_step,
            shard=shard,
        )

    def forward(variables, images, _):
        outputs, updates = trained.apply(variables, images, train=True, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    return experiment.fit(
        config.train,
        seed=config.seed,
        create_variables=functools.partial(create_variables, model, config.data.image_size),
        load_weights=lambda variables: (
            load_pretrained(variables, find_weights(config.model.pretrained)) if config.model.pretrained else variables
        ),
        forward=forward,
        is_frozen=functools.partial(is_dead, compatibility=config.model.compatibility),
        load_batches=lambda state: load_batches(int(state.step), get_shard()),
        name_batch=lambda step: [rows[i].file for i in next(load_batches(step, (0, 1)))['index']],
        compute_val_logits=lambda variables: predict(variables, 'val'),
        train_labels=[row.label for row in rows],
        val_labels=[row.label for row in data.rows['val']],
        steps_per_epoch=config.train.steps_per_epoch,
        checkpoints=checkpoints,
        workdir=workdir,
    )


def restore_best(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    template = experiment.create_template(
        functools.partial(create_variables, create_model(config.model), config.data.image_size)
    )
    return checkpoints.restore_best(template)


def test(
    config: ConfigDict,
    data: covidx_ct.Prepared,
    checkpoints: Checkpoints,
    history: Sequence[dict],
    workdir: Path,
    *,
    lesions_dir: Path | None,
    occlusion: bool,
) -> dict[str, Any]:
    """Tests the best epoch's model and writes the files that `train` names, results.json last.

    Everything that is chosen, a temperature or a threshold, is chosen on validation slices. Predictions are those of
    the model itself; temperature and thresholds are kept beside them, in calibration.json.

    Args:
      config, data, checkpoints, history, workdir: of the run.
      lesions_dir, occlusion: see `evaluate`. Without a folder, phantoms are scored against their own masks.

    Returns:
      The content of results.json: what was run, `compute_metrics` of the test slices, the baselines on the same slices,
      pneumonia against COVID-19 per patient, curves, `screening.evaluate_rules` and the scores of explanations. Of
      several processes only the first writes and returns it.
    """
    start = time.perf_counter()
    lesions = load_lesions(data, config.data.image_size, lesions_dir)
    model, variables = create_model(config.model), restore_best(config, checkpoints)
    predict = create_predictor(model, data, config.train.batch_size)
    logits = {split: predict(variables, split) for split in ('val', 'test')}
    if not is_first():
        return {}
    variables = jax.device_get(variables)  # what follows runs in this process alone
    probabilities = softmax(logits['test'])
    rows = data.rows['test']
    labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    patients = [row.patient for row in rows]
    rules = fit_rules(logits['val'], labels['val'], [row.patient for row in data.rows['val']], CLASSES)
    rules['scans'] = fit_vote_rules(logits['val'], group_scans(data.rows['val']), rules['temperature'])
    log.info('statistics, baselines and explanations of %d test slices', len(rows))

    thumbnail_scores, alpha = baselines.compute_thumbnail_scores(data.sources, labels)
    majority_scores = baselines.compute_majority_scores(labels['train'], len(rows), len(CLASSES))
    scores = {
        'model': probabilities,
        'majority class': majority_scores,
        'file names only': score_file_names(data),
        'thumbnail ridge': thumbnail_scores,
    }
    metrics = {name: compute_metrics(labels['test'], s.argmax(-1), patients, CLASSES) for name, s in scores.items()}
    results = {
        **experiment.describe_data(config.data, data),
        'model': 'ResNet50-ATT2 (slices)',
        'split': 'test',
        **metrics['model'],
        'baselines': {name: m for name, m in metrics.items() if name != 'model'},
        'thumbnail_ridge_alpha': alpha,
        'covid19_against_pneumonia_per_patient': {
            name: compute_patient_level(s, labels['test'], patients) for name, s in scores.items()
        },
        'curves': compute_curves(labels['test'], probabilities, patients, CLASSES),
        'screening': evaluate_rules(
            rules,
            logits['test'],
            labels['test'],
            patients,
            CLASSES,
            train_shares_K=np.bincount(labels['train'], minlength=len(CLASSES)) / len(labels['train']),
        ),
        'explanations': slice_report.score_explanations(model, variables, data, lesions, occlusion=occlusion),
        'training': experiment.describe_training(history, config.train.min_delta, config.model.pretrained),
        'environment': experiment.describe_environment(),
    }
    write_predictions(workdir / 'predictions.csv', rows, probabilities)
    experiment.save_usual(workdir, model, variables, data)
    is_the_papers = tuple(results['dataset']['slices']['test'].values()) == published.SLICES['CT-2A'][2]
    experiment.write_results(
        workdir,
        results,
        rules,
        config=config,
        history=history,
        unit='slices',
        table='Table III',
        published=published.SLICE_SCORES if is_the_papers else None,
        others={},
        sections=slice_report.build_slice_sections(
            model, variables, data, probabilities, lesions, results['explanations']
        ),
        start=start,
    )
    return results


def load_lesions(data: covidx_ct.Prepared, image_size: int, lesions_dir: Path | None) -> list[LesionSlice]:
    """Returns slices with outlined lesions: those of a named folder, else the test phantoms', else none."""
    if lesions_dir is not None:
        return read_lesion_folder(lesions_dir, image_size)
    return read_phantom_lesions(data.raw_dir, data.rows['test'], image_size)


def score_file_names(data: covidx_ct.Prepared) -> np.ndarray:
    """Returns what the file names of whole scans predict of their slices: probabilities [N, K] of the test split."""
    train, test = (group_scans(data.rows[split]) for split in ('train', 'test'))
    scores = np.empty((len(data.rows['test']), len(CLASSES)))
    for scan, of_scan in zip(test, baselines.compute_file_name_scores(train, test, per_slice=True), strict=True):
        scores[list(scan.records)] = of_scan
    return scores


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns what a run prints at its end: Table III, the baselines and where things are."""
    lines = ['', format_table(results, unit='Slices')]
    lines += experiment.format_baselines(results)
    lines += ['', format_comparison(results['covid19_against_pneumonia_per_patient']), '']
    return '\n'.join(lines + experiment.format_ending(results, workdir, unit='slices'))
