"""Defines what an experiment consists of, and trains and tests it.

Shapes: N examples of a split, K classes.
"""

import dataclasses
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import covidjax
from covidjax.data import covidx_ct, phantom
from covidjax.data.folds import read_fold, select_fold
from covidjax.data.lists import CLASSES, find_absent_classes
from covidjax.data.sources import (
    count_sources,
    describe_lone_classes,
    find_lone_classes,
    parse_sources,
    select_sources,
)
from covidjax.errors import UserError, join_faults
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.home import choose_slices, fit_home, save_home
from covidjax.evaluation.metrics import format_score
from covidjax.evaluation.novelty import MAX_EXAMPLES, fit_novelty, save_novelty
from covidjax.evaluation.outputs import compute_outputs
from covidjax.evaluation.predictions import write_predictions
from covidjax.evaluation.screening import fit_rules
from covidjax.evaluation.subgroups import compute_subgroups, read_columns
from covidjax.evaluation.summary import summarise
from covidjax.experiment.config import check_config, check_workdir, flatten_config, load_config, save_config
from covidjax.experiment.workdir import lock_workdir
from covidjax.files import report_full_disk, write_json
from covidjax.models.att2 import Att2
from covidjax.training import loop
from covidjax.training.augment import Augmentation, AugmentOptions, ScannerOptions
from covidjax.training.checkpoints import Checkpoints, open_checkpoints
from covidjax.training.devices import check_batch_size, compile_step, create_shardings, place_batch, place_state
from covidjax.training.hosts import is_first
from covidjax.training.losses import (
    Objective,
    compute_class_weights,
    create_cross_entropy,
    weighted_cross_entropy,
)
from covidjax.training.optimizer import create_optimizer, create_schedule
from covidjax.training.state import TrainState, create_train_state
from covidjax.training.step import Forward, train_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from covidjax.report.sections import Section

log = logging.getLogger(__name__)

PHANTOM_NOTICE = 'generated phantoms, not patients: these figures say that the code works, nothing about disease'


class Example(Protocol):
    """One example to classify: a row of a list (`lists.Row`) or a scan (`sequences.Scan`)."""

    label: int
    patient: str
    source: str


class Predictions(NamedTuple):
    """Outputs of a slice model for a split, in the order of the split.

    Attributes:
      logits: [N, K]; with `config.lesions`, of the verdict that joins lesions and classifier.
      classifier: with `config.lesions`, the classifier's own logits; else None.
      sick: with `config.lesions`, the probability of sick by the lesions [N]; else None.
    """

    logits: np.ndarray
    classifier: np.ndarray | None = None
    sick: np.ndarray | None = None


class PaperTable(NamedTuple):
    """A table of results in the paper.

    Attributes:
      name: e.g. 'Table III'.
      test_counts: number of test examples per class.
      scores: precision, recall and F1 of each class and of their weighted average.
    """

    name: str
    test_counts: tuple[int, ...]
    scores: Sequence[Sequence[float]]


