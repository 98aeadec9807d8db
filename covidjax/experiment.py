"""What the slice and the scan experiment share: their data, the wiring of their training and the facts of a run."""

import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import covidjax
from covidjax.data import covidx_ct, phantom
from covidjax.data.augment import AugmentOptions
from covidjax.data.lists import CLASSES
from covidjax.errors import UserError, join_faults
from covidjax.evaluation import figures, report
from covidjax.evaluation.metrics import format_score
from covidjax.evaluation.novelty import MAX_EXAMPLES, fit_novelty, save_novelty
from covidjax.evaluation.outputs import compute_outputs
from covidjax.files import report_full_disk, write_json
from covidjax.models.att2 import Att2
from covidjax.training import loop
from covidjax.training.checkpoints import Checkpoints, open_checkpoints
from covidjax.training.config import check_config, flatten_config
from covidjax.training.devices import check_batch_size, compile_step, create_shardings, place_batch, place_state
from covidjax.training.hosts import is_first
from covidjax.training.losses import compute_class_weights, weighted_cross_entropy
from covidjax.training.optim import create_optimizer, create_schedule
from covidjax.training.state import TrainState, create_train_state
from covidjax.training.step import Forward, train_step
from covidjax.training.workdir import check_workdir, load_config, lock_workdir

log = logging.getLogger(__name__)

PHANTOM_NOTICE = 'generated phantoms, not patients: these figures say that the code works, nothing about disease'


def run(
    config: ConfigDict,
    workdir: Path,
    execute: Callable[[], dict[str, Any]],
    format_summary: Callable[[dict[str, Any], Path], str],
) -> dict[str, Any]:
    """Executes an experiment in its workdir, unless it is finished, prints its summary and returns its results.

    Raises:
      UserError: bad config; the workdir can't be written, is in use, or was made by another config; the batch does not
        divide over the devices.
    """
    check_config(config)
    with lock_workdir(workdir), report_full_disk(workdir):
        check_workdir(workdir, config)
        if (workdir / 'results.json').exists():
            log.info('%s holds a finished run; its summary again:', workdir)
            results = load_output(workdir, 'results.json')
        else:
            check_batch_size(config.train.batch_size, config.train.accumulation_steps)
            results = execute()
    if is_first():
        print(format_summary(results, workdir))
    return results


def evaluate(
    workdir: Path,
    test: Callable[[ConfigDict, covidx_ct.Prepared, Checkpoints, list[dict], Path], dict[str, Any]],
    format_summary: Callable[[dict[str, Any], Path], str],
) -> dict[str, Any]:
    """Tests the best model of a workdir again, prints the summary and returns the results.

    Raises:
      UserError: the folder is not the workdir of a run with a finished epoch, or its data are gone.
    """
    config = load_config(workdir)
    with lock_workdir(workdir), report_full_disk(workdir):
        history = loop.read_history(workdir)
        data = load_data(config.data, workdir)
        with open_checkpoints(workdir) as checkpoints:
            results = test(config, data, checkpoints, history, workdir)
    if is_first():
        print(format_summary(results, workdir))
    return results


