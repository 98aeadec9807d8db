"""The paper's second approach from config to results: a sequence model on scans, and the slice model's votes."""

import csv
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from covidjax import experiment, scan_report, slice_experiment
from covidjax.data import covidx_ct, published, scans
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.data.scans import Scan
from covidjax.errors import UserError
from covidjax.evaluation import baselines, figures, voting
from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.metrics import compute_metrics, format_table
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.screening import evaluate_rules, fit_rules
from covidjax.fast import compile_fast
from covidjax.files import replace_file
from covidjax.models.att2 import normalise
from covidjax.models.seq import Seq, SeqOutputs, is_extractor
from covidjax.scan_embeddings import compute_embeddings, run_pass
from covidjax.training.checkpoints import Checkpoints, open_checkpoints
from covidjax.training.devices import get_shard, pad_batch_size, replicate
from covidjax.training.hosts import is_first
from covidjax.training.state import TrainState
from covidjax.training.step import Forward
from covidjax.training.workdir import load_config, save_config

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the experiment, or goes on with it where it stopped, prints its summary and returns its results.

    Args:
      config: see configs/seq.py.
      workdir: created if absent. Afterwards it holds what `slice_experiment.train` leaves, predictions.csv with a row
        per scan, and, where no extractor was named, the slice experiment under extractor/.

    Raises:
      UserError: bad config, data, extractor or workdir.
    """
    extractor_dir = Path(config.extractor) if config.extractor else workdir / 'extractor'
    if config.extractor:
        config = adopt_extractor(config, extractor_dir)

    def execute() -> dict[str, Any]:
        data = experiment.load_data(config.data, workdir)
        save_config(workdir, config)
        if not config.extractor:
            log.info('no config.extractor: training the slice model into %s', extractor_dir)
            slice_experiment.train(get_slice_config(config), extractor_dir, data)
        with open_checkpoints(workdir) as checkpoints:
            history = fit(config, data, extractor_dir, checkpoints, workdir)
            return test(config, data, checkpoints, history, workdir)

    return experiment.run(config, workdir, execute, format_summary)


def evaluate(workdir: Path) -> dict[str, Any]:
    """Tests the best model of a workdir again and writes the same files as the end of `train`."""
    return experiment.evaluate(workdir, test, format_summary)


def get_slice_config(config: ConfigDict) -> ConfigDict:
    """Returns the config of the slice experiment that a config with nested `att2` asks for."""
    data = config.data.copy_and_resolve_references().unlock()
    del data.min_slices, data.cached_draws
    return ConfigDict({'name': 'att2', 'data': data, **config.att2}).lock()


def adopt_extractor(config: ConfigDict, extractor_dir: Path) -> ConfigDict:
    """Returns the config with the slice model of a finished att2 run.

    Raises:
      UserError: the folder is not such a run, or it was trained on slices of another size.
    """
    extractor = load_config(extractor_dir)
    if extractor.name != 'att2':
        raise UserError(
            f'config.extractor={extractor_dir} is the workdir of a {extractor.name!r} run; it must be one of att2'
        )
    if not (extractor_dir / 'results.json').exists():
        raise UserError(f'config.extractor={extractor_dir} has not finished: run its training command again first')
    if extractor.data.image_size != config.data.image_size:
        raise UserError(
            f'config.extractor={extractor_dir} was trained on slices of {extractor.data.image_size} pixels: pass '
            f'--config.data.image_size={extractor.data.image_size} (now {config.data.image_size})'
        )
    config = config.copy_and_resolve_references().unlock()
    config.att2.model = extractor.model
    return config.lock()


def create_model(config: ConfigDict) -> Seq:
    """Returns the sequence model with its extractor."""
    return Seq(extractor=slice_experiment.create_model(config.att2.model), hidden=config.model.hidden)


def create_variables(model: Seq, image_size: int, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters and batch statistics, the extractor's included."""
    return model.init(key, jnp.zeros((1, image_size, image_size, 1)), jnp.ones(1, jnp.int32))


class Selection(NamedTuple):
    """The scans of one split that take part.

    Attributes:
      scans: with the slices that are used.
      whole: the same scans with all their slices.
      left_out: number of scans with too few slices, per class.
    """

    scans: list[Scan]
    whole: list[Scan]
    left_out: dict[str, int]


