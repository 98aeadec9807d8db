"""A finished run on data that it never saw: the comparison with its own test list, and external/<name>/ in its workdir.

Shapes: N examples, S slices, K classes, D pixels of a thumbnail.
"""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from covidjax.audit.baseline_checks import Examples, fit_forest, fit_ridge, score_examples
from covidjax.audit.overlap import Pictures, find_shared_pictures, measure_listed, measure_prepared
from covidjax.data import covidx_ct
from covidjax.data.lists import CLASSES, SPLITS, find_images
from covidjax.data.sequences import Scan, group_scans
from covidjax.errors import UserError, join_faults
from covidjax.evaluation import baselines
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.external import Side, compare_sides, correct_to_own_shares, refit
from covidjax.evaluation.metrics import compute_metrics
from covidjax.evaluation.novelty import MAX_EXAMPLES
from covidjax.evaluation.predictions import softmax, write_predictions
from covidjax.evaluation.sick import Found, compute_features, compute_sick, join_logits
from covidjax.evaluation.subgroups import compute_subgroups
from covidjax.evaluation.summary import summarise
from covidjax.evaluation.voting import compute_vote_logits
from covidjax.experiment import common
from covidjax.experiment.config import flatten_config
from covidjax.experiment.runs import Run, compute_mean_novelty, compute_member_outputs
from covidjax.experiment.workdir import list_folds
from covidjax.files import report_write_errors, write_json
from covidjax.report.checklist import write_checklist
from covidjax.report.external import format_comparison, write_external_report

log = logging.getLogger(__name__)

FOLDER = 'external'
_SMALLEST = 5e-10  # half the last decimal of predictions.csv


class Outside(NamedTuple):
    """Other data, scored by a run.

    Attributes:
      name: of the folder of the results.
      path: of the data.
      split: 'test' or 'all' lists, or 'scans'.
      unit: 'slices' or 'scans'.
      side: labels, logits and patients of the N examples, and which slices are unusual.
      names: columns of predictions.csv that name the examples.
      groups: columns of subgroups, see `subgroups.compute_subgroups`.
      thumbnails: of every example, of scans the mean over the slices, float [N, D].
      scans: the scan of every example with all its slices; None if there are no file names.
      dataset: description for results.json.
      left_out: {name, reason} of everything that was not scored.
    """

    name: str
    path: Path
    split: str
    unit: str
    side: Side
    names: dict[str, Sequence[Any]]
    groups: dict[str, Sequence[str]]
    thumbnails: np.ndarray
    scans: Sequence[Scan] | None
    dataset: dict[str, Any]
    left_out: list[dict[str, str]]


class Inside(NamedTuple):
    """The data of a run.

    Attributes:
      data: None if they are not at hand.
      reason: why they are not, else ''.
    """

    data: covidx_ct.Prepared | None
    reason: str


def load_inside(config: ConfigDict, workdir: Path) -> Inside:
    """Loads the data that a run was trained and tested on, if they are still where they were."""
    try:
        return Inside(common.load_data(config.data, workdir), '')
    except UserError as error:
        log.warning('the data of the run are not at hand: %s', error)
        return Inside(None, str(error))


def refuse_shared_patients(inside: Inside, workdir: Path, patients: Sequence[str], path: Path) -> None:
    """Raises UserError if patients of the run (without its data: of its test list) are in `patients`."""
    if inside.data is None:
        known = {row['patient'] for row in _read_rows(_find_predictions(workdir))}
    else:
        known = {row.patient for rows in inside.data.rows.values() for row in rows}
    shared = sorted(known.intersection(patients))
    if shared:
        raise UserError(
            f'{path} is no test for {workdir}: the data of the run have the same patients: {join_faults(shared)}: '
            'leave them out of its lists, or rename them if they only have the same numbers'
        )


def refuse_shared_pictures(inside: Inside, workdir: Path, outside: Pictures, path: Path, *, prepared: bool) -> None:
    """Raises UserError if pictures of a run's data, or nearly the same ones, are in other data (see `audit.copies`).

    Args:
      inside: data of the run; nothing is checked without them.
      workdir: of the run.
      outside: measurements of the other data.
      path: of the other data.
      prepared: `outside` are prepared slices, not whole images.
    """
    data = inside.data
    if data is None:
        return
    if prepared:
        slices = (
            (f'{row.file} ({row.patient})', data.sources[split][i]['image'][..., 0])
            for split, rows in data.rows.items()
            for i, row in enumerate(rows)
        )
        known = measure_prepared(slices)
    else:
        known = measure_listed(data.rows, Path(find_images(str(data.raw_dir), data.version)))
    shared = find_shared_pictures(known, outside)
    if shared:
        raise UserError(
            f'{path} is no test for {workdir}: the data of the run have the same pictures: {join_faults(shared)}: '
            'leave these patients out'
        )


def get_rules(run: Run, unit: str) -> dict[str, Any]:
    """Returns the rules of a run for its own examples, or of a slice run for the votes of its slices on a scan.

    Raises:
      UserError: a run of an earlier version has no rules for votes.
    """
    if run.is_scan_run or unit == 'slices':
        return run.rules
    if 'scans' not in run.rules:
        raise UserError('the run has no rules for scans, it is of an earlier version: --mode=evaluate writes them')
    return run.rules['scans']


