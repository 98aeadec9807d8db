"""Cross-validation: one run per fold, scores of the predictions for patients that were held out, and the ensemble.

The folds divide the training and validation lists by patient. The test list is held out from all of them; the ensemble
of the folds' models is tested on it. The workdir has config.json, folds.json and a workdir fold_1, fold_2, ... for each
fold, which every command takes. After the last fold it also has results.json, calibration.json, predictions.csv
(out-of-fold), test_predictions.csv (the ensemble on the test list) and report.html.

Shapes: N examples, M members, K classes.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from ml_collections import ConfigDict

from covidjax.audit.overlap import Pictures, find_shared_pictures, measure_listed, name_picture
from covidjax.data import covidx_ct
from covidjax.data.folds import (
    FOLD,
    POOL,
    Fold,
    divide_patients,
    divide_sources,
    get_pool,
    get_sources,
    parse_fold,
    select_fold,
    write_fold,
)
from covidjax.data.lists import CLASSES, find_images
from covidjax.data.sequences import group_scans
from covidjax.errors import UserError, join_faults
from covidjax.evaluation.baselines import compute_shape_scores
from covidjax.evaluation.calibration import apply_temperature, compute_calibration
from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.disagreement import compute_disagreement, fit_limit
from covidjax.evaluation.label_errors import describe_label_errors
from covidjax.evaluation.left_out import describe_score, score_sick, subtract_scores
from covidjax.evaluation.metrics import compute_interval, compute_metrics, draw_resamples, format_score, format_table
from covidjax.evaluation.over_seeds import Estimate, subtract
from covidjax.evaluation.patient_level import compute_patient_level, format_comparison
from covidjax.evaluation.predictions import write_predictions
from covidjax.evaluation.screening import evaluate_rules, fit_rules
from covidjax.evaluation.subgroups import compute_subgroups, read_columns
from covidjax.evaluation.voting import compute_vote_logits, fit_vote_rules
from covidjax.experiment import ablation, common, lesion_folds, scans, slices
from covidjax.experiment.common import Classification, Example
from covidjax.experiment.config import check_config, check_workdir, flatten_config, load_config, save_config
from covidjax.experiment.lesion_folds import plan_lesions, read_seen_sources, train_lesions
from covidjax.experiment.preprocessing import describe_preprocessing
from covidjax.experiment.runs import EXPERIMENTS
from covidjax.experiment.sick import check_both
from covidjax.experiment.workdir import FOLDS, list_folds
from covidjax.files import report_full_disk, report_write_errors, write_json
from covidjax.models.pretrained import LESION_BOX
from covidjax.report import folds as report
from covidjax.report.checklist import write_checklist
from covidjax.training.checkpoints import open_checkpoints

log = logging.getLogger(__name__)

SCORES = ('accuracy', 'auc', 'auc_covid19_pneumonia')  # of `ablation.estimate`


class Division(NamedTuple):
    """How patients are divided.

    Attributes:
      by: 'patient', or 'source' to leave out each source or group of sources once.
      num_folds: by patient, see `folds.divide_patients`.
      groups: by source, see `folds.divide_sources`.
    """

    by: str = 'patient'
    num_folds: int = 5
    groups: Sequence[tuple[str, ...]] = ()


def crossvalidate(
    config: ConfigDict, workdir: Path, *, division: Division, fold: int | None = None
) -> dict[str, Any] | None:
    """Trains the folds that are not finished, one after the other, then tests and reports all of them together.

    Args:
      config: config of every fold.
      workdir: of the cross-validation; created if absent.
      division: into which folds; the shuffling takes `config.seed`.
      fold: trains this fold only, from 1, and does not join; so several processes can share the folds.

    Returns:
      The content of results.json; None with `fold`.

    Raises:
      UserError: bad config, data or workdir; the folds are others than before.
    """
    _check(config, workdir, division)
    with report_full_disk(workdir):
        config, data, folds = _plan(slices.adopt_pooling(config, workdir), workdir, division)
        if fold is not None and not 1 <= fold <= len(folds):
            raise UserError(f'--fold={fold}: it must be from 1 to {len(folds)}')
        if fold is None and (workdir / 'results.json').exists():
            log.info('%s holds a finished cross-validation; its summary:', workdir)
            results = common.load_output(workdir, 'results.json')
        else:
            for number in range(1, len(folds) + 1) if fold is None else [fold]:
                _train_fold(config, data, folds[number - 1], workdir / f'fold_{number}')
            if fold is not None:
                return None
            with filelock.FileLock(workdir / '.lock'):
                results = join(config, workdir, data, folds)
    print(format_summary(results, workdir))
    return results


def evaluate(workdir: Path) -> dict[str, Any]:
    """Tests all folds of a finished cross-validation together again.

    Raises:
      UserError: a fold is not finished, or the data are missing.
    """
    config = load_config(workdir)
    with report_full_disk(workdir), filelock.FileLock(workdir / '.lock'):
        data = common.load_data(config.data, workdir)
        results = join(config, workdir, data, _read_folds(workdir))
    print(format_summary(results, workdir))
    return results


def _check(config: ConfigDict, workdir: Path, division: Division) -> None:
    check_config(config)
    if config.name == 'lesions':
        raise UserError('crossvalidate is for models of classes: --config=lesions outlines lungs and lesions')
    if config.get('lesions') and division.by == 'patient':
        raise UserError(
            f'config.lesions={config.lesions} may have been trained on patients that the folds hold out: leave it '
            'out, or pass --by=source'
        )
    if config.model.get('pretrained') == LESION_BOX:
        raise UserError(
            f'config.model.pretrained={LESION_BOX} may have been trained on patients that the folds hold out: pass the '
            '.safetensors file of a lesion model that was trained without them'
        )
    if config.get('extractor'):
        raise UserError(
            f'config.extractor={config.extractor} was trained on patients that the folds hold out: leave it out, so '
            'that every fold trains its own'
        )
    if (workdir / 'config.json').exists() and not (workdir / FOLDS).exists():
        raise UserError(f'{workdir} holds a single run, not a cross-validation: choose another --workdir')


def _plan(config: ConfigDict, workdir: Path, division: Division) -> tuple[ConfigDict, covidx_ct.Prepared, list[Fold]]:
    """Loads the data and writes folds.json and the workdirs of the folds, or checks that they are the same."""
    with report_write_errors(workdir, '--workdir'):
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / '.lock')
    with lock:  # commands for single folds may start at once: they wait for the first one
        check_workdir(workdir, config)
        data = common.load_data(config.data, workdir)
        config = slices.settle_pooling(config, data)
        if division.by == 'source':
            folds = divide_sources(get_pool(data), get_sources(data), division.groups, config.seed)
        else:
            folds = divide_patients(get_pool(data), division.num_folds, config.seed)
        if (workdir / FOLDS).exists():
            before = _read_folds(workdir)
            if before != folds:
                names = [f'{f[0].name} to {f[-1].name}' for f in (before, folds)]
                what = f'{names[0]}, not {names[1]}' if names[0] != names[1] else 'the same folds of other lists'
                raise UserError(f'{workdir} holds {what}: pass the same flags again, or choose another --workdir')
        else:
            if division.by == 'source':
                _check_sources(config, data, folds)
            save_config(workdir, config)
            write_json(workdir / FOLDS, {'by': division.by, 'folds': [fold._asdict() for fold in folds]})
        for fold, folder in zip(folds, list_folds(workdir), strict=True):
            _create_folder(config, folder, fold)
    return config, data, folds


def _find_left_out(data: covidx_ct.Prepared, fold: Fold) -> set[str]:
    """Returns the sources that a fold leaves out."""
    sources = get_sources(data)
    return {sources[patient] for patient in fold.held_out}


def _measure_pictures(data: covidx_ct.Prepared) -> Pictures:
    return measure_listed(data.rows, Path(find_images(str(data.raw_dir), data.version)))


def _name_held_out(data: covidx_ct.Prepared, fold: Fold) -> set[str]:
    """Returns the names of the pictures of the sources that a fold leaves out, those of the test list included."""
    left_out = _find_left_out(data, fold)
    return {name_picture(row) for rows in data.rows.values() for row in rows if row.source in left_out}


def _check_sources(config: ConfigDict, data: covidx_ct.Prepared, folds: Sequence[Fold]) -> None:
    """Checks that every fold can do without its sources.

    Raises:
      UserError: the lesion model, or the rule of sick or normal, can't be trained without them, or their pictures are
        also among those to train on.
    """
    pictures = _measure_pictures(data)
    for fold in folds:
        if config.get('lesions'):
            plan_lesions(config.lesions, _find_left_out(data, fold))
            try:
                check_both(select_fold(data, fold).rows['train'])
            except UserError as error:
                raise UserError(f'{fold.name}: {error}') from error
        held_out = pictures.take(_name_held_out(data, fold))
        others = pictures.take(set(pictures.names) - set(held_out.names))
        shared = find_shared_pictures(others, held_out)
        if shared:
            raise UserError(
                f'{fold.name}: other sources have the same pictures: {join_faults(shared)}: leave them out of one side'
            )


def _train_fold(config: ConfigDict, data: covidx_ct.Prepared, fold: Fold, folder: Path) -> None:
    """Trains a fold, and before it its lesion model if the given one has seen sources that the fold leaves out."""
    log.info('%s', fold.name)
    if config.get('lesions') and not (folder / 'results.json').exists():
        planned = plan_lesions(config.lesions, _find_left_out(data, fold))
        if planned is not None:
            held_out = _measure_pictures(data).take(_name_held_out(data, fold))
            train_lesions(planned, folder / lesion_folds.FOLDER, held_out, fold.name)
            config = config.copy_and_resolve_references().unlock()
            config.lesions = str((folder / lesion_folds.FOLDER).resolve())
            config.lock()
    elif config.get('lesions'):
        config = load_config(folder)
    EXPERIMENTS[config.name].train(config, folder)


def _create_folder(config: ConfigDict, folder: Path, fold: Fold) -> None:
    """Writes what makes a folder the workdir of a fold; that of an extractor, too."""
    for of_model in (folder, folder / 'extractor') if 'extractor' in config else (folder,):
        of_model.mkdir(exist_ok=True)
        if not (of_model / FOLD).exists():
            write_fold(of_model, fold)
    phantoms = folder / 'phantoms'
    if not config.data.raw_dir and not phantoms.exists():
        phantoms.symlink_to(Path('..', 'phantoms'))  # the folds share them


def _read_division(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / FOLDS).read_text())


def _read_folds(workdir: Path) -> list[Fold]:
    try:
        return [parse_fold(fold) for fold in _read_division(workdir)['folds']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{workdir / FOLDS} is unreadable ({error}): choose another --workdir') from error


class Opinions(NamedTuple):
    """Calibrated logits for the examples of the pool, by models that did not train on them, in the order of the folds.

    Attributes:
      examples: the N examples; rows for a slice run, scans for a scan run.
      folds: number of the fold that holds out the example, from 0, int [N].
      logits: of the member that holds it out, over the member's temperature [N, K].
      second: of the member that validates on it; NaN without one [N, K].
      is_known: whether the training of the member that holds it out had its class, bool [N].
      baselines: name -> scores [N, K].
    """

    examples: list[Example]
    folds: np.ndarray
    logits: np.ndarray
    second: np.ndarray
    is_known: np.ndarray
    baselines: dict[str, np.ndarray]

    def take(self, chosen_N: np.ndarray) -> 'Opinions':
        """Returns the examples of a bool mask."""
        examples = [example for example, is_chosen in zip(self.examples, chosen_N, strict=True) if is_chosen]
        arrays = (self.folds, self.logits, self.second, self.is_known)
        baselines = {name: scores[chosen_N] for name, scores in self.baselines.items()}
        return Opinions(examples, *(values[chosen_N] for values in arrays), baselines)


def _create_experiment(config: ConfigDict, data: covidx_ct.Prepared, folder: Path) -> Classification:
    if 'extractor' in config:
        return scans.create_experiment(config, data, folder / 'extractor')
    return slices.create_experiment(config, data)


def _collect(
    config: ConfigDict, workdir: Path, data: covidx_ct.Prepared, folds: Sequence[Fold]
) -> tuple[Classification, Opinions, np.ndarray]:
    """Runs every member on its held-out and validation examples and on the test list.

    Returns:
      The experiment on the whole lists, the opinions, and the calibrated logits of the members on its test split
      [M, N, K].
    """
    examples, numbers, logits, of_test, seconds, known, scores = [], [], [], [], {}, [], []
    by_source = _read_division(workdir)['by'] == 'source'
    for number, (fold, folder) in enumerate(zip(folds, list_folds(workdir), strict=True)):
        log.info('testing %s', fold.name)
        of_fold = select_fold(data, fold)
        # The test list, with what the member was trained on: the rule of lesions is fitted on its training split.
        outer = of_fold._replace(
            rows={**of_fold.rows, 'test': data.rows['test']}, sources={**of_fold.sources, 'test': data.sources['test']}
        )
        temperature = np.float32(common.load_output(folder, 'calibration.json')['temperature'])
        of_folder = load_config(folder)
        experiment, tested = (_create_experiment(of_folder, one, folder) for one in (of_fold, outer))
        with open_checkpoints(folder) as checkpoints:
            variables = common.restore_best(experiment.create_variables, checkpoints)
        held_out, validation = (experiment.predict(variables, split).logits / temperature for split in ('test', 'val'))
        of_test.append(tested.predict(variables, 'test').logits / temperature)
        seconds |= {_get_key(e): x for e, x in zip(experiment.examples['val'], validation, strict=True)}
        examples += experiment.examples['test']
        numbers += [number] * len(held_out)
        known.append(np.isin(experiment.get_labels('test'), experiment.get_labels('train')))
        logits.append(held_out)
        scores.append(experiment.compute_baselines())
        if by_source and experiment.unit == 'slices':
            split_labels = {split: experiment.get_labels(split) for split in experiment.examples}
            scores[-1] |= compute_shape_scores(experiment.data.sources, split_labels)
    whole = _create_experiment(of_folder, data, folder)
    none = np.full(len(CLASSES), np.nan, np.float32)
    opinions = Opinions(
        examples,
        np.array(numbers),
        np.concatenate(logits),
        np.stack([seconds.get(_get_key(e), none) for e in examples]),
        np.concatenate(known),
        {name: np.concatenate([of_fold[name] for of_fold in scores]) for name in scores[0]},
    )
    return whole, opinions, np.stack(of_test)


def _get_key(example: Example) -> tuple:
    """Returns what names an example in every fold."""
    return (example.file,) if hasattr(example, 'file') else (example.scan, example.label)


def join(config: ConfigDict, workdir: Path, data: covidx_ct.Prepared, folds: Sequence[Fold]) -> dict[str, Any]:
    """Scores the out-of-fold predictions and the ensemble, and writes the files of the workdir, results.json last.

    Returns:
      results.json: as that of a run, of the ensemble on the test list; 'out_of_fold', the same scores of out-of-fold
      predictions with 'by_fold' and 'spread'; 'ensemble', its gain over single members and their disagreement;
      'label_errors'.

    Raises:
      UserError: a fold is not finished.
    """
    folders = list_folds(workdir)
    unfinished = [folder.name for folder in folders if not (folder / 'results.json').exists()]
    if unfinished:
        raise UserError(f'{workdir}: {", ".join(unfinished)} not finished: run the crossvalidate command again')
    whole, opinions, of_test_MxNxK = _collect(config, workdir, data, folds)
    labels, patients = _get_labels(opinions.examples), [e.patient for e in opinions.examples]
    test, test_labels, test_patients = whole.examples['test'], whole.get_labels('test'), whole.get_patients('test')
    log.info('computing statistics of %d out-of-fold and %d test %s', len(labels), len(test), whole.unit)

    known = opinions.take(opinions.is_known)  # a model cannot tell a class that its training lacks
    rules = _fit_rules(known, whole.unit)
    ensemble_logits = of_test_MxNxK.mean(0)
    probabilities = apply_temperature(ensemble_logits, rules['temperature'])
    out_of_fold = apply_temperature(opinions.logits, rules['temperature'])
    baselines = whole.compute_baselines()
    of_folds = [common.load_output(folder, 'results.json') for folder in folders]
    title, unit, by = whole.title.split(' (')[0], whole.unit, _read_division(workdir)['by']
    thresholds = {target: chosen['threshold'] for target, chosen in rules['thresholds'].items()}
    results = {
        **common.describe_data(config.data, data),
        'model': f'{title} ensemble of {len(folds)} ({unit})',
        'split': 'test',
        **_score(probabilities, test_labels, test_patients, baselines),
        'curves': compute_curves(test_labels, probabilities, test_patients, CLASSES),
        'screening': evaluate_rules(
            rules,
            ensemble_logits,
            test_labels,
            test_patients,
            CLASSES,
            train_shares_K=np.bincount(labels, minlength=len(CLASSES)) / len(labels),
        ),
        'subgroups': compute_subgroups(
            read_columns(data.raw_dir, test, data.rows['test']),
            test_labels,
            probabilities,
            test_patients,
            CLASSES,
            thresholds,
        ),
        'explanations': {'leading_map': _choose_lead(of_folds)},
        'out_of_fold': {
            'by': by,
            **_score(out_of_fold, labels, patients, opinions.baselines),
            'curves': compute_curves(labels, out_of_fold, patients, CLASSES),
            'calibration': compute_calibration(apply_temperature(opinions.logits, 1.0), labels),
            'subgroups': compute_subgroups(
                read_columns(data.raw_dir, opinions.examples, get_pool(data)),
                labels,
                out_of_fold,
                patients,
                CLASSES,
                thresholds,
            ),
            **_compare_folds(opinions, out_of_fold, folds, of_folds),
        },
        **(
            {}
            if by == 'patient'
            else {'left_out': _compare_sources(workdir, data, folds, opinions, test, of_test_MxNxK)}
        ),
        'ensemble': _compare_members(of_test_MxNxK, test, probabilities, rules),
        'label_errors': _find_label_errors(known, out_of_fold[opinions.is_known], unit),
        'training': {
            'pretrained': of_folds[0]['training']['pretrained'],
            'num_folds': len(folds),
            'seconds': round(sum(one['training']['seconds'] for one in of_folds), 1),
        },
        'environment': common.describe_environment(),
    }
    _write_tables(workdir, opinions, out_of_fold, test, probabilities, of_test_MxNxK, rules)
    write_json(workdir / 'calibration.json', rules)
    write_json(workdir / 'preprocessing.json', describe_preprocessing(config, data.fingerprint))
    write_checklist(workdir / 'checklist.html', results, flatten_config(config), [])
    report.write_folds_report(
        workdir / 'report.html', results, rules, unit=unit, load_image=_create_image_loader(data, known)
    )
    write_json(workdir / 'results.json', results)
    return results


def _get_labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])


def _fit_rules(opinions: Opinions, unit: str) -> dict[str, Any]:
    """Returns the content of calibration.json, fitted on out-of-fold examples."""
    patients = [example.patient for example in opinions.examples]
    rules = fit_rules(opinions.logits, _get_labels(opinions.examples), patients, CLASSES)
    twice = ~np.isnan(opinions.second[:, 0])
    pair = np.stack([opinions.logits[twice], opinions.second[twice]])
    of_pair = np.stack([apply_temperature(one, rules['temperature']) for one in pair])
    seen_twice = [example for example, is_twice in zip(opinions.examples, twice, strict=True) if is_twice]
    rules['disagreement'] = fit_limit(compute_disagreement(of_pair), [example.patient for example in seen_twice])
    if unit == 'slices':
        temperature = rules['temperature']
        rules['scans'] = fit_vote_rules(opinions.logits, group_scans(opinions.examples), temperature)
        rule, of_scans = rules['scans']['rule'], group_scans(seen_twice)
        votes = [
            np.stack([compute_vote_logits(logits[list(scan.records)], temperature, rule) for scan in of_scans])
            if of_scans
            else np.empty((0, len(CLASSES)))
            for logits in pair
        ]
        of_pair = np.stack([apply_temperature(one, rules['scans']['temperature']) for one in votes])
        rules['scans']['disagreement'] = fit_limit(compute_disagreement(of_pair), [scan.patient for scan in of_scans])
    return rules


def _score(
    probabilities: np.ndarray, labels: np.ndarray, patients: Sequence[str], baselines: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the metrics of the model, of the baselines, and of both per patient."""
    return {
        **compute_metrics(labels, probabilities.argmax(1), patients, CLASSES),
        'baselines': {
            name: compute_metrics(labels, scores.argmax(1), patients, CLASSES) for name, scores in baselines.items()
        },
        'covid19_against_pneumonia_per_patient': {
            name: compute_patient_level(scores, labels, patients)
            for name, scores in {'model': probabilities, **baselines}.items()
        },
    }