class Findings(NamedTuple):
    """Results of a test, apart from the scores of the model.

    Attributes:
      baselines: name -> probabilities or scores [N, K] of a trivial classifier on the test examples.
      comparisons: parts of results.json that compare the model with the baselines.
      results: further parts of results.json.
      rules: further parts of calibration.json.
      others: further classifiers for the report, name -> result of `compute_metrics`.
      columns: columns of predictions.csv, name -> one value per test example.
      figures: figures to save as PNG, by file name.
      sections: sections of the report.
    """

    baselines: dict[str, np.ndarray]
    comparisons: dict[str, Any]
    results: dict[str, Any]
    rules: dict[str, Any]
    others: dict[str, dict]
    columns: dict[str, Sequence[Any]]
    figures: 'dict[str, Figure]'
    sections: 'list[Section]'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model and its loaded data: what `fit` needs.

    Attributes:
      config: config of the run.
      create_variables: key -> initial variables; jitted by `fit`.
      load_weights: initial variables -> the same with stored weights filled in; called in new runs only.
      forward: see `step.Forward`.
      objective: the loss.
      is_frozen: path of a parameter -> whether training leaves it unchanged.
      load_batches: state -> the following training batches, with the rows of this process, on the host.
      name_batch: step number -> names of the examples in its batch.
      steps_per_epoch: number of updates between two validations.
      validate: variables -> (mean loss, mean score) of the validation split.
    """

    config: ConfigDict
    create_variables: Callable[[jax.Array], dict[str, Any]]
    load_weights: Callable[[dict[str, Any]], dict[str, Any]]
    forward: Forward
    objective: Objective
    is_frozen: Callable[[str], bool]
    load_batches: Callable[[TrainState], Iterator[dict]]
    name_batch: Callable[[int], list[str]]
    steps_per_epoch: int
    validate: Callable[[dict[str, Any]], tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Experiment):
    """An experiment that classifies slices or scans: what `test` needs as well.

    Attributes:
      data: prepared slices.
      title: name of the model in results and pages.
      unit: kind of example, 'slices' or 'scans'.
      paper: the paper's results.
      examples: the examples to classify, by split.
      slice_model: the model of single slices; in a scan experiment, the frozen extractor.
      get_slice_variables: variables -> variables of the slice model.
      predict: (variables, split) -> outputs with `.logits` [N, K], in evaluation mode.
      examine: (variables, {split: outputs of `predict`}, rules of `screening.fit_rules`) -> findings on the test split.
      compute_baselines: () -> `Findings.baselines`.
    """

    data: covidx_ct.Prepared
    title: str
    unit: str
    paper: PaperTable
    examples: dict[str, Sequence[Example]]
    slice_model: Att2
    get_slice_variables: Callable[[dict[str, Any]], dict[str, Any]]
    predict: Callable[[dict[str, Any], str], Any]
    examine: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Findings]
    compute_baselines: Callable[[], dict[str, np.ndarray]]

    def get_labels(self, split: str) -> np.ndarray:
        """Returns the classes of a split's examples, int [N]."""
        return np.array([example.label for example in self.examples[split]])

    def get_patients(self, split: str) -> list[str]:
        """Returns the patient of every example of a split."""
        return [example.patient for example in self.examples[split]]


@dataclasses.dataclass(frozen=True)
class Procedure:
    """How a kind of experiment loads its data, trains and tests.

    Attributes:
      load_data: (config section `data`, workdir) -> the loaded data.
      create_experiment: (config, data) -> the experiment; not called if the run is finished.
      test: (experiment, checkpoints, history, workdir) -> content of results.json, which it writes last.
      format_summary: (results, workdir) -> text.
      settle: (config, data) -> the config to run and save, with what only the data decide.
    """

    load_data: Callable[[ConfigDict, Path], Any]
    create_experiment: Callable[[ConfigDict, Any], Experiment]
    test: Callable[[Any, Checkpoints, Sequence[dict], Path], dict[str, Any]]
    format_summary: Callable[[dict[str, Any], Path], str]
    settle: Callable[[ConfigDict, Any], ConfigDict] = lambda config, data: config


def train(config: ConfigDict, workdir: Path, procedure: Procedure, data: Any = None) -> dict[str, Any]:
    """Trains and tests in a workdir, or resumes its run; prints the summary and returns the results.

    Args:
      config: config of the run.
      workdir: created if absent. Afterwards it holds config.json, checkpoints/, metrics.jsonl, tensorboard/,
        results.json, predictions.csv, calibration.json, report.html and figures; of a classification also novelty.npz,
        sources.npz, preprocessing.json and checklist.html; with phantoms also phantoms/.
      procedure: of the kind of experiment.
      data: the data of `config.data`, if already loaded.

    Raises:
      UserError: bad config or data; the workdir can't be written, is in use, or belongs to another config; the batch
        does not divide over the devices.
    """
    check_config(config)
    with lock_workdir(workdir), report_full_disk(workdir):
        check_workdir(workdir, config)
        if (workdir / 'results.json').exists():
            log.info('%s holds a finished run; its summary:', workdir)
            results = load_output(workdir, 'results.json')
        else:
            check_batch_size(config.train.batch_size, config.train.accumulation_steps)
            data = data or procedure.load_data(config.data, workdir)
            config = procedure.settle(config, data)
            save_config(workdir, config)
            experiment = procedure.create_experiment(config, data)
            with open_checkpoints(workdir) as checkpoints:
                history = fit(experiment, checkpoints, workdir)
                results = procedure.test(experiment, checkpoints, history, workdir)
    if is_first():
        print(procedure.format_summary(results, workdir))
    return results


