"""The paper's first experiment: ResNet50-ATT2 on single slices (section IV)."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from covidjax.data import covidx_ct, published
from covidjax.data.balance import divide_strata
from covidjax.data.lesions import (
    LesionSlice,
    TaughtSource,
    match_masks,
    read_lesion_folder,
    read_phantom_lesions,
    read_phantom_masks,
)
from covidjax.data.lists import CLASSES, find_images, find_version
from covidjax.data.loader import load_eval_batches, load_train_batches
from covidjax.data.sequences import group_scans
from covidjax.evaluation import baselines
from covidjax.evaluation.calibration import fit_temperature
from covidjax.evaluation.metrics import format_table
from covidjax.evaluation.patient_level import compute_patient_level, format_comparison
from covidjax.evaluation.predictions import compute_logits, softmax
from covidjax.evaluation.sick import join_logits
from covidjax.evaluation.voting import fit_vote_rules
from covidjax.experiment import common
from covidjax.experiment.common import Classification, Findings, PaperTable, Predictions, Procedure
from covidjax.experiment.config import load_config
from covidjax.experiment.features import MAX_BYTES, KeptFeatures, count_bytes, keep_features, list_shapes, unpack
from covidjax.experiment.sick import (
    Judge,
    compare_splits,
    create_columns,
    create_judge,
    format_verdicts,
    load_configured,
)
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.ct_weights import ASTRA, STAGE_SIZES
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.pretrained import find_weights, load_pretrained
from covidjax.training.checkpoints import Checkpoints, has_checkpoint
from covidjax.training.devices import get_axis_name, get_shard, pad_batch_size, place_batch, replicate
from covidjax.training.losses import add_attention_loss
from covidjax.training.state import TrainState
from covidjax.training.step import Forward

log = logging.getLogger(__name__)

_DROPOUT = np.uint32(2**32 - 1)  # folded into an example's key; augmentation uses other keys
PAPER = PaperTable('Table III', published.SLICES['CT-2A'][2], published.SLICE_SCORES)


def train(config: ConfigDict, workdir: Path, data: covidx_ct.Prepared | None = None) -> dict[str, Any]:
    """Runs or resumes the experiment, prints its summary and returns its results (see `common.train`).

    Args:
      config: see configs/att2.py.
      workdir: workdir of the run.
      data: the slices of `config.data`, if already loaded.

    Raises:
      UserError: bad config, data or workdir.
    """
    if not has_checkpoint(workdir):  # a resumed run needs no pretrained weights
        if config.data.raw_dir and data is None:
            # Check the data directory before contacting the hub, which takes half a minute without a network.
            find_version(Path(config.data.raw_dir).expanduser())
        if config.model.pretrained:
            find_weights(config.model.pretrained)
        if config.lesions:
            load_configured(config.lesions)  # refuses a wrong one before the slices are prepared
    return common.train(adopt_pooling(config, workdir), workdir, create_procedure(create_experiment), data)


def evaluate(workdir: Path, lesions_dir: Path | None = None, *, occlusion: bool = False) -> dict[str, Any]:
    """Tests the best model of a run again and writes the same files as the end of `train`.

    Args:
      workdir: workdir of the run.
      lesions_dir: slices with outlined lesions to score maps on (see `lesions.read_lesion_folder`).
      occlusion: True also scores occlusion maps, which is slow.
    """
    create = functools.partial(create_experiment, lesions_dir=lesions_dir, occlusion=occlusion)
    return common.evaluate(workdir, create_procedure(create))


def create_procedure(create: Callable[[ConfigDict, covidx_ct.Prepared], Classification]) -> Procedure:
    """Returns the procedure of slice runs, given how to create the experiment."""
    return Procedure(common.load_data, create, common.test, format_summary, settle_pooling)


def settle_pooling(config: ConfigDict, data: covidx_ct.Prepared) -> ConfigDict:
    """Returns the config, with `model.pooled` set if the features of a frozen backbone would take too much disk."""
    if not config.model.get('frozen') or config.model.pooled:
        return config
    count = sum(map(len, data.rows.values()))
    num_bytes = count * count_bytes(create_model(config.model), config.data.image_size)
    if num_bytes <= MAX_BYTES:
        return config
    log.warning(
        'the features of %d slices would take %.0f GB, more than %.0f: only mean and maximum of every map are kept '
        '(model.pooled=True)',
        count,
        num_bytes / 1e9,
        MAX_BYTES / 1e9,
    )
    return _set_pooled(config)


def adopt_pooling(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns the config, with `model.pooled` as `settle_pooling` set it when the run was started."""
    is_started = config.model.get('frozen') and (workdir / 'config.json').exists()
    return _set_pooled(config) if is_started and load_config(workdir).model.get('pooled') else config


