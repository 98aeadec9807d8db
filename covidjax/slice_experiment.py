"""The paper's first approach from config to results: ResNet50-ATT2 on single slices."""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import covidjax
from covidjax.data import covidx_ct, phantom
from covidjax.data.augment import AugmentOptions
from covidjax.data.lists import CLASSES
from covidjax.data.loader import load_eval_batches, load_train_batches
from covidjax.errors import UserError
from covidjax.evaluation import baselines, figures
from covidjax.evaluation.metrics import compute_metrics, format_table
from covidjax.evaluation.patient_level import compute_patient_level, format_comparison
from covidjax.evaluation.predictions import compute_logits, softmax, write_predictions
from covidjax.files import write_json
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.pretrained import find_weights, load_pretrained
from covidjax.training import loop
from covidjax.training.checkpoints import Checkpoints, open_checkpoints
from covidjax.training.config import check_config
from covidjax.training.devices import create_shardings
from covidjax.training.losses import compute_class_weights, weighted_cross_entropy
from covidjax.training.optim import create_optimizer, create_schedule
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step
from covidjax.training.workdir import claim_workdir, load_config, lock_workdir

log = logging.getLogger(__name__)

PHANTOM_NOTICE = 'generated phantoms, not patients: these figures say that the code works, nothing about disease'


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment, or goes on with it where it stopped, and returns its results (see `test`).

    Args:
      config: see configs/att2.py.
      workdir: created if absent. Afterwards it holds config.json, checkpoints/, metrics.jsonl, tensorboard/,
        results.json, predictions.csv, training_curves.png and confusion_matrix.png; with phantoms also phantoms/.

    Raises:
      UserError: bad config, data or workdir.
    """
    check_config(config)
    with lock_workdir(workdir):
        claim_workdir(workdir, config)
        results_path = workdir / 'results.json'
        if results_path.exists():
            log.info('%s holds a finished run; its summary again:', workdir)
            results = json.loads(results_path.read_text())
        else:
            data = load_data(config.data, workdir)
            with open_checkpoints(workdir) as checkpoints:
                history = fit(config, data, checkpoints, workdir)
                results = test(config, data, checkpoints, history, workdir)
    print(format_summary(results, workdir))
    return results


def evaluate(workdir: Path) -> dict[str, Any]:
    """Tests the best model of a workdir again and writes the same files as the end of `train`."""
    config = load_config(workdir)
    with lock_workdir(workdir):
        history = loop.read_history(workdir)
        data = load_data(config.data, workdir)
        with open_checkpoints(workdir) as checkpoints:
            results = test(config, data, checkpoints, history, workdir)
    print(format_summary(results, workdir))
    return results


def load_data(config: ConfigDict, workdir: Path) -> covidx_ct.Prepared:
    """Prepares the slices of the raw directory, or of phantoms written to the workdir where none is named."""
    raw_dir = config.raw_dir
    if not raw_dir:
        log.warning('no raw directory after --config: using %s', PHANTOM_NOTICE)
        raw_dir = workdir / 'phantoms'
        phantom.write_phantoms(raw_dir, phantom.PhantomOptions(seed=config.phantom_seed))
    data = covidx_ct.prepare(
        raw_dir, image_size=config.image_size, prepared_dir=config.prepared_dir, skip_bad=config.skip_bad
    )
    if data.dropped:
        log.warning('%d bad images were dropped; they are listed in dropped_images.json', len(data.dropped))
        write_json(workdir / 'dropped_images.json', [{'file': file, 'reason': reason} for file, reason in data.dropped])
    for split, rows in data.rows.items():
        counts = np.bincount([row.label for row in rows], minlength=len(CLASSES))
        log.info('%s: %s', split, ', '.join(f'{n:,} {name}' for name, n in zip(CLASSES, counts, strict=True)))
    return data


def create_model(config: ConfigDict) -> Att2:
    """Returns the model of `config.model`."""
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
    image = jnp.zeros((1, image_size, image_size, 1))
    return model.init(key, image, train=False, full=True)


def compile_logits(model: Att2):
    """Returns compiled (variables, images uint8 [B, S, S, 1]) -> logits [B, K] in evaluation mode."""
    return jax.jit(lambda variables, images: model.apply(variables, normalise(images), train=False).logits)


def fit(config: ConfigDict, data: covidx_ct.Prepared, checkpoints: Checkpoints, workdir: Path) -> list[dict]:
    """Trains the model of the config; returns the history of `loop.fit`."""
    model = create_model(config.model)
    options = config.train
    batch_sharding, replicated = create_shardings()
    num_devices = len(batch_sharding.device_set)
    if options.batch_size % num_devices:
        raise UserError(f'config.train.batch_size={options.batch_size} does not divide over {num_devices} devices')
    # Found before the long work starts, read when the first state is made.
    weights = find_weights(config.model.pretrained) if config.model.pretrained else None
    labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    class_weights = compute_class_weights(np.bincount(labels['train'], minlength=len(CLASSES)).tolist())
    optimizer = create_optimizer(
        create_schedule(
            options.schedule,
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=options.num_epochs * options.steps_per_epoch,
        ),
        weight_decay=options.weight_decay,
        decay=options.decay,
        is_frozen=functools.partial(is_dead, compatibility=config.model.compatibility),
    )
    init_key, train_key = jax.random.split(jax.random.key(config.seed))

    def create_state():
        variables = jax.jit(create_variables, static_argnums=(0, 1))(model, config.data.image_size, init_key)
        if weights is not None:
            variables = load_pretrained(variables, weights)
        return jax.device_put(create_train_state(variables, optimizer, train_key), replicated)

    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(
            lambda key: create_train_state(create_variables(model, config.data.image_size, key), optimizer, key), train_key
        ),
    )
    step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            class_weights=class_weights,
            augmentation=AugmentOptions() if options.augment else None,
        ),
        donate_argnums=0,
    )
    apply = compile_logits(model)

    def validate(variables):
        batches = load_eval_batches(data.sources['val'], batch_size=options.batch_size)
        logits = compute_logits(apply, variables, batches, batch_sharding)
        losses, weights = weighted_cross_entropy(logits, labels['val'], class_weights)
        return float(losses.sum() / weights.sum()), float((logits.argmax(-1) == labels['val']).mean())

    def load_batches(first_step: int) -> Iterator[dict]:
        stream = load_train_batches(
            data.sources['train'], batch_size=options.batch_size, seed=config.seed, first_step=first_step
        )
        for batch in stream:
            yield jax.device_put({name: batch[name] for name in ('image', 'label')}, batch_sharding)

    schedule = loop.Schedule(
        steps_per_epoch=options.steps_per_epoch,
        num_epochs=options.num_epochs,
        patience=options.patience,
        min_delta=options.min_delta,
        examples_per_step=options.batch_size,
    )
    return loop.fit(
        template, create_state, step, validate, load_batches, schedule=schedule, checkpoints=checkpoints, workdir=workdir
    )


def test(
    config: ConfigDict, data: covidx_ct.Prepared, checkpoints: Checkpoints, history: Sequence[dict], workdir: Path
) -> dict[str, Any]:
    """Tests the best epoch's model and writes predictions.csv, the figures and, last, results.json.

    Returns:
      The content of results.json: what was run, `compute_metrics` of the test slices, the baselines on the same slices,
      and pneumonia against COVID-19 per patient.
    """
    start = time.perf_counter()
    model = create_model(config.model)
    batch_sharding, replicated = create_shardings()
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(functools.partial(create_variables, model, config.data.image_size), jax.random.key(0)),
    )
    variables = checkpoints.restore_best(template)
    if variables is None:
        raise UserError(f'{workdir} has no best checkpoint yet: train first')
    rows = data.rows['test']
    labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    patients = [row.patient for row in rows]
    batches = load_eval_batches(data.sources['test'], batch_size=config.train.batch_size)
    probabilities = softmax(compute_logits(compile_logits(model), variables, batches, batch_sharding))

    thumbnail_scores, alpha = baselines.compute_thumbnail_scores(data.sources, labels)
    majority_scores = baselines.compute_majority_scores(labels['train'], len(rows), len(CLASSES))
    scores = {'model': probabilities, 'thumbnail ridge': thumbnail_scores, 'majority class': majority_scores}
    metrics = {name: compute_metrics(labels['test'], s.argmax(-1), patients, CLASSES) for name, s in scores.items()}
    best_epoch = loop.find_best_epoch([entry['val_loss'] for entry in history], config.train.min_delta)
    results = {
        'data': 'phantoms' if not config.data.raw_dir else f'COVIDx CT-{data.version} layout',
        'notice': PHANTOM_NOTICE if not config.data.raw_dir else '',
        'split': 'test',
        **metrics['model'],
        'baselines': {
            name: {'accuracy': metrics[name]['accuracy'], 'interval': metrics[name]['intervals']['accuracy']}
            for name in ('majority class', 'thumbnail ridge')
        },
        'thumbnail_ridge_alpha': alpha,
        'covid19_against_pneumonia_per_patient': {
            name: compute_patient_level(s, labels['test'], patients) for name, s in scores.items()
        },
        'dataset': {
            'raw_dir': config.data.raw_dir,
            'version': data.version,
            'fingerprint': data.fingerprint,
            'image_size': config.data.image_size,
            'slices': {
                split: dict(zip(CLASSES, np.bincount(y, minlength=len(CLASSES)).tolist(), strict=True))
                for split, y in labels.items()
            },
            'num_dropped': len(data.dropped),
        },
        'training': {
            'pretrained': config.model.pretrained or 'none (from scratch)',
            'num_epochs': len(history),
            'best_epoch': best_epoch,
            'best_val_loss': history[best_epoch - 1]['val_loss'],
            'num_steps': history[-1]['step'],
            'seconds': round(sum(entry['seconds'] + entry['val_seconds'] for entry in history), 1),
        },
        'environment': describe_environment(),
    }
    write_predictions(workdir / 'predictions.csv', rows, probabilities)
    name = 'phantoms' if not config.data.raw_dir else f'CT-{data.version}'
    figures.save_figure(
        figures.render_training_curves(history, best_epoch, title=f'ResNet-ATT2 on {name}'),
        workdir / 'training_curves.png',
    )
    figures.save_figure(
        figures.render_confusion_matrix(results['confusion_matrix'], CLASSES, title=f'Test slices, {name}'),
        workdir / 'confusion_matrix.png',
    )
    results['training']['test_seconds'] = round(time.perf_counter() - start, 1)
    write_json(workdir / 'results.json', results)
    return results


def describe_environment() -> dict[str, Any]:
    """Returns versions and devices of this process."""
    return {
        'covidjax': covidjax.__version__,
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax')},
        'devices': [device.device_kind for device in jax.devices()],
        'cpu_cores': os.cpu_count(),
    }


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns what a run prints at its end: Table III, the baselines and where things are."""
    lines = ['', format_table(results)]
    for name, baseline in results['baselines'].items():
        low, high = baseline['interval']
        lines.append(f'{name:<18}{baseline["accuracy"]:.3f} [{low:.3f}, {high:.3f}] accuracy')
    lines += ['', format_comparison(results['covid19_against_pneumonia_per_patient']), '']
    intervals = results['intervals']
    lines.append(f'Brackets: {intervals["level"]:.0%} intervals, {intervals["method"]}.')
    if results['notice']:
        lines.append(f'Data: {results["notice"]}.')
    training = results['training']
    lines.append(
        f'Tested: epoch {training["best_epoch"]} of {training["num_epochs"]} (lowest validation loss), '
        f'{results["num_examples"]:,} slices of {results["num_patients"]} patients.'
    )
    lines.append(f'Results, predictions and figures: {workdir}')
    return '\n'.join(lines)