def _estimate(probabilities_MxNxK: np.ndarray, examples: Sequence[Example]) -> dict[str, Estimate]:
    resamples = draw_resamples(len({example.patient for example in examples}), seed=0)
    return ablation.estimate(ablation.Outcome(probabilities_MxNxK, {}), examples, (), resamples)


def _compare_folds(
    opinions: Opinions, probabilities: np.ndarray, folds: Sequence[Fold], of_folds: Sequence[dict]
) -> dict[str, Any]:
    """Returns 'by_fold', the scores of every fold on its held-out examples, and 'spread', their mean and deviation."""
    rows = []
    for number, (fold, of_fold) in enumerate(zip(folds, of_folds, strict=True)):
        places = np.flatnonzero(opinions.folds == number)
        held_out = [opinions.examples[i] for i in places]
        found = _estimate(probabilities[np.newaxis, places], held_out)
        rows.append(
            {
                'fold': fold.name,
                'num_examples': len(held_out),
                'num_patients': len(fold.held_out),
                'classes': common.count_classes([example.label for example in held_out]),
                **{name: float(found[name].by_seed[0]) if name in found else None for name in SCORES},
                'num_epochs': of_fold['training']['num_epochs'],
                'seconds': of_fold['training']['seconds'],
                'warnings': of_fold.get('warnings', []),
            }
        )
    spread = {}
    for name in SCORES:
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            spread[name] = {'mean': float(np.mean(values)), 'deviation': deviation, 'num_folds': len(values)}
            spread[name] |= {'lowest': min(values), 'highest': max(values)}
    return {'by_fold': rows, 'spread': spread}