def load_output(workdir: Path, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file that the test of a run writes: results.json or calibration.json.

    Raises:
      UserError: there is none, or it is damaged.
    """
    try:
        return json.loads((workdir / name).read_text())
    except FileNotFoundError as error:
        raise UserError(f'{workdir} has no {name}: run its training command again, or --mode=evaluate') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{workdir / name} is unreadable: --mode=evaluate writes it again') from error


def load_data(config: ConfigDict, workdir: Path) -> covidx_ct.Prepared:
    """Prepares the slices of the raw directory, or of phantoms written to the workdir where none is named."""
    raw_dir = Path(config.raw_dir).expanduser()  # no shell expands a ~ after a colon
    if not config.raw_dir:
        log.warning('no raw directory after --config: using %s', PHANTOM_NOTICE)
        raw_dir = workdir / 'phantoms'
        if is_first():
            phantom.write_phantoms(raw_dir, phantom.PhantomOptions(seed=config.phantom_seed))
        multihost_utils.sync_global_devices('phantoms')
    data = covidx_ct.prepare(
        raw_dir, image_size=config.image_size, prepared_dir=config.prepared_dir, skip_bad=config.skip_bad
    )
    if data.dropped and is_first():
        log.warning('%d bad images were dropped; they are listed in dropped_images.json', len(data.dropped))
        write_json(workdir / 'dropped_images.json', [{'file': file, 'reason': reason} for file, reason in data.dropped])
    for split, rows in data.rows.items():
        log.info('%s: %s', split, format_counts([row.label for row in rows]))
    return data


def count_classes(labels: Sequence[int]) -> dict[str, int]:
    """Returns the number of examples of every class."""
    return dict(zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)).tolist(), strict=True))


def format_counts(labels: Sequence[int]) -> str:
    """Returns e.g. '35,996 normal, 25,496 pneumonia, 82,286 covid19'."""
    return ', '.join(f'{count:,} {name}' for name, count in count_classes(labels).items())


def create_template(create: Callable[[jax.Array], Any]) -> Any:
    """Returns shapes, dtypes and (replicated) shardings of what `create(key)` makes, without making it."""
    _, replicated = create_shardings()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(create, jax.random.key(0)),
    )


def fit(
    config: ConfigDict,
    *,
    seed: int,
    create_variables: Callable[[jax.Array], dict[str, Any]],
    load_weights: Callable[[dict[str, Any]], dict[str, Any]],
    forward: Forward,
    is_frozen: Callable[[str], bool],
    load_batches: Callable[[TrainState], Iterator[dict]],
    name_batch: Callable[[int], list[str]],
    compute_val_logits: Callable[[dict[str, Any]], np.ndarray],
    train_labels: Sequence[int],
    val_labels: Sequence[int],
    steps_per_epoch: int,
    checkpoints: Checkpoints,
    workdir: Path,
) -> list[dict]:
    """Trains with the options of `config.train`; returns the history (see `loop.fit`).

    Args:
      config: the section `train`.
      seed: of initial weights and augmentation.
      create_variables: key -> initial variables, compiled here.
      load_weights: replaces initial variables by stored ones; called in a new run only.
      forward: see `step.train_step`.
      is_frozen: path of a parameter -> whether it stays as it is.
      load_batches: state -> this process's rows of the batches that it goes on with, on the host.
      name_batch: number of a step -> names of the examples in its batch, for the error of a loss that is not finite.
      compute_val_logits: variables -> logits of the validation split, in the order of `val_labels`.
      train_labels: of the training examples; they set the class weights.
      val_labels: of the validation examples.
      steps_per_epoch: updates between two validations.
      checkpoints, workdir: see `loop.fit`.

    Raises:
      UserError: see `loop.fit`.
    """
    class_weights = compute_class_weights(list(count_classes(train_labels).values()))
    learning_rate = create_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.num_epochs * steps_per_epoch,
    )
    optimizer = create_optimizer(
        learning_rate, weight_decay=config.weight_decay, decay=config.decay, is_frozen=is_frozen
    )
    init_key, train_key = jax.random.split(jax.random.key(seed))

    def create_state() -> TrainState:
        # Run once: compiling it well would take longer than running it badly.
        initialise = jax.jit(create_variables, compiler_options={'xla_backend_optimization_level': 0})
        variables = load_weights(initialise(init_key))
        return place_state(create_train_state(variables, optimizer, train_key))

    def place_batches(state: TrainState) -> Iterator[dict]:
        batches = load_batches(state)  # at once: the first step gives the state away
        return (place_batch(batch, config.parallelism) for batch in batches)

    def describe_step(step: int) -> str:
        return f'learning rate {float(learning_rate(step)):g}, batch of {join_faults(name_batch(step))}'

    def validate(variables: dict[str, Any]) -> tuple[float, float]:
        logits, labels = compute_val_logits(variables), np.asarray(val_labels)
        losses, weights = weighted_cross_entropy(logits, labels, class_weights)
        return float(losses.sum() / weights.sum()), float((logits.argmax(-1) == labels).mean())

    return loop.fit(
        create_template(lambda key: create_train_state(create_variables(key), optimizer, key)),
        create_state,
        compile_step(
            functools.partial(
                train_step,
                forward=forward,
                optimizer=optimizer,
                class_weights=class_weights,
                augmentation=AugmentOptions() if config.augment else None,
                dtype=config.dtype,
                accumulation_steps=config.accumulation_steps,
            ),
            config.parallelism,
        ),
        validate,
        place_batches,
        describe_step,
        schedule=loop.Schedule(
            steps_per_epoch=steps_per_epoch,
            num_epochs=config.num_epochs,
            patience=config.patience,
            min_delta=config.min_delta,
            checkpoint_steps=config.checkpoint_steps,
            examples_per_step=config.batch_size,
        ),
        checkpoints=checkpoints,
        workdir=workdir,
    )


def save_usual(workdir: Path, extractor: Att2, variables: dict[str, Any], data: covidx_ct.Prepared) -> None:
    """Writes novelty.npz, what is usual among validation slices, for predictions to tell what is not.

    Args:
      workdir: of the run.
      extractor, variables: the slice model.
      data: with the validation slices, of which at most `MAX_EXAMPLES`, spread evenly, are used.
    """
    rows, source = data.rows['val'], data.sources['val']
    chosen = np.unique(np.linspace(0, len(rows) - 1, MAX_EXAMPLES).round().astype(int)).tolist()
    statistics = compute_outputs(extractor, variables, np.stack([source[i]['image'] for i in chosen])).statistics
    novelty = fit_novelty(statistics, [rows[i].patient for i in chosen])
    path = workdir / 'novelty.npz'
    if novelty is None:
        path.unlink(missing_ok=True)  # one of an earlier evaluation
    else:
        save_novelty(path, novelty)


def describe_data(config: ConfigDict, data: covidx_ct.Prepared) -> dict[str, Any]:
    """Returns the parts of results.json that say what the run was made on."""
    return {
        'data': 'phantoms' if not config.raw_dir else f'COVIDx CT-{data.version} layout',
        'notice': PHANTOM_NOTICE if not config.raw_dir else '',
        'dataset': {
            'raw_dir': config.raw_dir,
            'version': data.version,
            'fingerprint': data.fingerprint,
            'image_size': config.image_size,
            'slices': {split: count_classes([row.label for row in rows]) for split, rows in data.rows.items()},
            'num_dropped': len(data.dropped),
        },
    }


def describe_training(history: Sequence[dict], min_delta: float, pretrained: str) -> dict[str, Any]:
    """Returns the part `training` of results.json; `pretrained` is that of the section `model` of the slice model."""
    best_epoch = loop.find_best_epoch([entry['val_loss'] for entry in history], min_delta)
    return {
        'pretrained': pretrained or 'none (from scratch)',
        'num_epochs': len(history),
        'best_epoch': best_epoch,
        'best_val_loss': history[best_epoch - 1]['val_loss'],
        'num_steps': history[-1]['step'],
        'seconds': round(sum(entry['seconds'] + entry['val_seconds'] for entry in history), 1),
    }


def write_results(
    workdir: Path,
    results: dict[str, Any],
    rules: dict[str, Any],
    *,
    config: ConfigDict,
    history: Sequence[dict],
    unit: str,
    table: str,
    published: Sequence[Sequence[float]] | None,
    others: Mapping[str, dict],
    sections: Sequence[report.Section],
    start: float,
) -> None:
    """Writes what the tests of both experiments leave: calibration.json, figures, report.html and, last, results.json.

    Args:
      workdir: of the run.
      results: the content of results.json but `training.test_seconds`, which is added.
      rules: of `screening.fit_rules`.
      config: of the run.
      history: of `loop.fit`.
      unit: what was classified, 'slices' or 'scans'.
      table, published, others: see `report.build_scores`.
      sections: of the report, those that only this experiment has.
      start: of the test, by `time.perf_counter`.
    """
    write_json(workdir / 'calibration.json', rules)
    curves = figures.render_training_curves(history, results['training']['best_epoch'])
    figures.save_figure(curves, workdir / 'training_curves.png')
    title = f'Test {unit}, {results["data"]}'
    confusion = figures.render_confusion_matrix(results['confusion_matrix'], CLASSES, title=title)
    figures.save_figure(confusion, workdir / 'confusion_matrix.png')
    report.write_report(
        workdir / 'report.html',
        results,
        [
            *report.build_scores(results, published, table=table, unit=unit, others=others),
            *report.build_statistics(results, rules, unit=unit),
            *sections,
            report.build_training(results, flatten_config(config), history),
            report.build_limits(results),
        ],
        unit=unit,
    )
    results['training']['test_seconds'] = round(time.perf_counter() - start, 1)
    write_json(workdir / 'results.json', results)


def describe_environment() -> dict[str, Any]:
    """Returns versions and devices of this process."""
    return {
        'covidjax': covidjax.__version__,
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in ('jax', 'flax', 'optax')},
        'devices': [device.device_kind for device in jax.devices()],
        'cpu_cores': os.cpu_count(),
    }


def format_baselines(results: dict[str, Any]) -> list[str]:
    """Returns the accuracy of every baseline, a line each."""
    return [
        f'{name:<18}{format_score(metrics["accuracy"], metrics["intervals"]["accuracy"])} accuracy'
        for name, metrics in results['baselines'].items()
    ]


def format_ending(results: dict[str, Any], workdir: Path, *, unit: str) -> list[str]:
    """Returns the last lines of a summary: what the brackets are, which data, what was tested, where things are."""
    intervals, training = results['intervals'], results['training']
    return [
        f'Brackets: {intervals["level"]:.0%} intervals, {intervals["method"]}.',
        *([f'Data: {results["notice"]}.'] if results['notice'] else []),
        f'Tested: epoch {training["best_epoch"]} of {training["num_epochs"]} (lowest validation loss), '
        f'{results["num_examples"]:,} {unit} of {results["num_patients"]} patients.',
        f'Report: {workdir / "report.html"}',
        f'Results, predictions and figures: {workdir}',
    ]