def evaluate(workdir: Path, procedure: Procedure) -> dict[str, Any]:
    """Tests the best model of a run again, prints the summary and returns the results.

    Raises:
      UserError: the folder is not the workdir of a run with a finished epoch, or its data are missing.
    """
    config = load_config(workdir)
    with lock_workdir(workdir), report_full_disk(workdir):
        history = loop.read_history(workdir)
        experiment = procedure.create_experiment(config, procedure.load_data(config.data, workdir))
        with open_checkpoints(workdir) as checkpoints:
            results = procedure.test(experiment, checkpoints, history, workdir)
    if is_first():
        print(procedure.format_summary(results, workdir))
    return results


def load_output(workdir: Path, name: str) -> dict[str, Any]:
    """Loads a JSON file that the test of a run wrote: results.json or calibration.json.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return json.loads((workdir / name).read_text())
    except FileNotFoundError as error:
        raise UserError(f'{workdir} has no {name}: run its training command again, or --mode=evaluate') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{workdir / name} is unreadable: --mode=evaluate writes it again') from error


def load_data(config: ConfigDict, workdir: Path) -> covidx_ct.Prepared:
    """Loads the slices of the raw directory; without one, of phantoms that are written to the workdir."""
    raw_dir = Path(config.raw_dir).expanduser()  # shells do not expand a ~ after a colon
    if not config.raw_dir:
        log.warning('no raw directory after --config: using %s', PHANTOM_NOTICE)
        raw_dir = write_phantoms_once(workdir, config.phantom_seed)
    data = covidx_ct.prepare(
        raw_dir,
        image_size=config.image_size,
        region=config.region,
        prepared_dir=config.prepared_dir,
        skip_bad=config.skip_bad,
    )
    if data.dropped and is_first():
        log.warning('%d bad images were dropped; they are listed in dropped_images.json', len(data.dropped))
        write_json(workdir / 'dropped_images.json', [{'file': file, 'reason': reason} for file, reason in data.dropped])
    data = select_sources(data, parse_sources(config.sources))
    fold = read_fold(workdir)
    if fold is not None:
        data = select_fold(data, fold)
        log.info('%s: its patients are the test split; the test list takes no part', fold.name)
    for warning in find_warnings(data):
        log.warning('%s', warning)
    for split, rows in data.rows.items():
        log.info('%s: %s', split, format_counts([row.label for row in rows]))
    return data


def write_phantoms_once(workdir: Path, seed: int) -> Path:
    """Writes phantoms to the workdir, by the first process; returns their raw directory."""
    raw_dir = workdir / 'phantoms'
    if is_first():
        phantom.write_phantoms(raw_dir, phantom.PhantomOptions(seed=seed))
    multihost_utils.sync_global_devices('phantoms')
    return raw_dir


def count_classes(labels: Sequence[int]) -> dict[str, int]:
    """Returns the number of examples of every class."""
    return dict(zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)).tolist(), strict=True))


def format_counts(labels: Sequence[int]) -> str:
    """Returns e.g. '35,996 normal, 25,496 pneumonia, 82,286 covid19'."""
    return ', '.join(f'{count:,} {name}' for name, count in count_classes(labels).items())


def create_template(create: Callable[[jax.Array], Any]) -> Any:
    """Returns the shapes, dtypes and (replicated) shardings of `create(key)` without computing it."""
    _, replicated = create_shardings()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(create, jax.random.key(0)),
    )


def fit(experiment: Experiment, checkpoints: Checkpoints, workdir: Path) -> list[dict]:
    """Trains with the options of `config.train` and returns the history of `loop.fit`.

    Raises:
      UserError: see `loop.fit`.
    """
    config = experiment.config.train
    learning_rate = create_schedule(
        config.schedule,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=config.num_epochs * experiment.steps_per_epoch,
    )
    optimizer = create_optimizer(
        learning_rate,
        weight_decay=config.weight_decay,
        decay=config.decay,
        ema_decay=config.ema_decay,
        is_frozen=experiment.is_frozen,
    )
    init_key, train_key = jax.random.split(jax.random.key(experiment.config.seed))

    def create_state() -> TrainState:
        # This runs once: optimising the program would take longer than running it unoptimised.
        initialise = jax.jit(experiment.create_variables, compiler_options={'xla_backend_optimization_level': 0})
        variables = experiment.load_weights(initialise(init_key))
        # One program: jax would compile, or load, one for every shape of the optimizer's state.
        return place_state((variables, train_key), lambda both: create_train_state(both[0], optimizer, both[1]))

    def load_batches(state: TrainState) -> Iterator[dict]:
        batches = experiment.load_batches(state)  # called now, not lazily: the first step donates the state
        return (place_batch(batch, config.parallelism) for batch in batches)

    def describe_step(step: int) -> str:
        names = join_faults(experiment.name_batch(step))
        return f'learning rate {float(learning_rate(step)):g}, batch of {names}'

    step = functools.partial(
        train_step,
        forward=experiment.forward,
        optimizer=optimizer,
        objective=experiment.objective,
        augmentation=create_augmentation(config),
        dtype=config.dtype,
        accumulation_steps=config.accumulation_steps,
    )
    task = loop.Task(
        template=create_template(
            lambda key: create_train_state(experiment.create_variables(key), optimizer, key),
        ),
        create_state=create_state,
        step=compile_step(step, config.parallelism),
        validate=experiment.validate,
        load_batches=load_batches,
        describe_step=describe_step,
        score=experiment.objective.score,
    )
    schedule = loop.Schedule(
        steps_per_epoch=experiment.steps_per_epoch,
        num_epochs=config.num_epochs,
        patience=config.patience,
        min_delta=config.min_delta,
        checkpoint_steps=config.checkpoint_steps,
        examples_per_step=config.batch_size,
    )
    return loop.fit(task, schedule, checkpoints, workdir)


def create_classification_loss(
    labels: dict[str, Sequence[int]],
    label_smoothing: float,
    compute_val_logits: Callable[[dict[str, Any]], np.ndarray],
    *,
    is_balanced: bool = False,
) -> dict[str, Any]:
    """Returns the fields `objective` and `validate` of a classification.

    Args:
      labels: of the examples of 'train', which give the class weights, and of 'val'.
      label_smoothing: see `losses.weighted_cross_entropy`; validation is without.
      compute_val_logits: variables -> logits [N, K] of the validation examples.
      is_balanced: classes come equally often in training, so that they weigh the same there.
    """
    class_weights = compute_class_weights(list(count_classes(labels['train']).values()))
    train_weights = tuple(float(weight > 0) for weight in class_weights) if is_balanced else class_weights
    val_labels = np.asarray(labels['val'])

    def validate(variables: dict[str, Any]) -> tuple[float, float]:
        logits = compute_val_logits(variables)
        losses, weights = weighted_cross_entropy(logits, val_labels, class_weights)
        return float(losses.sum() / weights.sum()), float((logits.argmax(-1) == val_labels).mean())

    return {'objective': create_cross_entropy(train_weights, label_smoothing), 'validate': validate}


def create_augmentation(config: ConfigDict) -> Augmentation | None:
    """Returns the augmentation options of the config section `train`, or None without augmentation."""
    if config.augment == 'none':
        return None
    if config.augment == 'scanner':
        return ScannerOptions()
    return AugmentOptions(scale=tuple(config.scale), brightness=config.brightness, contrast=config.contrast)


def restore_best(create_variables: Callable[[jax.Array], dict[str, Any]], checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    return checkpoints.restore_best(create_template(create_variables))


def test(
    experiment: Classification, checkpoints: Checkpoints, history: Sequence[dict], workdir: Path
) -> dict[str, Any]:
    """Tests the model of the best epoch and writes the files that `train` lists, results.json last.

    Temperature, thresholds and conformal sets are chosen on validation and stored in calibration.json. predictions.csv
    has the model's uncalibrated probabilities.

    Returns:
      The content of results.json. With several processes, only the first writes and returns it; others return {}.
    """
    # Imported here: matplotlib takes a third of a second, which would delay the first training step.
    from covidjax.experiment.preprocessing import describe_preprocessing
    from covidjax.report import figures, sections
    from covidjax.report.checklist import write_checklist
    from covidjax.report.subgroups import build_subgroups

    start = time.perf_counter()
    config, data, unit = experiment.config, experiment.data, experiment.unit
    variables = restore_best(experiment.create_variables, checkpoints)
    predictions = {split: experiment.predict(variables, split) for split in ('val', 'test')}
    if not is_first():
        return {}
    variables = jax.device_get(variables)  # only the first process continues
    val_labels, labels = experiment.get_labels('val'), experiment.get_labels('test')
    patients = experiment.get_patients('test')
    log.info('computing statistics, baselines and explanations of %d test %s', len(labels), unit)

    logits = predictions['test'].logits
    rules = fit_rules(predictions['val'].logits, val_labels, experiment.get_patients('val'), CLASSES)
    findings = experiment.examine(variables, predictions, rules)
    rules |= findings.rules
    train_labels = experiment.get_labels('train')
    results = {
        **describe_data(config.data, data),
        'model': experiment.title,
        'split': 'test',
        **summarise(
            rules,
            logits,
            labels,
            patients,
            CLASSES,
            baselines=findings.baselines,
            train_shares_K=np.bincount(train_labels, minlength=len(CLASSES)) / len(train_labels),
        ),
        **findings.comparisons,
        'subgroups': compute_subgroups(
            read_columns(data.raw_dir, experiment.examples['test'], data.rows['test']),
            labels,
            apply_temperature(logits, rules['temperature']),
            patients,
            CLASSES,
            {target: chosen['threshold'] for target, chosen in rules['thresholds'].items()},
        ),
        **findings.results,
        'training': describe_training(experiment, history),
        'environment': describe_environment(),
    }
    write_predictions(workdir / 'predictions.csv', findings.columns)
    of_slices = experiment.get_slice_variables(variables)
    save_usual(workdir, experiment.slice_model, of_slices, data)
    write_json(workdir / 'calibration.json', rules)
    write_json(workdir / 'preprocessing.json', describe_preprocessing(config, data.fingerprint))
    drawn = {
        'training_curves.png': figures.render_training_curves(history, results['training']['best_epoch']),
        'confusion_matrix.png': figures.render_confusion_matrix(
            results['confusion_matrix'], CLASSES, title=f'Test {unit}, {results["data"]}'
        ),
        **findings.figures,
    }
    for name, figure in drawn.items():
        figures.save_figure(figure, workdir / name)
    is_the_papers = tuple(count_classes(labels).values()) == experiment.paper.test_counts
    published = experiment.paper.scores if is_the_papers else None
    parts = [
        *sections.build_scores(results, published, table=experiment.paper.name, unit=unit, others=findings.others),
        *sections.build_verdicts(results.get('verdicts'), unit=unit),
        *sections.build_statistics(results, rules, unit=unit),
        *build_subgroups(results['subgroups'], unit=unit),
        *findings.sections,
        *sections.build_sources(results['dataset']),
        sections.build_training(results, flatten_config(config), history),
        sections.build_limits(results),
    ]
    sections.write_report(workdir / 'report.html', results, parts, unit=unit)
    write_checklist(workdir / 'checklist.html', results, flatten_config(config), [])
    results['training']['test_seconds'] = round(time.perf_counter() - start, 1)
    write_json(workdir / 'results.json', results)
    return results


def save_usual(workdir: Path, slice_model: Att2, variables: dict[str, Any], data: covidx_ct.Prepared) -> None:
    """Writes what predictions need to detect unusual slices and to name the nearest source.

    novelty.npz has the usual features of validation slices, at most `MAX_EXAMPLES`, spread evenly over the split.
    sources.npz has those of every source, of training and validation slices (see `home`).
    """

    def compute_statistics(places: Sequence[tuple[str, int]]) -> np.ndarray:
        images = np.stack([data.sources[split][i]['image'] for split, i in places])
        return compute_outputs(slice_model, variables, images).statistics

    rows = data.rows['val']
    chosen = np.unique(np.linspace(0, len(rows) - 1, MAX_EXAMPLES).round().astype(int)).tolist()
    novelty = fit_novelty(compute_statistics([('val', i) for i in chosen]), [rows[i].patient for i in chosen])
    pool = [(split, i) for split in ('train', 'val') for i in range(len(data.rows[split]))]
    of_pool = [data.rows[split][i].source for split, i in pool]
    spread = choose_slices(of_pool, MAX_EXAMPLES)
    home = fit_home(compute_statistics([pool[i] for i in spread]), [of_pool[i] for i in spread]) if spread else None
    for name, found, save in (('novelty.npz', novelty, save_novelty), ('sources.npz', home, save_home)):
        if found is None:
            (workdir / name).unlink(missing_ok=True)  # left by an earlier test
        else:
            save(workdir / name, found)


def name_data(config: ConfigDict, data: covidx_ct.Prepared) -> str:
    """Returns e.g. 'COVIDx CT-2A layout', 'phantoms' or 'phantoms, fold 1 of 5'."""
    name = f'COVIDx CT-{data.version} layout' if config.raw_dir else 'phantoms'
    return f'{name}, {data.fold}' if data.fold else name


def find_warnings(data: covidx_ct.Prepared) -> list[str]:
    """Returns the warnings that every output of a run on these data must show."""
    absent = [
        f'no training slice is {name}: the model cannot tell this class, and calls its cases something else'
        for name in find_absent_classes(data.rows['train'])
    ]
    lone = describe_lone_classes(find_lone_classes(data.rows['train']))
    return absent + [lone] * bool(lone)


def create_source_column(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Returns the column `source` of a table of predictions; none if no source is known."""
    sources = [example.source for example in examples]
    return {'source': sources} if any(sources) else {}