def _compare_members(
    of_test_MxNxK: np.ndarray, test: Sequence[Example], probabilities: np.ndarray, rules: dict[str, Any]
) -> dict[str, Any]:
    """Compares the ensemble with its members on the test list, and examples on which members agree with the others."""
    of_members = np.stack([apply_temperature(logits, rules['temperature']) for logits in of_test_MxNxK])
    single, whole = (_estimate(p, test) for p in (of_members, probabilities[np.newaxis]))
    scores = {}
    for name in (name for name in SCORES if name in single):
        mean = Estimate(single[name].by_seed.mean(keepdims=True), single[name].resampled)
        gain = subtract(whole[name], mean)
        scores[name] = {
            'ensemble': float(whole[name].by_seed[0]),
            'members': single[name].by_seed.tolist(),
            'mean_member': float(mean.by_seed[0]),
            'gain': float(gain.by_seed[0]),
            'interval': compute_interval(gain.resampled),
        }
    limit = rules['disagreement']['limit']
    disagreement = compute_disagreement(of_members)
    beyond = np.zeros(len(test), bool) if limit is None else disagreement > limit
    right = probabilities.argmax(1) == _get_labels(test)
    return {
        'scores': scores,
        'disagreement': {
            **rules['disagreement'],
            'test_median': float(np.median(disagreement)),
            'test_share_beyond': float(beyond.mean()),
            'test_accuracy_beyond': float(right[beyond].mean()) if beyond.any() else None,
            'test_accuracy_within': float(right[~beyond].mean()) if not beyond.all() else None,
        },
    }