def _find_predictions(workdir: Path) -> Path:
    """Returns the table of the run's own test list."""
    return workdir / ('test_predictions.csv' if list_folds(workdir) else 'predictions.csv')


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline='') as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): --mode=evaluate writes it again') from error


def read_inside_side(run: Run, workdir: Path, unit: str) -> Side:
    """Returns what a run said of its own test list, from its table of predictions.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = _find_predictions(workdir)
    rows = _read_rows(path)
    of_votes = not run.is_scan_run and unit == 'scans'
    prefix = 'classifier_' if of_votes and run.lesions else 'p_'  # votes are joined with lesions, not made of joined
    try:
        labels = np.array([int(row['label']) for row in rows])
        patients = [row['patient'] for row in rows]
        p = np.array([[float(row[prefix + name]) for name in CLASSES] for row in rows])
        # The table of an ensemble is calibrated, that of a single run is not.
        logits = np.log(np.maximum(p, _SMALLEST)) * (run.temperature if len(run.members) > 1 else 1)
        if not of_votes:
            return Side(labels, logits, patients, None, [])
        names = ('lungs_area', 'lesions_area', 'lesions_peak') if run.lesions else ()
        found = [np.array([float(row[name]) for row in rows]) for name in names]
        members: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault((row['scan'], labels[i]), []).append(i)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f'{path} is damaged or of an earlier version: --mode=evaluate writes it again') from error
    rule, temperature = get_rules(run, unit)['rule'], run.classifier_temperature
    votes = np.stack([compute_vote_logits(logits[of_scan], temperature, rule) for of_scan in members.values()])
    if run.lesions:
        features = [compute_features(Found(*found).select(of_scan)) for of_scan in members.values()]
        votes = join_logits(compute_sick(run.sick_rule, np.stack(features)), votes)
    return Side(np.array([label for _, label in members]), votes, [patients[m[0]] for m in members.values()], None, [])


def add_unusual(side: Side, run: Run, inside: Inside) -> Side:
    """Adds which slices of the test list are unusual, of at most `MAX_EXAMPLES`, spread evenly over the list."""
    if inside.data is None or all(member.novelty is None for member in run.members):
        return side
    rows, source = inside.data.rows['test'], inside.data.sources['test']
    chosen = np.unique(np.linspace(0, len(rows) - 1, MAX_EXAMPLES).round().astype(int)).tolist()
    images = np.stack([source[i]['image'] for i in chosen])
    unusual = compute_mean_novelty(run, compute_member_outputs(run, images)) > 1
    return side._replace(unusual=unusual, slice_patients=[rows[i].patient for i in chosen])


def score_baselines(run: Run, inside: Inside, outside: Outside) -> dict[str, np.ndarray]:
    """Returns the scores [N, K] of the baselines that were fitted to the run's training list, as in its own report."""
    n = len(outside.side.labels)
    scores = {'majority class': np.tile(_count_training(run, inside, outside.unit), (n, 1))}
    if inside.data is None:
        return scores
    data = inside.data
    if outside.scans is not None:
        train = [scan for scan in group_scans(data.rows['train']) if len(scan.records) >= run.min_slices]
        per_slice = outside.unit == 'slices'
        scores['file names only'] = baselines.compute_file_name_scores(train, outside.scans, per_slice=per_slice)
    labels = {split: np.array([row.label for row in data.rows[split]]) for split in ('train', 'val')}
    predict, _ = baselines.fit_thumbnails(data.sources, labels)
    scores['thumbnail ridge'] = predict(outside.thumbnails)
    return scores


def _count_training(run: Run, inside: Inside, unit: str) -> np.ndarray:
    """Returns the number of training examples of each class [K]."""
    if run.is_scan_run:
        # An ensemble counts the scans that it was calibrated on, which are those of training and validation.
        taking_part = run.results.get('scans', {}).get('taking_part')
        counts = taking_part['train'] if taking_part else run.rules['class_counts']
    elif unit == 'slices':
        counts = run.results['dataset']['slices']['train']
    elif inside.data is not None:
        counts = common.count_classes([scan.label for scan in group_scans(inside.data.rows['train'])])
    else:  # a slice run does not count its training scans
        counts = run.rules['scans']['class_counts']
    return np.array([counts[name] for name in CLASSES], float)


def score_own_baselines(outside: Outside) -> dict[str, dict[str, Any]]:
    """Scores baselines that are fitted to the other data themselves, cross-validated by patient.

    Returns:
      name -> `compute_metrics`, with 'fitted_on'. Empty with too few patients or classes.
    """
    labels, patients = outside.side.labels, np.asarray(outside.side.patients)
    fits = {'thumbnail ridge': (outside.thumbnails, fit_ridge)}
    if outside.scans is not None:
        features = np.stack([baselines.compute_file_name_features(scan) for scan in outside.scans])
        fits = {'file names only': (features, fit_forest), **fits}
    found = {}
    for name, (features, fit) in fits.items():
        examples = Examples(features, labels, patients, np.ones(len(labels), int))
        for scored in score_examples({'these data': examples}, fit):
            metrics = compute_metrics(labels, scored.scores.argmax(1), patients.tolist(), CLASSES)
            found[name] = {'fitted_on': scored.fitted_on, **metrics}
    return found


