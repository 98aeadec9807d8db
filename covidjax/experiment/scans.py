"""The paper's second experiment: a sequence model on scans (section V), compared with slice votes."""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from covidjax.data import covidx_ct, published, sequences
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.data.sequences import Scan
from covidjax.errors import UserError
from covidjax.evaluation import baselines, voting
from covidjax.evaluation.calibration import fit_temperature
from covidjax.evaluation.metrics import format_table
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.sick import join_logits
from covidjax.experiment import common, slices
from covidjax.experiment.common import Classification, Findings, PaperTable, Procedure
from covidjax.experiment.config import load_config
from covidjax.experiment.embeddings import compute_embeddings, run_pass
from covidjax.experiment.sick import (
    Judge,
    compare_splits,
    create_columns,
    create_judge,
    format_verdicts,
    load_configured,
)
from covidjax.explain.catalogue import LESIONS
from covidjax.explain.evidence import contrast
from covidjax.models.att2 import normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.seq import Seq, SeqOutputs, is_extractor
from covidjax.training.checkpoints import Checkpoints, has_checkpoint, open_checkpoints
from covidjax.training.devices import get_shard, pad_batch_size, replicate
from covidjax.training.state import TrainState
from covidjax.training.step import Forward

log = logging.getLogger(__name__)

HEAD_NAMES = {'lstm': 'LSTM', 'gated': 'Gated'}
PAPER = PaperTable('Table IV', published.SEQUENCES[2], published.SCAN_SCORES)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs or resumes the experiment, prints its summary and returns its results (see `common.train`).

    Args:
      config: see configs/seq.py.
      workdir: workdir of the run; without `config.extractor` the slice experiment runs in its folder extractor/.

    Raises:
      UserError: bad config, data, extractor, lesion model or workdir.
    """
    extractor_dir = _get_extractor_dir(config, workdir)
    if config.lesions and not has_checkpoint(workdir):
        load_configured(config.lesions)  # refuses a wrong one before the slices are prepared
    if config.extractor:
        config = adopt_extractor(config, extractor_dir)

    def create(config: ConfigDict, data: covidx_ct.Prepared) -> Classification:
        judge = create_judge(config.lesions, data)  # refuses data without normals before the slice model is trained
        if not config.extractor:
            log.info('no config.extractor: training the slice model in %s', extractor_dir)
            slices.train(get_slice_config(config), extractor_dir, data)
        return create_experiment(config, data, extractor_dir, judge)

    return common.train(config, workdir, Procedure(common.load_data, create, common.test, format_summary))


def evaluate(workdir: Path) -> dict[str, Any]:
    """Tests the best model of a run again and writes the same files as the end of `train`."""
    extractor_dir = _get_extractor_dir(load_config(workdir), workdir)
    create = functools.partial(create_experiment, extractor_dir=extractor_dir)
    return common.evaluate(workdir, Procedure(common.load_data, create, common.test, format_summary))


def _get_extractor_dir(config: ConfigDict, workdir: Path) -> Path:
    return Path(config.extractor) if config.extractor else workdir / 'extractor'


def get_slice_config(config: ConfigDict) -> ConfigDict:
    """Returns the config of the slice experiment, from the section `att2` of a scan config."""
    data = config.data.copy_and_resolve_references().unlock()
    del data.min_slices, data.cached_draws
    return ConfigDict({'name': 'att2', 'lesions': '', 'data': data, **config.att2}).lock()


def adopt_extractor(config: ConfigDict, extractor_dir: Path) -> ConfigDict:
    """Returns the config with the slice model of a finished slice run.

    Raises:
      UserError: the folder is not such a run, or it was trained on slices of another size or region.
    """
    extractor = load_config(extractor_dir)
    if 'extractor' in extractor:
        raise UserError(
            f'config.extractor={extractor_dir} is the workdir of a {extractor.name!r} run; it must be a slice run'
        )
    if not (extractor_dir / 'results.json').exists():
        raise UserError(f'config.extractor={extractor_dir} has not finished: run its training command again first')
    for field in ('image_size', 'region'):
        theirs, ours = extractor.data[field], config.data[field]
        if theirs != ours:
            raise UserError(
                f'config.extractor={extractor_dir} was trained with data.{field}={theirs}: pass '
                f'--config.data.{field}={theirs} (now {ours})'
            )
    config = config.copy_and_resolve_references().unlock()
    config.att2.model = extractor.model
    return config.lock()


def create_model(config: ConfigDict) -> Seq:
    """Returns the sequence model with its extractor."""
    return Seq(slices.create_model(config.att2.model), config.model.hidden, config.model.head)


def create_variables(model: Seq, image_size: int, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters and batch statistics, including the extractor's."""
    return model.init(key, jnp.zeros((1, image_size, image_size, 1)), jnp.ones(1, jnp.int32))