def describe_data(config: ConfigDict, data: covidx_ct.Prepared) -> dict[str, Any]:
    """Returns the parts of results.json that describe the data."""
    return {
        'data': name_data(config, data),
        'notice': PHANTOM_NOTICE if not config.raw_dir else '',
        **({'warnings': warnings} if (warnings := find_warnings(data)) else {}),
        'dataset': {
            'raw_dir': config.raw_dir,
            'version': data.version,
            'fingerprint': data.fingerprint,
            'image_size': config.image_size,
            'slices': {split: count_classes([row.label for row in rows]) for split, rows in data.rows.items()},
            'sources': count_sources(data.rows),
            'num_dropped': len(data.dropped),
        },
    }


def describe_training(experiment: Experiment, history: Sequence[dict]) -> dict[str, Any]:
    """Returns the part `training` of results.json."""
    config = experiment.config
    model = config.model if 'pretrained' in config.model else config.att2.model
    pretrained = f'{model.pretrained}, frozen' if model.get('frozen') else model.pretrained
    best_epoch = loop.find_best_epoch([entry['val_loss'] for entry in history], config.train.min_delta)
    return {
        'pretrained': pretrained or 'none (from scratch)',
        'num_epochs': len(history),
        'best_epoch': best_epoch,
        'best_val_loss': history[best_epoch - 1]['val_loss'],
        'num_steps': history[-1]['step'],
        'seconds': round(sum(entry['seconds'] + entry['val_seconds'] for entry in history), 1),
    }