def write_external(run: Run, workdir: Path, inside: Inside, outside: Outside) -> dict[str, Any]:
    """Compares a run inside and outside, writes external/<name>/ in its workdir and prints a summary.

    The folder gets predictions.csv (not calibrated), report.html and, last, results.json; checklist.html of the run is
    written again.

    Returns:
      The content of results.json.
    """
    side, unit, rules = outside.side, outside.unit, get_rules(run, outside.unit)
    own = add_unusual(read_inside_side(run, workdir, unit), run, inside)
    counts = _count_training(run, inside, unit)
    comparison = compare_sides(own, side, rules, CLASSES)
    results = {
        'name': outside.name,
        'path': str(outside.path),
        'split': outside.split,
        'unit': unit,
        'data': outside.name,
        'model': run.results['model'],
        'trained_on': {key: run.results['dataset'][key] for key in ('raw_dir', 'fingerprint')},
        'notice': run.results['notice'],
        'warnings': _collect_warnings(run, inside, comparison, len(outside.left_out)),
        'dataset': outside.dataset,
        'num_left_out': len(outside.left_out),
        'left_out': outside.left_out,
        'shared': {
            'patients': 'none' if inside.data is not None else 'none with the test list; the others were not checked',
            'pictures': 'none' if inside.data is not None else 'not checked',
        },
        **summarise(
            rules,
            side.logits,
            side.labels,
            side.patients,
            CLASSES,
            baselines=score_baselines(run, inside, outside),
            train_shares_K=counts / counts.sum(),
        ),
        'comparison': comparison,
        'refit': refit(side, rules['temperature']),
        'own_shares': correct_to_own_shares(side, rules['temperature'], CLASSES),
        'own_baselines': score_own_baselines(outside),
        'subgroups': compute_subgroups(
            outside.groups,
            side.labels,
            apply_temperature(side.logits, rules['temperature']),
            side.patients,
            CLASSES,
            {target: chosen['threshold'] for target, chosen in rules['thresholds'].items()},
        ),
        'environment': common.describe_environment(),
    }
    folder = workdir / FOLDER / outside.name
    probabilities = softmax(side.logits)
    with report_write_errors(folder, '--workdir'):
        folder.mkdir(parents=True, exist_ok=True)
        columns = {
            **outside.names,
            'patient': side.patients,
            'label': side.labels.tolist(),
            **{f'p_{name}': p for name, p in zip(CLASSES, probabilities.T, strict=True)},
        }
        write_predictions(folder / 'predictions.csv', columns)
        write_external_report(folder / 'report.html', results, rules)
        write_json(folder / 'results.json', results)
        tests = [common.load_output(path.parent, path.name) for path in _list_tests(workdir)]
        write_checklist(workdir / 'checklist.html', run.results, flatten_config(run.config), tests)
    print(format_comparison(results, folder))
    return results


def _list_tests(workdir: Path) -> list[Path]:
    return sorted((workdir / FOLDER).glob('*/results.json'))


def _collect_warnings(run: Run, inside: Inside, comparison: dict[str, Any], num_left_out: int) -> list[str]:
    warnings = list(run.results.get('warnings', ()))
    if inside.data is None:
        warnings.append(
            f'the data of the run are not at hand ({inside.reason}): it was not checked whether these data share '
            'training patients or pictures with them'
        )
    warnings += [f'no {name} in these data' for name in comparison['absent']]
    if num_left_out:
        warnings.append(f'{num_left_out:,} could not be tested; results.json lists them with their reasons')
    unusual = comparison['scores']['unusual']['outside']['value']
    if unusual is not None and unusual > 0.5:
        warnings.append(f'{unusual:.0%} of the slices are unlike the training data')
    return warnings


def choose_name(workdir: Path, path: Path, split: str) -> str:
    """Returns the folder's name for the results: that of the data, '-all' for all lists, a number if it is taken."""
    base = path.resolve().stem if path.is_file() else path.resolve().name
    base += '-all' if split == 'all' else ''
    name, number = base, 1
    while (results := workdir / FOLDER / name / 'results.json').exists():
        if common.load_output(results.parent, results.name).get('path') == str(path.resolve()):
            break
        number += 1
        name = f'{base}-{number}'
    return name


def describe_lists(data: covidx_ct.Prepared, config: ConfigDict) -> dict[str, Any]:
    """Returns the part `dataset` of results.json for lists."""
    return {
        'raw_dir': str(data.raw_dir),
        'version': data.version,
        'fingerprint': data.fingerprint,
        'image_size': config.data.image_size,
        'region': config.data.region,
        'slices': {
            split: common.count_classes([row.label for row in data.rows[split]])
            for split in SPLITS
            if split in data.rows
        },
        'num_dropped': len(data.dropped),
    }