def restore_best(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    create = functools.partial(create_variables, create_model(config), config.data.image_size)
    return common.restore_best(create, checkpoints)


class Selection(NamedTuple):
    """The scans of one split that are used.

    Attributes:
      scans: the scans, with the slices that are used.
      whole: the same scans, with all their slices.
      left_out: number of scans with too few slices, per class.
    """

    scans: list[Scan]
    whole: list[Scan]
    left_out: dict[str, int]


def select_scans(config: ConfigDict, data: covidx_ct.Prepared) -> dict[str, Selection]:
    """Selects the scans of each split that have at least `config.data.min_slices` slices.

    Raises:
      UserError: a split has no such scan.
    """
    selections = {}
    for split in SPLITS:
        every = sequences.group_scans(data.rows[split])
        whole = [scan for scan in every if len(scan.records) >= config.min_slices]
        left_out = [scan.label for scan in every if len(scan.records) < config.min_slices]
        if not whole:
            raise UserError(
                f'no scan of {split} has {config.min_slices} slices: lower --config.data.min_slices (1 takes all)'
            )
        selections[split] = Selection(
            sequences.thin_scans(whole, config.min_slices), whole, common.count_classes(left_out)
        )
    return selections


class ScanPredictions(NamedTuple):
    """Predictions for M scans, in the order of the split.

    Attributes:
      logits: [M, K] from the sequence model; with `config.lesions`, of the verdict that joins it with the lesions.
      attention: per scan [T].
      evidence: per scan [T, K], the share of each slice in the logits (see `seq.HeadOutputs`).
      slice_probabilities: per scan [T, K], from the slice model alone.
      classifier: with `config.lesions`, the logits of the sequence model; else None.
      sick: with `config.lesions`, the probability of sick by the lesions [M]; else None.
    """

    logits: np.ndarray
    attention: list[np.ndarray]
    evidence: list[np.ndarray]
    slice_probabilities: list[np.ndarray]
    classifier: np.ndarray | None = None
    sick: np.ndarray | None = None


# Defined here, not in `create_predictor`, so that validation and test share one compilation.
@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Seq, variables: dict[str, Any], batch: dict[str, jax.Array]) -> SeqOutputs:
    return replicate(model.apply(variables, normalise(batch['image']), batch['length']))


def create_predictor(
    model: Seq, data: covidx_ct.Prepared, selections: dict[str, Selection], batch_size: int
) -> Callable[[dict[str, Any], str], ScanPredictions]:
    """Returns a function (variables, split) -> predictions in evaluation mode."""
    batch_size = pad_batch_size(batch_size)

    def predict(variables, split):
        found = {}
        chosen = selections[split].scans
        load_slices = sequences.load_images(data.sources[split], chosen)
        batches = sequences.load_eval_scans(load_slices, chosen, batch_size=batch_size, shard=get_shard())
        apply = functools.partial(_apply, model, fold_batch_norm(variables))
        for member, outputs in run_pass(apply, batches, chosen, batch_size):
            t = len(chosen[member].records)
            of_slices = softmax(outputs.slice_logits[:t])
            found[member] = (outputs.logits, outputs.attention[:t], outputs.evidence[:t], of_slices)
        logits, *lists = zip(*(found[m] for m in range(len(found))), strict=True)
        return ScanPredictions(np.stack(logits), *map(list, lists))

    return predict


class Feed(NamedTuple):
    """The parts of a scan experiment that depend on its input, images or embeddings.

    Attributes:
      load_batches, forward: see `common.Experiment`.
      compute_val_logits: see `common.create_classification_loss`.
    """

    load_batches: Callable[[TrainState], Iterator[dict]]
    forward: Forward
    compute_val_logits: Callable[[dict[str, Any]], np.ndarray]