def select_scans(config: ConfigDict, data: covidx_ct.Prepared) -> dict[str, Selection]:
    """Returns the scans of each split that take part under `config.data.min_slices`.

    Raises:
      UserError: a split has none.
    """
    selections = {}
    for split in SPLITS:
        every = scans.group_scans(data.rows[split])
        whole = [scan for scan in every if len(scan.records) >= config.min_slices]
        left_out = [scan.label for scan in every if len(scan.records) < config.min_slices]
        if not whole:
            raise UserError(
                f'no scan of {split} has {config.min_slices} slices: lower --config.data.min_slices (1 takes all)'
            )
        selections[split] = Selection(
            scans.thin_scans(whole, config.min_slices), whole, experiment.count_classes(left_out)
        )
    return selections


class ScanPredictions(NamedTuple):
    """Predictions of M scans in the order of the split.

    Attributes:
      logits: [M, K] of the sequence model.
      attention: per scan [T].
      slice_probabilities: per scan [T, K], of the slice model alone.
    """

    logits: np.ndarray
    attention: list[np.ndarray]
    slice_probabilities: list[np.ndarray]


# Of the module, so that validation and test share their compilations.
@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Seq, variables: dict[str, Any], batch: dict[str, jax.Array]) -> SeqOutputs:
    return replicate(model.apply(variables, normalise(batch['image']), batch['length']))


def create_predictor(
    model: Seq, data: covidx_ct.Prepared, selections: dict[str, Selection], batch_size: int
) -> Callable[[dict[str, Any], str], ScanPredictions]:
    """Returns (variables, split) -> predictions in evaluation mode."""
    batch_size = pad_batch_size(batch_size)

    def predict(variables, split):
        found = {}
        chosen = selections[split].scans
        load_slices = scans.load_images(data.sources[split], chosen)
        batches = scans.load_eval_scans(load_slices, chosen, batch_size=batch_size, shard=get_shard())
        apply = functools.partial(_apply, model, variables)
        for member, outputs in run_pass(apply, batches, chosen, batch_size):
            t = len(chosen[member].records)
            found[member] = (outputs.logits, outputs.attention[:t], softmax(outputs.slice_logits[:t]))
        logits, attention, slice_probabilities = zip(*(found[m] for m in range(len(found))), strict=True)
        return ScanPredictions(np.stack(logits), list(attention), list(slice_probabilities))

    return predict


class Feed(NamedTuple):
    """What training sees of scans.

    Attributes:
      load_batches, forward: see `experiment.fit`.
      compute_val_logits: variables -> logits of the validation scans, in evaluation mode.
    """

    load_batches: Callable[[TrainState], Iterator[dict]]
    forward: Forward
    compute_val_logits: Callable[[dict[str, Any]], np.ndarray]


def create_image_feed(
    config: ConfigDict, model: Seq, data: covidx_ct.Prepared, selections: dict[str, Selection]
) -> Feed:
    """Returns a feed of images, which go through the extractor in every step and every validation."""
    predict = create_predictor(model, data, selections, config.train.batch_size)

    def load_batches(state):
        chosen = selections['train'].scans
        return scans.load_train_scans(
            scans.load_images(data.sources['train'], chosen),
            chosen,
            batch_size=config.train.batch_size,
            seed=config.seed,
            first_step=int(state.step),
            shard=get_shard(),
        )

    def forward(variables, images, batch):
        return model.apply(variables, images, batch['length']).logits, variables['batch_stats']

    return Feed(load_batches, forward, lambda variables: predict(variables, 'val').logits)