def describe_environment() -> dict[str, Any]:
    """Returns the versions and devices of this process."""
    return {
        'covidjax': covidjax.__version__,
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in ('jax', 'flax', 'optax')},
        'devices': [device.device_kind for device in jax.devices()],
        'cpu_cores': os.cpu_count(),
    }


def format_baselines(results: dict[str, Any]) -> list[str]:
    """Returns one line with the accuracy of each baseline."""
    return [
        f'{name:<18}{format_score(metrics["accuracy"], metrics["intervals"]["accuracy"])} accuracy'
        for name, metrics in results['baselines'].items()
    ]


def format_ending(results: dict[str, Any], workdir: Path, *, unit: str) -> list[str]:
    """Returns the last lines of a summary: intervals, data, tested model and output files."""
    intervals, training = results['intervals'], results['training']
    return [
        f'Brackets: {intervals["level"]:.0%} intervals, {intervals["method"]}.',
        *([f'Data: {results["notice"]}.'] if results['notice'] else []),
        *(f'Warning: {warning}.' for warning in results.get('warnings', ())),
        f'Tested: epoch {training["best_epoch"]} of {training["num_epochs"]} (lowest validation loss), '
        f'{results["num_examples"]:,} {unit} of {results["num_patients"]} patients.',
        f'Report: {workdir / "report.html"}',
        f'Results, predictions and figures: {workdir}',
    ]