def create_image_feed(
    config: ConfigDict, model: Seq, data: covidx_ct.Prepared, selections: dict[str, Selection]
) -> Feed:
    """Returns a feed of images, with the extractor applied in every step and every validation."""
    predict = create_predictor(model, data, selections, config.train.batch_size)

    def load_batches(state):
        chosen = selections['train'].scans
        return sequences.load_train_scans(
            sequences.load_images(data.sources['train'], chosen),
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
    """Returns a feed of embeddings, which are computed when a run starts or resumes and are then held in memory.

    They are computed with the extractor in the state, so they always match it.
    """
    batch_size = config.train.batch_size
    # More draws than epochs would not be used; without augmentation all draws are equal.
    num_draws = min(config.data.cached_draws, config.train.num_epochs) if config.train.augment != 'none' else 1
    classifier = model.create_classifier()

    def embed(variables, split, **options):
        return compute_embeddings(
            model.extractor,
            get_extractor(variables),
            data.sources[split],
            selections[split].scans,
            batch_size=batch_size,
            **options,
        )

    def load_batches(state):
        embeddings_DxNxE = embed(
            state.variables,
            'train',
            key=state.key,
            augmentation=common.create_augmentation(config.train),
            num_draws=num_draws,
            dtype=config.train.dtype,
            title='embeddings of train',
        )
        chosen = selections['train'].scans
        return sequences.load_train_scans(
            sequences.load_embeddings(embeddings_DxNxE, chosen),
            chosen,
            batch_size=batch_size,
            seed=config.seed,
            first_step=int(state.step),
            shard=get_shard(),
        )

    def forward(variables, embeddings, batch):
        outputs = classifier.apply({'params': variables['params']['sequence']}, embeddings, batch['length'])
        return outputs.logits, variables['batch_stats']

    @jax.jit
    def classify(variables, batch):
        return replicate(forward(variables, batch['embedding'], batch)[0])

    val_1xNxE = None

    def compute_val_logits(variables):
        nonlocal val_1xNxE
        chosen, padded = selections['val'].scans, pad_batch_size(batch_size)
        if val_1xNxE is None:
            val_1xNxE = embed(
                variables, 'val', key=None, augmentation=None, num_draws=1, dtype='float32', title='embeddings of val'
            )
        load_slices = sequences.load_embeddings(val_1xNxE, chosen)
        batches = sequences.load_eval_scans(load_slices, chosen, batch_size=padded, shard=get_shard())
        found = dict(run_pass(functools.partial(classify, variables), batches, chosen, padded))
        return np.stack([found[member] for member in range(len(chosen))])

    return Feed(load_batches, forward, compute_val_logits)


def create_experiment(
    config: ConfigDict, data: covidx_ct.Prepared, extractor_dir: Path, judge: Judge | None = None
) -> Classification:
    """Returns the experiment of a config on its data.

    Args:
      config: of the run.
      data: its slices.
      extractor_dir: a new run loads its slice model from there.
      judge: of `config.lesions`, if it is already loaded.

    Raises:
      UserError: `config.lesions` is no lesion model.
    """
    model = create_model(config)
    judge = judge or create_judge(config.lesions, data)
    selections = select_scans(config.data, data)
    chosen = {split: selection.scans for split, selection in selections.items()}
    for split in SPLITS:
        log.info('%s scans: %s', split, common.format_counts([scan.label for scan in chosen[split]]))
    feed = (create_embedding_feed if config.data.cached_draws else create_image_feed)(config, model, data, selections)

    predict = create_predictor(model, data, selections, config.train.batch_size)

    def predict_verdicts(variables: dict[str, Any], split: str) -> ScanPredictions:
        found = predict(variables, split)
        if judge is None:
            return found
        sick = judge.compute_scan_sick(selections[split].whole, split)  # the lesions see every slice of a scan
        return found._replace(logits=join_logits(sick, found.logits), classifier=found.logits, sick=sick)

    def load_weights(variables: dict[str, Any]) -> dict[str, Any]:
        with open_checkpoints(extractor_dir) as source:
            extractor = slices.restore_best(get_slice_config(config), source)
        return {kind: {**variables[kind], 'extractor': extractor[kind]} for kind in ('params', 'batch_stats')}

    def name_batch(step: int) -> list[str]:
        _, members = sequences.plan_steps(chosen['train'], config.train.batch_size, config.seed)(step)
        return [chosen['train'][i].scan for i in members]

    def examine(variables: dict[str, Any], predictions: dict[str, ScanPredictions], _: dict[str, Any]) -> Findings:
        from covidjax.report.leading import get_shown_map  # see `common.test`
        from covidjax.report.scans import build_scan_sections, score_slice_attention

        probabilities, attention = softmax(predictions['test'].logits), predictions['test'].attention
        slice_attention = score_slice_attention(chosen['test'], data, attention)
        called, shares = probabilities.argmax(1), predictions['test'].evidence
        compared = [contrast(e[np.newaxis], c[np.newaxis]) for e, c in zip(shares, called, strict=True)]
        slice_evidence = slice_attention and {
            name: score_slice_attention(chosen['test'], data, [of_scan[name][0] for of_scan in compared])
            for name in compared[0]
        }
        lead = _load_lead(extractor_dir)
        found = _compare(config, data, selections, predictions, probabilities)
        if judge is not None:
            found = _add_lesions(found, judge, chosen, predictions)
        shown = build_scan_sections(
            model.extractor,
            get_extractor(variables),
            data,
            chosen['test'],
            probabilities,
            attention,
            slice_attention,
            slice_evidence,
            get_shown_map({'explanations': {'leading_map': lead}}),
        )
        results = {
            'slice_attention': slice_attention,
            'slice_evidence': slice_evidence,
            'explanations': {'leading_map': lead},
            **found.results,
        }
        return found._replace(results=results, sections=shown)

    return Classification(
        config=config,
        data=data,
        title=f'{slices.name_backbone(config.att2.model)}-{HEAD_NAMES[config.model.head]}-ATT2 (scans)',
        unit='scans',
        paper=PAPER,
        examples=chosen,
        slice_model=model.extractor,
        get_slice_variables=get_extractor,
        create_variables=functools.partial(create_variables, model, config.data.image_size),
        load_weights=load_weights,
        forward=feed.forward,
        is_frozen=is_extractor,
        load_batches=feed.load_batches,
        name_batch=name_batch,
        steps_per_epoch=sequences.count_batches(chosen['train'], config.train.batch_size),
        **common.create_classification_loss(
            {split: [scan.label for scan in chosen[split]] for split in ('train', 'val')},
            config.train.label_smoothing,
            feed.compute_val_logits,
        ),
        predict=predict_verdicts,
        examine=examine,
        compute_baselines=lambda: _compute_baselines(data, selections),
    )


def _compute_baselines(data: covidx_ct.Prepared, selections: dict[str, Selection]) -> dict[str, np.ndarray]:
    """Returns the scores [M, K] of every baseline on the test scans."""
    train, test = selections['train'], selections['test']
    slice_labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    thumbnail_scores, _ = baselines.compute_thumbnail_scores(data.sources, slice_labels)
    labels = np.array([scan.label for scan in train.scans])
    return {
        'majority class': baselines.compute_majority_scores(labels, len(test.scans), len(CLASSES)),
        'file names only': baselines.compute_file_name_scores(train.whole, test.whole, per_slice=False),
        'thumbnail ridge': np.stack([thumbnail_scores[list(scan.records)].mean(0) for scan in test.scans]),
    }


def _load_lead(extractor_dir: Path) -> dict[str, Any] | None:
    """Returns the leading map of the slice run, None if it is not there or has not scored its maps."""
    if not (extractor_dir / 'results.json').exists():
        return None
    lead = common.load_output(extractor_dir, 'results.json').get('explanations', {}).get('leading_map')
    if lead and (lead['name'] or '').startswith(LESIONS):
        return {**lead, 'name': None}  # of the slice run's lesion model, which a scan run does not use for maps
    return lead


def get_extractor(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the extractor's variables, taken from those of a scan model."""
    return {kind: variables[kind]['extractor'] for kind in ('params', 'batch_stats')}


def _compare(
    config: ConfigDict,
    data: covidx_ct.Prepared,
    selections: dict[str, Selection],
    predictions: dict[str, ScanPredictions],
    probabilities_MxK: np.ndarray,
) -> Findings:
    """Returns the findings that need no attention map: votes on the same slices, baselines and predictions.

    The votes are compared with the sequence model alone, without the lesions.
    """
    from covidjax.report import figures  # see `common.test`

    chosen = {split: selection.scans for split, selection in selections.items()}
    labels = {split: np.array([scan.label for scan in chosen[split]]) for split in SPLITS}
    test, slice_probabilities = chosen['test'], predictions['test'].slice_probabilities

    rule, val_accuracies = voting.choose_rule(predictions['val'].slice_probabilities, labels['val'])
    votes = {r: voting.vote_all(slice_probabilities, r) for r in voting.RULES}
    classifier = predictions['test'].classifier
    alone = probabilities_MxK if classifier is None else softmax(classifier)
    scan_level = voting.compare_on_scans(test, labels['test'], alone, votes, rule, slice_probabilities)
    scan_level['vote']['validation_accuracy'] = val_accuracies
    return Findings(
        baselines=_compute_baselines(data, selections),
        comparisons={},
        results={
            'scan_level': scan_level,
            'scans': {
                'min_slices': config.data.min_slices,
                'taking_part': {split: common.count_classes(y) for split, y in labels.items()},
                'left_out': {split: selection.left_out for split, selection in selections.items()},
            },
        },
        rules={},
        others={f'slice votes ({rule})': scan_level['vote']},
        columns={
            'scan': [scan.scan for scan in test],
            'patient': [scan.patient for scan in test],
            **common.create_source_column(test),
            'label': [scan.label for scan in test],
            **{f'p_{name}': p for name, p in zip(CLASSES, probabilities_MxK.T, strict=True)},
            **{f'vote_{name}': p for name, p in zip(CLASSES, votes[rule].T, strict=True)},
            'slices': [' '.join(map(str, scan.slices)) for scan in test],
            'attention': [' '.join(f'{x:.6f}' for x in a) for a in predictions['test'].attention],
            **{
                f'evidence_{name}': [' '.join(f'{x:.6f}' for x in e[:, c]) for e in predictions['test'].evidence]
                for c, name in enumerate(CLASSES)
            },
        },
        figures={
            'confusion_matrix_vote.png': figures.render_confusion_matrix(
                scan_level['vote']['confusion_matrix'],
                CLASSES,
                title=f'Slice votes ({rule}), test scans, {common.name_data(config.data, data)}',
            )
        },
        sections=[],
    )


def _add_lesions(
    found: Findings, judge: Judge, examples: dict[str, list[Scan]], predictions: dict[str, ScanPredictions]
) -> Findings:
    """Returns the findings with the comparison of sequence model, lesions and both, and the rule of sick or normal."""
    labels = np.array([scan.label for scan in examples['val']])
    return found._replace(
        results={**found.results, 'verdicts': compare_splits(examples, predictions)},
        rules={**found.rules, 'sick': judge.describe(fit_temperature(predictions['val'].classifier, labels))},
        others={'sequence model alone': found.results['scan_level']['sequence'], **found.others},
        columns={**found.columns, **create_columns(predictions['test'])},
    )


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns the summary printed at the end of a run: Table IV, the slice votes and the output files."""
    level = results['scan_level']
    vote, paired, conflicts, short = (level[k] for k in ('vote', 'sequence_minus_vote', 'conflicts', 'short_scans'))
    lines = []
    if 'verdicts' in results:
        lines += ['', 'Verdict of lesions and sequence model', format_table(results, unit='Scans')]
        lines += format_verdicts(results['verdicts'])
    lines += ['', 'Sequence model (Table IV)', format_table(level['sequence'], unit='Scans'), '']
    lines += [
        f'Votes of the slice model on the same slices (rule {vote["rule"]!r}, chosen on validation)',
        format_table(vote, unit='Scans'),
        '',
    ]
    lines += common.format_baselines(results)
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
            f'Scans of fewer than {sequences.NUM_SLICES} slices, which the paper drops: {short["num_scans"]}; right: '
            f'{_show_right(short, vote["rule"])}.'
        )
    for split in SPLITS:
        taking_part, left_out = (
            ', '.join(f'{count:,} {name}' for name, count in results['scans'][key][split].items())
            for key in ('taking_part', 'left_out')
        )
        lines.append(f'{split:<6}{taking_part}; left out: {left_out}')
    return '\n'.join(lines + common.format_ending(results, workdir, unit='scans'))


def _show_right(counts: dict[str, Any], rule: str) -> str:
    return f'sequence {counts["right"]["sequence"]}, vote {counts["right"][rule]}'