def create_embedding_feed(
    config: ConfigDict, model: Seq, data: covidx_ct.Prepared, selections: dict[str, Selection]
) -> Feed:
    """Returns a feed of embeddings, computed anew by every run that starts or goes on, and then held in memory.

    They are those of the extractor in the state, so that they never are another one's.
    """
    batch_size = config.train.batch_size
    # More draws than epochs are never looked at; without augmentation one is all there are.
    num_draws = min(config.data.cached_draws, config.train.num_epochs) if config.train.augment else 1
    classifier = model.create_classifier()

    def embed(variables, split, **options):
        return compute_embeddings(
            model.extractor,
            {name: variables[name]['extractor'] for name in ('params', 'batch_stats')},
            data.sources[split],
            selections[split].scans,
            batch_size=batch_size,
            **options,
        )

    def load_batches(state):
        embeddings_DxNxE = embed(
            state.variables,
            'train',
            key=state.key if config.train.augment else None,
            num_draws=num_draws,
            dtype=config.train.dtype,
            title='embeddings of train',
        )
        chosen = selections['train'].scans
        return scans.load_train_scans(
            scans.load_embeddings(embeddings_DxNxE, chosen),
            chosen,
            batch_size=batch_size,
            seed=config.seed,
            first_step=int(state.step),
            shard=get_shard(),
        )

    def forward(variables, embeddings, batch):
        logits, _ = classifier.apply({'params': variables['params']['sequence']}, embeddings, batch['length'])
        return logits, variables['batch_stats']

    @jax.jit
    def classify(variables, batch):
        return replicate(forward(variables, batch['embedding'], batch)[0])

    val_1xNxE = None

    def compute_val_logits(variables):
        nonlocal val_1xNxE
        chosen, padded = selections['val'].scans, pad_batch_size(batch_size)
        if val_1xNxE is None:
            val_1xNxE = embed(variables, 'val', key=None, num_draws=1, dtype='float32', title='embeddings of val')
        load_slices = scans.load_embeddings(val_1xNxE, chosen)
        batches = scans.load_eval_scans(load_slices, chosen, batch_size=padded, shard=get_shard())
        found = dict(run_pass(functools.partial(classify, variables), batches, chosen, padded))
        return np.stack([found[member] for member in range(len(chosen))])

    return Feed(load_batches, forward, compute_val_logits)


def fit(
    config: ConfigDict, data: covidx_ct.Prepared, extractor_dir: Path, checkpoints: Checkpoints, workdir: Path
) -> list[dict]:
    """Trains the sequence part on top of the frozen extractor; returns the history of `loop.fit`."""
    model = create_model(config)
    selections = select_scans(config.data, data)
    chosen = {split: selection.scans for split, selection in selections.items()}
    for split in SPLITS:
        log.info('%s scans: %s', split, experiment.format_counts([scan.label for scan in chosen[split]]))
    create_feed = create_embedding_feed if config.data.cached_draws else create_image_feed
    feed = create_feed(config, model, data, selections)

    def load_weights(variables):
        with open_checkpoints(extractor_dir) as source:
            extractor = slice_experiment.restore_best(get_slice_config(config), source)
        return {name: {**variables[name], 'extractor': extractor[name]} for name in ('params', 'batch_stats')}

    def name_batch(step):
        _, members = scans.plan_steps(chosen['train'], config.train.batch_size, config.seed)(step)
        return [chosen['train'][i].scan for i in members]

    return experiment.fit(
        config.train,
        seed=config.seed,
        create_variables=functools.partial(create_variables, model, config.data.image_size),
        load_weights=load_weights,
        forward=feed.forward,
        is_frozen=is_extractor,
        load_batches=feed.load_batches,
        name_batch=name_batch,
        compute_val_logits=feed.compute_val_logits,
        train_labels=[scan.label for scan in chosen['train']],
        val_labels=[scan.label for scan in chosen['val']],
        steps_per_epoch=scans.count_batches(chosen['train'], config.train.batch_size),
        checkpoints=checkpoints,
        workdir=workdir,
    )