def _compare_sources(
    workdir: Path,
    data: covidx_ct.Prepared,
    folds: Sequence[Fold],
    opinions: Opinions,
    test: Sequence[Example],
    of_test_MxNxK: np.ndarray,
) -> list[dict[str, Any]]:
    """Scores every group of sources by the member that left it out and by the members that trained with it.

    Sick against normal, by each member's own temperature and screening threshold. Inside and left out are compared on
    the group's examples of the test list, which no member used. A class that the member's training lacks is not scored.
    """
    sources = get_sources(data)
    normal = CLASSES.index('normal')
    thresholds = [
        common.load_output(folder, 'calibration.json')['thresholds']['disease']['threshold']
        for folder in list_folds(workdir)
    ]

    def score(logits_MxNxK: np.ndarray, members: Sequence[int], examples: Sequence[Example], chosen: np.ndarray) -> Any:
        p_MxNxK = np.stack([apply_temperature(logits, 1.0) for logits in logits_MxNxK[:, chosen]])
        scores = 1 - p_MxNxK[..., normal]
        called = [
            p.argmax(1) != normal if thresholds[m] is None else s >= thresholds[m]
            for m, s, p in zip(members, scores, p_MxNxK, strict=True)
        ]
        labels, patients = _get_labels(examples)[chosen], np.array([e.patient for e in examples])[chosen]
        return score_sick(scores, np.stack(called), labels != normal, patients)

    region = load_config(workdir).data.region
    rows = []
    for number, fold in enumerate(folds):
        trained = {row.label for row in select_fold(data, fold).rows['train']}
        labels = _get_labels(opinions.examples)
        scored = (opinions.folds == number) & np.isin(labels, list(trained))
        patients = np.array([example.patient for example in opinions.examples])[scored]
        group = {sources[patient] for patient in fold.held_out}
        on_test = np.array([sources[e.patient] in group for e in test]) & np.isin(_get_labels(test), list(trained))
        others = [m for m in range(len(folds)) if m != number]
        left = score(of_test_MxNxK[[number]], [number], test, on_test)
        inside = score(of_test_MxNxK[others], others, test, on_test) if others else None
        rows.append(
            {
                'sources': sorted(group),
                'num_patients': len(set(patients.tolist())),
                'lesions': _name_lesions(list_folds(workdir)[number]),
                'lungs_seen': sorted(read_seen_sources('box') & group) if region == 'lungs' else [],
                'classes': common.count_classes(labels[scored]),
                'not_scored': [CLASSES[label] for label in sorted(set(range(len(CLASSES))) - trained)],
                'left_out': describe_score(score(opinions.logits[np.newaxis], [number], opinions.examples, scored)),
                'num_test_patients': len({e.patient for e, is_chosen in zip(test, on_test, strict=True) if is_chosen}),
                'inside_on_test': describe_score(inside),
                'left_out_on_test': describe_score(left),
                'difference': subtract_scores(left, inside) if left and inside else None,
                'baselines': {
                    name: describe_score(
                        score_sick(
                            -values[np.newaxis, scored, normal],
                            values[np.newaxis, scored].argmax(-1) != normal,
                            labels[scored] != normal,
                            patients,
                        )
                    )
                    for name, values in opinions.baselines.items()
                },
            }
        )
    return rows