def _set_pooled(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    config.model.pooled = True
    return config.lock()


def create_model(config: ConfigDict) -> Att2:
    """Returns the model of the config section `model`; its fields but `pretrained` and `frozen` are those of `Att2`."""
    fields = {name: tuple(value) if name == 'stage_sizes' else value for name, value in config.items()}
    inputs = ASTRA if fields.pop('pretrained') == ASTRA else 'imagenet'
    del fields['frozen']
    return Att2(num_classes=len(CLASSES), inputs=inputs, **fields)


def name_backbone(config: ConfigDict) -> str:
    """Returns the name of the backbone of the config section `model`."""
    if config.backbone == 'efficientnet_lite0':
        return 'EfficientNetLite0'
    return 'ResNet152' if tuple(config.stage_sizes) == STAGE_SIZES else 'ResNet50'


def create_variables(model: Att2, image_size: int, key: jax.Array) -> dict[str, Any]:
    """Returns initial parameters and batch statistics, including the tail's."""
    return model.init(key, jnp.zeros((1, image_size, image_size, 1)), train=False, full=True)


def restore_best(config: ConfigDict, checkpoints: Checkpoints) -> dict[str, Any]:
    """Returns the variables of the best epoch (see `Checkpoints.restore_best`)."""
    create = functools.partial(create_variables, create_model(config.model), config.data.image_size)
    return common.restore_best(create, checkpoints)


# Defined here, not in `create_predictor`, so that validation and test share one compilation.
@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Att2, variables: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    return replicate(model.apply(variables, normalise(batch['image']), train=False).logits)


def create_predictor(
    model: Att2, data: covidx_ct.Prepared, batch_size: int
) -> Callable[[dict[str, Any], str], np.ndarray]:
    """Returns a function (variables, split) -> logits [N, K] of the split's slices in evaluation mode."""
    apply = functools.partial(_apply, model)
    batch_size = pad_batch_size(batch_size)

    def predict(variables: dict[str, Any], split: str) -> np.ndarray:
        batches = load_eval_batches(data.sources[split], batch_size=batch_size, shard=get_shard())
        return compute_logits(apply, fold_batch_norm(variables), map(place_batch, batches), len(data.sources[split]))

    return predict


class Feed(NamedTuple):
    """The parts of a slice experiment that depend on its input, images or features of a frozen backbone.

    Attributes:
      load_batches, forward: see `common.Experiment`.
      predict: (variables, split) -> logits [N, K] in evaluation mode.
      is_frozen: see `common.Experiment`.
    """

    load_batches: Callable[[TrainState], Iterator[dict]]
    forward: Forward
    predict: Callable[[dict[str, Any], str], np.ndarray]
    is_frozen: Callable[[str], bool]


def create_image_feed(config: ConfigDict, model: Att2, data: covidx_ct.Prepared) -> Feed:
    """Returns a feed of images, with the whole network trained."""
    trained = model.clone(axis_name=get_axis_name(config.train.parallelism))
    is_taught = config.train.attention_loss > 0

    @functools.cache  # outlines are read for training only
    def get_records() -> Sequence[dict[str, Any]]:
        records = data.sources['train']
        return TaughtSource(records, _read_masks(config.data, data)) if is_taught else records

    def load_batches(state: TrainState) -> Iterator[dict]:
        return _load_batches(config, data, get_records(), int(state.step), get_shard())

    def forward(variables: dict[str, Any], images: jax.Array, batch: dict) -> tuple[Any, Any]:
        keys_B = create_dropout_keys(model, batch)
        outputs, updates = trained.apply(variables, images, train=True, dropout_keys_B=keys_B, mutable=['batch_stats'])
        found = (outputs.logits, outputs.attention) if is_taught else outputs.logits
        return found, updates['batch_stats']

    predict = create_predictor(model, data, config.train.batch_size)
    return Feed(load_batches, forward, predict, functools.partial(is_dead, compatibility=model.compatibility))


def create_feature_feed(config: ConfigDict, model: Att2, data: covidx_ct.Prepared) -> Feed:
    """Returns a feed of the features of a frozen backbone, which are computed when they are first needed.

    The backbone is in evaluation mode, gets no gradient because its features are inputs, and is kept from the
    optimizer.
    """
    trained = model.clone(axis_name=get_axis_name(config.train.parallelism))
    size = config.data.image_size
    shapes = list_shapes(model, size)
    kept: dict[str, KeptFeatures] = {}

    def keep(variables: dict[str, Any], split: str) -> KeptFeatures:
        if split not in kept:
            kept[split] = keep_features(model, variables, size, data, split)
        return kept[split]

    def load_batches(state: TrainState) -> Iterator[dict]:
        return _load_batches(config, data, keep(state.variables, 'train'), int(state.step), get_shard())

    def forward(variables: dict[str, Any], features_BxE: jax.Array, batch: dict) -> tuple[jax.Array, Any]:
        outputs, updates = trained.apply(
            variables,
            None,
            train=True,
            dropout_keys_B=create_dropout_keys(model, batch),
            features=unpack(features_BxE, shapes, model),
            mutable=['batch_stats'],
        )
        return outputs.logits, updates['batch_stats']

    @jax.jit
    def classify(variables: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        features = unpack(batch['embedding'], shapes, model)
        return replicate(model.apply(variables, None, train=False, features=features).logits)

    def predict(variables: dict[str, Any], split: str) -> np.ndarray:
        source = keep(variables, split)
        batches = load_eval_batches(source, batch_size=pad_batch_size(config.train.batch_size), shard=get_shard())
        return compute_logits(classify, variables, map(place_batch, batches), len(source))

    def is_frozen(path: str) -> bool:
        return path.startswith('backbone/') or is_dead(path, model.compatibility)

    return Feed(load_batches, forward, predict, is_frozen)


def create_dropout_keys(model: Att2, batch: dict[str, jax.Array]) -> jax.Array | None:
    """Returns the keys of `Att2`'s dropout for the examples of a training batch."""
    return jax.vmap(lambda key: jax.random.fold_in(key, _DROPOUT))(batch['key']) if model.dropout else None


def _load_batches(
    config: ConfigDict, data: covidx_ct.Prepared, source: Any, first_step: int, shard: tuple[int, int]
) -> Iterator[dict]:
    return load_train_batches(
        source,
        batch_size=config.train.batch_size,
        seed=config.seed,
        first_step=first_step,
        shard=shard,
        strata=divide_strata(data.rows['train'], config.data.balance),
    )


def create_experiment(
    config: ConfigDict, data: covidx_ct.Prepared, *, lesions_dir: Path | None = None, occlusion: bool = False
) -> Classification:
    """Returns the experiment of a config on its data; for `lesions_dir` and `occlusion` see `evaluate`.

    Raises:
      UserError: the folder of lesions can't be read.
    """
    model = create_model(config.model)
    feed = (create_feature_feed if config.model.frozen else create_image_feed)(config, model, data)
    outlined = (
        None if lesions_dir is None else read_lesion_folder(lesions_dir, config.data.image_size, config.data.region)
    )

    judge = create_judge(config.lesions, data)

    def predict_verdicts(variables: dict[str, Any], split: str) -> Predictions:
        logits = feed.predict(variables, split)
        if judge is None:
            return Predictions(logits)
        sick = judge.compute_slice_sick(split)
        return Predictions(join_logits(sick, logits), logits, sick)

    def read_lesions(split: str) -> list[LesionSlice]:
        return read_phantom_lesions(data.raw_dir, data.rows[split], config.data.image_size, config.data.region)

    def load_weights(variables: dict[str, Any]) -> dict[str, Any]:
        pretrained = config.model.pretrained
        return load_pretrained(variables, find_weights(pretrained)) if pretrained else variables

    def name_batch(step: int) -> list[str]:
        records = [{'label': row.label} for row in data.rows['train']]  # the order does not depend on the images
        batch = next(_load_batches(config, data, records, step, (0, 1)))
        return [data.rows['train'][i].file for i in batch['index']]

    def examine(variables: dict[str, Any], predictions: dict[str, Predictions], rules: dict[str, Any]) -> Findings:
        from covidjax.report.slices import build_slice_sections, score_explanations  # see `common.test`

        # Phantoms have other slices with lesions to choose the leading map on; a folder of lesions is divided.
        lesions, choosing = (read_lesions('test'), read_lesions('val')) if outlined is None else (outlined, [])
        explanations = score_explanations(
            model, variables, data, lesions, choosing, lesions=judge and judge.lesions, occlusion=occlusion
        )
        probabilities = softmax(predictions['test'].logits)
        found = _compare(data, predictions, probabilities, rules, judge)
        return found._replace(
            results={**found.results, 'explanations': explanations},
            sections=build_slice_sections(model, variables, data, probabilities, explanations, judge and judge.lesions),
        )

    loss = common.create_classification_loss(
        {split: [row.label for row in data.rows[split]] for split in ('train', 'val')},
        config.train.label_smoothing,
        lambda variables: feed.predict(variables, 'val'),
        is_balanced=config.data.balance != 'none',
    )
    if config.train.attention_loss > 0:
        loss['objective'] = add_attention_loss(loss['objective'], config.train.attention_loss)

    return Classification(
        config=config,
        data=data,
        title=f'{name_backbone(config.model)}-ATT2 (slices)',
        unit='slices',
        paper=PAPER,
        examples=data.rows,
        slice_model=model,
        get_slice_variables=lambda variables: variables,
        create_variables=functools.partial(create_variables, model, config.data.image_size),
        load_weights=load_weights,
        forward=feed.forward,
        is_frozen=feed.is_frozen,
        load_batches=feed.load_batches,
        name_batch=name_batch,
        steps_per_epoch=config.train.steps_per_epoch or -(-len(data.rows['train']) // config.train.batch_size),
        **loss,
        predict=predict_verdicts,
        examine=examine,
        compute_baselines=lambda: _compute_baselines(data)[0],
    )


def _read_masks(config: ConfigDict, data: covidx_ct.Prepared) -> dict[int, np.ndarray]:
    """Returns the outlined lesions of the training slices that have some."""
    rows = data.rows['train']
    if not config.raw_dir:
        masks = read_phantom_masks(data.raw_dir, rows, config.image_size, config.region)
    else:
        folders = [Path(name).expanduser() for name in config.outlines.split(',') if name]
        images = Path(find_images(str(data.raw_dir), data.version))
        masks = match_masks(folders, images, rows, config.image_size, config.region)
    log.info(
        '%s of %s training slices have outlined lesions, which teach the attention', f'{len(masks):,}', f'{len(rows):,}'
    )
    return masks


def _compute_baselines(data: covidx_ct.Prepared) -> tuple[dict[str, np.ndarray], float]:
    """Returns the scores [N, K] of every baseline on the test slices, and the penalty of the ridge regression."""
    labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    thumbnail_scores, alpha = baselines.compute_thumbnail_scores(data.sources, labels)
    return {
        'majority class': baselines.compute_majority_scores(labels['train'], len(labels['test']), len(CLASSES)),
        'file names only': score_file_names(data),
        'thumbnail ridge': thumbnail_scores,
    }, alpha


def _compare(
    data: covidx_ct.Prepared,
    predictions: dict[str, Predictions],
    probabilities_NxK: np.ndarray,
    rules: dict[str, Any],
    judge: Judge | None,
) -> Findings:
    """Returns the findings that need no attention map: baselines, patient level, scan votes and predictions."""
    rows = data.rows['test']
    labels = np.array([row.label for row in rows])
    patients = [row.patient for row in rows]
    scores, alpha = _compute_baselines(data)
    return Findings(
        baselines=scores,
        comparisons={
            'thumbnail_ridge_alpha': alpha,
            'covid19_against_pneumonia_per_patient': {
                name: compute_patient_level(s, labels, patients)
                for name, s in {'model': probabilities_NxK, **scores}.items()
            },
        },
        results={} if judge is None else {'verdicts': compare_splits(data.rows, predictions)},
        rules=_fit_scan_rules(data, predictions['val'], rules, judge),
        others={},
        columns={
            'file': [row.file for row in rows],
            'scan': [row.scan for row in rows],
            'patient': patients,
            **common.create_source_column(rows),
            'slice': [row.slice_index for row in rows],
            'label': [row.label for row in rows],
            **{f'p_{name}': p for name, p in zip(CLASSES, probabilities_NxK.T, strict=True)},
            **({} if judge is None else _create_lesion_columns(judge, predictions['test'])),
        },
        figures={},
        sections=[],
    )


def _fit_scan_rules(
    data: covidx_ct.Prepared, val: Predictions, rules: dict[str, Any], judge: Judge | None
) -> dict[str, Any]:
    """Returns the rules of scans, and with `config.lesions` that of sick or normal."""
    scans = group_scans(data.rows['val'])
    if judge is None:
        return {'scans': fit_vote_rules(val.logits, scans, rules['temperature'])}
    temperature = fit_temperature(val.classifier, np.array([row.label for row in data.rows['val']]))
    sick = judge.compute_scan_sick(scans, 'val')
    return {
        'scans': fit_vote_rules(val.classifier, scans, temperature, sick),
        'sick': judge.describe(temperature),
    }


def _create_lesion_columns(judge: Judge, test: Predictions) -> dict[str, np.ndarray]:
    """Returns columns of predictions.csv, from which the verdict on whole scans can be computed."""
    found = judge.get_found('test')
    return {
        **create_columns(test),
        'lungs_area': found.lungs,
        'lesions_area': found.lesions,
        'lesions_peak': found.peaks,
    }


def score_file_names(data: covidx_ct.Prepared) -> np.ndarray:
    """Predicts the test slices from the file names of their scans; returns probabilities [N, K]."""
    train, test = (group_scans(data.rows[split]) for split in ('train', 'test'))
    scores = np.empty((len(data.rows['test']), len(CLASSES)))
    for scan, of_scan in zip(test, baselines.compute_file_name_scores(train, test, per_slice=True), strict=True):
        scores[list(scan.records)] = of_scan
    return scores


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns the summary printed at the end of a run: Table III, the baselines and the output files."""
    lines = ['', format_table(results, unit='Slices')]
    lines += common.format_baselines(results)
    lines += format_verdicts(results['verdicts']) if 'verdicts' in results else []
    lines += ['', format_comparison(results['covid19_against_pneumonia_per_patient']), '']
    return '\n'.join(lines + common.format_ending(results, workdir, unit='slices'))