def restore_best(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    template = experiment.create_template(
        functools.partial(create_variables, create_model(config), config.data.image_size)
    )
    return checkpoints.restore_best(template)


def test(
    config: ConfigDict, data: covidx_ct.Prepared, checkpoints: Checkpoints, history: Sequence[dict], workdir: Path
) -> dict[str, Any]:
    """Tests the best epoch's model and the slice model's votes on the same scans and the same slices of them.

    Writes predictions.csv, calibration.json, novelty.npz, report.html, the figures and, last, results.json.

    Returns:
      The content of results.json: what was run, `compute_metrics` of the sequence model, and `scan_level`, the whole
      comparison. Of several processes only the first writes and returns it.
    """
    start = time.perf_counter()
    selections = select_scans(config.data, data)
    chosen = {split: selection.scans for split, selection in selections.items()}
    model, variables = create_model(config), restore_best(config, checkpoints)
    predict = create_predictor(model, data, selections, config.train.batch_size)
    predictions = {split: predict(variables, split) for split in ('val', 'test')}
    if not is_first():
        return {}
    labels = {split: np.array([scan.label for scan in chosen[split]]) for split in SPLITS}

    rule, val_accuracies = voting.choose_rule(predictions['val'].slice_probabilities, labels['val'])
    probabilities = softmax(predictions['test'].logits)
    patients = {split: [scan.patient for scan in chosen[split]] for split in SPLITS}
    rules = fit_rules(predictions['val'].logits, labels['val'], patients['val'], CLASSES)
    log.info('statistics, baselines and explanations of %d test scans', len(labels['test']))
    votes = {r: voting.vote_all(predictions['test'].slice_probabilities, r) for r in voting.RULES}
    scan_level = compare_on_scans(
        chosen['test'], labels['test'], probabilities, votes, rule, predictions['test'].slice_probabilities
    )
    scan_level['vote']['validation_accuracy'] = val_accuracies
    whole = {split: selection.whole for split, selection in selections.items()}
    slice_labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    thumbnail_scores, _ = baselines.compute_thumbnail_scores(data.sources, slice_labels)
    baseline_scores = {
        'majority class': baselines.compute_majority_scores(labels['train'], len(labels['test']), len(CLASSES)),
        'file names only': baselines.compute_file_name_scores(whole['train'], whole['test'], per_slice=False),
        'thumbnail ridge': np.stack([thumbnail_scores[list(scan.records)].mean(0) for scan in chosen['test']]),
    }
    results = {
        **experiment.describe_data(config.data, data),
        'model': 'ResNet50-LSTM-ATT2 (scans)',
        'split': 'test',
        **scan_level['sequence'],
        'baselines': {
            name: compute_metrics(labels['test'], s.argmax(1), patients['test'], CLASSES)
            for name, s in baseline_scores.items()
        },
        'curves': compute_curves(labels['test'], probabilities, patients['test'], CLASSES),
        'screening': evaluate_rules(
            rules,
            predictions['test'].logits,
            labels['test'],
            patients['test'],
            CLASSES,
            train_shares_K=np.bincount(labels['train'], minlength=len(CLASSES)) / len(labels['train']),
        ),
        'slice_attention': scan_report.score_slice_attention(chosen['test'], data, predictions['test'].attention),
        'scan_level': scan_level,
        'scans': {
            'min_slices': config.data.min_slices,
            'taking_part': {split: experiment.count_classes(y) for split, y in labels.items()},
            'left_out': {split: selection.left_out for split, selection in selections.items()},
        },
        'training': experiment.describe_training(history, config.train.min_delta, config.att2.model.pretrained),
        'environment': experiment.describe_environment(),
    }
    extractor_variables = {name: variables[name]['extractor'] for name in ('params', 'batch_stats')}
    experiment.save_usual(workdir, model.extractor, extractor_variables, data)
    write_scan_predictions(
        workdir / 'predictions.csv', chosen['test'], probabilities, votes[rule], predictions['test'].attention
    )
    vote_title = f'Slice votes ({rule}), test scans, {results["data"]}'
    figures.save_figure(
        figures.render_confusion_matrix(scan_level['vote']['confusion_matrix'], CLASSES, title=vote_title),
        workdir / 'confusion_matrix_vote.png',
    )
    is_the_papers = tuple(results['scans']['taking_part']['test'].values()) == published.SEQUENCES[2]
    experiment.write_results(
        workdir,
        results,
        rules,
        config=config,
        history=history,
        unit='scans',
        table='Table IV',
        published=published.SCAN_SCORES if is_the_papers else None,
        others={f'slice votes ({rule})': scan_level['vote']},
        sections=scan_report.build_scan_sections(
            model.extractor,
            extractor_variables,
            data,
            chosen['test'],
            probabilities,
            predictions['test'].attention,
            results['slice_attention'],
        ),
        start=start,
    )
    return results


def compare_on_scans(
    chosen: Sequence[Scan],
    labels_M: np.ndarray,
    probabilities_MxK: np.ndarray,
    votes: dict[str, np.ndarray],
    rule: str,
    slice_probabilities: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Compares the sequence model with the slice model's votes on the same scans.

    Args:
      chosen: the M scans.
      labels_M: their classes.
      probabilities_MxK: of the sequence model.
      votes: scores [M, K] for every rule.
      rule: the one chosen on validation scans.
      slice_probabilities: per scan [T, K].

    Returns:
      'sequence' and 'vote' (`compute_metrics`, the vote with its 'rule'), 'sequence_minus_vote'
      (`voting.compare_paired`), 'test_accuracy_of_rules', 'conflicts' (scans with slices called pneumonia and slices
      called COVID-19, and what each rule makes of them) and 'short_scans' (those of fewer than 16 slices).
    """
    patients = [scan.patient for scan in chosen]
    predicted = {'sequence': probabilities_MxK.argmax(1), **{r: scores.argmax(1) for r, scores in votes.items()}}
    conflicts = voting.find_conflicts(slice_probabilities)
    short = np.array([len(scan.records) < scans.NUM_SLICES for scan in chosen])

    def count_right(subset):
        return {
            'num_scans': int(subset.sum()),
            'right': {name: int((p == labels_M)[subset].sum()) for name, p in predicted.items()},
        }

    return {
        'sequence': compute_metrics(labels_M, predicted['sequence'], patients, CLASSES),
        'vote': {'rule': rule, **compute_metrics(labels_M, predicted[rule], patients, CLASSES)},
        'sequence_minus_vote': voting.compare_paired(predicted['sequence'], predicted[rule], labels_M, patients),
        'test_accuracy_of_rules': {r: float((predicted[r] == labels_M).mean()) for r in votes},
        'conflicts': count_right(conflicts),
        'short_scans': count_right(short),
    }


def write_scan_predictions(
    path: Path,
    chosen: Sequence[Scan],
    probabilities_MxK: np.ndarray,
    votes_MxK: np.ndarray,
    attention: Sequence[np.ndarray],
) -> None:
    """Writes a CSV with a row per scan: ids, label, p_<class>, vote_<class>, slices used and their attention."""
    with replace_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.writer(file)
        columns = [f'{kind}_{name}' for kind in ('p', 'vote') for name in CLASSES]
        writer.writerow(['scan', 'patient', 'label', *columns, 'slices', 'attention'])
        for scan, p, vote, a in zip(chosen, probabilities_MxK, votes_MxK, attention, strict=True):
            numbers = [f'{x:.9f}' for x in (*p, *vote)]
            slices = ' '.join(map(str, scan.slices))
            writer.writerow([scan.scan, scan.patient, scan.label, *numbers, slices, ' '.join(f'{x:.6f}' for x in a)])


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns what a run prints at its end: Table IV, the votes beside it and where things are."""
    level = results['scan_level']
    vote, paired, conflicts, short = (level[k] for k in ('vote', 'sequence_minus_vote', 'conflicts', 'short_scans'))
    lines = ['', 'Sequence model (Table IV)', format_table(level['sequence'], unit='Scans'), '']
    lines += [
        f'Votes of the slice model on the same slices (rule {vote["rule"]!r}, chosen on validation)',
        format_table(vote, unit='Scans'),
        '',
    ]
    lines += experiment.format_baselines(results)
    low, high = paired['interval']
    verdict = 'a tie' if low <= 0 <= high else 'the sequence model' if low > 0 else 'the vote'
    lines += [
        '',
        f'Sequence less vote: {paired["difference"]:+.3f} [{low:+.3f}, {high:+.3f}] accuracy, only sequence right '
        f'{paired["only_first"]}, only vote right {paired["only_second"]}, McNemar exact p = '
        f'{paired["mcnemar_p"]:.3f}: {verdict}.',
        f'Scans with slices called pneumonia and slices called COVID-19: {conflicts["num_scans"]} of '
        f'{results["num_examples"]}; right: {_show_right(conflicts, vote["rule"])}.',
    ]
    if short['num_scans']:
        lines.append(
            f'Scans of fewer than {scans.NUM_SLICES} slices, which the paper drops: {short["num_scans"]}; right: '
            f'{_show_right(short, vote["rule"])}.'
        )
    for split in SPLITS:
        taking_part, left_out = (
            ', '.join(f'{count:,} {name}' for name, count in results['scans'][key][split].items())
            for key in ('taking_part', 'left_out')
        )
        lines.append(f'{split:<6}{taking_part}; left out: {left_out}')
    return '\n'.join(lines + experiment.format_ending(results, workdir, unit='scans'))


def _show_right(counts: dict[str, Any], rule: str) -> str:
    return f'sequence {counts["right"]["sequence"]}, vote {counts["right"][rule]}'