def _name_lesions(folder: Path) -> str:
    """Returns which lesion model a fold uses, by the sources that it was trained on; '' for none."""
    name = load_config(folder).get('lesions')
    return ', '.join(sorted(read_seen_sources(name))) if name else ''


def _choose_lead(of_folds: Sequence[dict]) -> dict[str, Any] | None:
    """Returns the leading map that most members have, as one of them describes it; None if none scored its maps."""
    leads = [(one.get('explanations') or {}).get('leading_map') for one in of_folds]
    leads = [lead for lead in leads if lead is not None]
    if not leads:
        return None
    name, _ = Counter(lead['name'] for lead in leads).most_common(1)[0]
    return next(lead for lead in leads if lead['name'] == name)


def _find_label_errors(opinions: Opinions, probabilities: np.ndarray, unit: str) -> dict[str, Any]:
    labels, patients = _get_labels(opinions.examples), [example.patient for example in opinions.examples]
    scan_names = [example.scan for example in opinions.examples]
    if unit == 'scans':
        return describe_label_errors(probabilities, labels, scan_names, patients, None)
    files = [example.file for example in opinions.examples]
    return describe_label_errors(probabilities, labels, files, patients, scan_names)


def _create_image_loader(data: covidx_ct.Prepared, opinions: Opinions) -> Callable[[int], np.ndarray]:
    """Returns a function: index of an out-of-fold example -> its slice, of a scan the middle one, uint8 [S, S]."""
    places: dict[tuple, list[tuple[str, int]]] = {}
    for split in POOL:
        for number, row in enumerate(data.rows[split]):
            for key in ((row.file,), (row.scan, row.label)):
                places.setdefault(key, []).append((split, number))

    def load(index: int) -> np.ndarray:
        of_example = places[_get_key(opinions.examples[index])]
        split, number = of_example[len(of_example) // 2]
        return data.sources[split][number]['image'][..., 0]

    return load


def _write_tables(
    workdir: Path,
    opinions: Opinions,
    out_of_fold: np.ndarray,
    test: Sequence[Example],
    probabilities: np.ndarray,
    of_test_MxNxK: np.ndarray,
    rules: dict[str, Any],
) -> None:
    """Writes predictions.csv and test_predictions.csv, with calibrated probabilities and the members' disagreement."""
    temperature = rules['temperature']
    twice = np.stack([apply_temperature(x, temperature) for x in (opinions.logits, opinions.second)])
    of_members = np.stack([apply_temperature(logits, temperature) for logits in of_test_MxNxK])
    for name, examples, shares, every, further in (
        ('predictions.csv', opinions.examples, out_of_fold, twice, {'fold': (opinions.folds + 1).tolist()}),
        ('test_predictions.csv', test, probabilities, of_members, {}),
    ):
        disagreement = compute_disagreement(every).tolist()
        columns = {
            **({'file': [e.file for e in examples]} if hasattr(examples[0], 'file') else {}),
            'scan': [e.scan for e in examples],
            'patient': [e.patient for e in examples],
            **common.create_source_column(examples),
            **({'slice': [e.slice_index for e in examples]} if hasattr(examples[0], 'file') else {}),
            'label': [e.label for e in examples],
            **{f'p_{c}': p for c, p in zip(CLASSES, shares.T, strict=True)},
            'disagreement': ['' if np.isnan(value) else value for value in disagreement],
            **further,
        }
        write_predictions(workdir / name, columns)


def format_summary(results: dict[str, Any], workdir: Path) -> str:
    """Returns the summary printed at the end: out-of-fold scores, the folds, and the ensemble on the test list."""
    out, spread, unit = results['out_of_fold'], results['out_of_fold']['spread'], _get_unit(results)
    lines = ['', f'Out of fold, {len(out["by_fold"])} folds by {out["by"]}', format_table(out, unit=unit.capitalize())]
    lines += common.format_baselines(out)
    lines += ['', format_comparison(out['covid19_against_pneumonia_per_patient']), '', 'Folds']
    for name, of_score in spread.items():
        shown = f'{of_score["mean"]:.3f}'
        if of_score['deviation'] is not None:
            shown += f', standard deviation {of_score["deviation"]:.3f}'
        lines.append(
            f'{report.SCORES[name]}: mean {shown}, {of_score["lowest"]:.3f} to {of_score["highest"]:.3f} '
            f'in {of_score["num_folds"]} folds'
        )
    for row in results.get('left_out', ()):
        lines.append(f'Without {", ".join(row["sources"])}: {_describe_left_out(row)}')
    lines += [
        '',
        f'Ensemble on the test list, {results["num_examples"]:,} {unit} of {results["num_patients"]} patients',
    ]
    for name, of_score in results['ensemble']['scores'].items():
        low, high = of_score['interval'] or (float('nan'),) * 2
        lines.append(
            f'{report.SCORES[name]}: {of_score["ensemble"]:.3f}, mean of the members {of_score["mean_member"]:.3f}, '
            f'gain {of_score["gain"]:+.3f} [{low:+.3f}, {high:+.3f}]'
        )
    lines += common.format_baselines(results)
    for kind, found in results['label_errors'].items():
        lines.append(f'Labels that may be wrong: {found["num_suspects"]:,} of {found["num_examples"]:,} {kind}')
    return '\n'.join(
        [
            *lines,
            '',
            f'Brackets: {out["intervals"]["level"]:.0%} intervals, {out["intervals"]["method"]}.',
            *([f'Data: {results["notice"]}.'] if results['notice'] else []),
            *(f'Warning: {warning}.' for warning in results.get('warnings', ())),
            f'Report: {workdir / "report.html"}',
            f'Results, predictions and the folds: {workdir}',
        ]
    )


def _describe_left_out(row: dict[str, Any]) -> str:
    """Returns the scores of a group of sources as text."""
    if row['left_out'] is None:
        return 'training then lacks its classes: not scored'
    text = f'{row["left_out"]["kind"]} {format_score(row["left_out"]["value"], row["left_out"]["interval"])} of '
    text += f'{row["num_patients"]} patients'
    if row['difference'] is not None:
        inside, left = row['inside_on_test'], row['left_out_on_test']
        text += f'; on the test list {left["kind"]} {left["value"]:.3f}, inside {inside["value"]:.3f}'
    return text + (f'; without {" and ".join(row["not_scored"])} in training' if row['not_scored'] else '')


def _get_unit(results: dict[str, Any]) -> str:
    return 'slices' if 'slices' in results['label_errors'] else 'scans'
