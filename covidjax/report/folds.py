"""report.html of a cross-validation: out-of-fold scores, the folds, the ensemble on the test list, and labels."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covidjax.data.lists import CLASSES
from covidjax.report import figures, sections
from covidjax.report.charts import create_picture
from covidjax.report.label_errors import build_label_errors
from covidjax.report.page import Table, write_page
from covidjax.report.sections import Section, describe_interval
from covidjax.report.subgroups import build_subgroups

SCORES = {
    'accuracy': 'accuracy',
    'auc': 'mean AUC of the classes',
    'auc_covid19_pneumonia': 'AUC, COVID-19 against pneumonia, per patient',
}


_SHORT = {'accuracy': 'accuracy', 'auc': 'AUC', 'auc_covid19_pneumonia': 'AUC of patients'}
_DIVISIONS = {
    'patient': 'The next fold validated that model (of two folds, half of the other one), and all others trained it.',
    'source': 'A fifth of the patients of every other source and class validated that model, and the rest trained it.',
}


def write_folds_report(
    path: Path, results: dict[str, Any], rules: dict[str, Any], *, unit: str, load_image: Callable[[int], np.ndarray]
) -> None:
    """Writes the page.

    Args:
      path: where it goes.
      results, rules: content of results.json and calibration.json of the cross-validation.
      unit: 'slices' or 'scans'.
      load_image: index of an out-of-fold example -> a slice, uint8 [S, S].
    """
    out = results['out_of_fold']
    beside = ', '.join(f'{name} {metrics["accuracy"]:.1%}' for name, metrics in out['baselines'].items())
    headline = (
        f'{out["accuracy"]:.1%} of {out["num_examples"]:,} out-of-fold {unit} of {out["num_patients"]:,} patients are '
        f'classified correctly ({describe_interval(out["intervals"]["accuracy"])}). Baselines: {beside}. On the test '
        f'list, which no fold used, the ensemble classifies {results["accuracy"]:.1%} of {results["num_examples"]:,} '
        f'{unit} of {results["num_patients"]:,} patients correctly '
        f'({describe_interval(results["intervals"]["accuracy"])}).'
    )
    write_page(
        path,
        'run.html',
        title=f'{len(out["by_fold"])} folds: {results["model"]} on {results["data"]}',
        notice=results['notice'],
        warnings=[f'{warning[0].upper()}{warning[1:]}.' for warning in results.get('warnings', ())],
        headline=headline,
        sections=[
            *([build_left_out(results['left_out'])] if 'left_out' in results else []),
            _build_out_of_fold(out, unit),
            _build_folds(out, unit),
            *[
                section._replace(title='Subgroups, out of fold')
                for section in build_subgroups(out['subgroups'], unit=unit)
            ],
            _build_ensemble(results, unit),
            *[
                section._replace(title=f'{section.title}, test list')
                for section in (
                    *sections.build_scores(results, None, table='Table III', unit=unit, others={}),
                    *sections.build_statistics(results, rules, unit=unit),
                )
            ],
            build_label_errors(results['label_errors'], load_image),
            *sections.build_sources(results['dataset']),
            _build_facts(results),
            sections.build_limits(results),
        ],
    )


def _build_out_of_fold(out: dict[str, Any], unit: str) -> Section:
    every = {'model': out, **out['baselines']}
    patients = out['covid19_against_pneumonia_per_patient']
    rows = [
        (name, m['accuracy'], m['intervals']['accuracy'], m['macro_average']['recall'], m['weighted_average']['f1'])
        for name, m in every.items()
    ]
    per_class = [
        (
            name,
            *(x for key in ('recall', 'specificity', 'precision') for x in _get_score(out, name, key)),
            curve['auc'],
            curve['auc_interval'],
            out['per_class'][name]['support'],
        )
        for name, curve in out['curves']['per_class'].items()
    ]
    first = patients['model']
    by_patient = [
        (name, *(value for key in ('accuracy', 'auc') for value in (r[key], r[f'{key}_interval'])))
        for name, r in patients.items()
    ]
    confusion = figures.render_confusion_matrix(out['confusion_matrix'], CLASSES, title=f'Out-of-fold {unit}')
    return Section(
        'out-of-fold',
        'Out-of-fold scores',
        [
            f'Every patient is predicted by the fold that held the patient out. {_DIVISIONS[out["by"]]} Intervals '
            f'resample {out["num_patients"]:,} patients.',
            create_picture(figures.render_accuracies(every), 'Accuracy of each classifier with its 95 % interval'),
            Table(
                f'Accuracy over out-of-fold {unit}',
                ('classifier', 'accuracy', '95 % interval', 'mean recall of the classes', 'weighted F1'),
                rows,
            ),
            Table(
                f'Pneumonia ({first["num_pneumonia"]} patients) against COVID-19 ({first["num_covid19"]}), per patient',
                ('classifier', 'accuracy', 'interval', 'AUC', 'interval'),
                by_patient,
            ),
            create_picture(confusion, f'Confusion matrix: {out["confusion_matrix"]}, rows are the true classes'),
            Table(
                'Each class against the rest',
                (
                    *('class', 'sensitivity', 'interval', 'specificity', 'interval', 'PPV', 'interval'),
                    *('area under ROC', 'interval', unit),
                ),
                per_class,
            ),
            *out['notes'],
        ],
    )


def _get_score(out: dict[str, Any], name: str, key: str) -> tuple:
    return out['per_class'][name][key], out['intervals']['per_class'][name][key]


_BASELINES = {
    'thumbnail ridge': 'thumbnails',
    'silhouette ridge': 'silhouettes',
    'mean grey': 'mean grey',
    'file names only': 'file names',
    'majority class': 'majority',
}


def build_left_out(rows: Sequence[dict[str, Any]]) -> Section:
    """Returns the section 'left-out'; `rows` is `left_out` of results.json."""
    names = [name for name in _BASELINES if name in rows[0]['baselines']]
    table = [
        ('score', *((row['left_out'] or row['left_out_on_test'] or {}).get('kind', 'none') for row in rows)),
        ('patients', *(f'{row["num_patients"]:,}' for row in rows)),
        *((f'examples, {name}', *(f'{row["classes"][name]:,}' for row in rows)) for name in CLASSES),
        ('left out', *(_show(row['left_out']) for row in rows)),
        *((_BASELINES[name], *(_show(row['baselines'][name]) for row in rows)) for name in names),
        ('patients of the test list', *(f'{row["num_test_patients"]:,}' for row in rows)),
        ('inside, these patients', *(_show(row['inside_on_test']) for row in rows)),
        ('left out, these patients', *(_show(row['left_out_on_test']) for row in rows)),
        ('difference', *(_show(row['difference'], sign=True) for row in rows)),
    ]
    absent = [
        f'Without {", ".join(row["sources"])}, training has no {" and no ".join(row["not_scored"])}: examples of that '
        'class are not scored.'
        for row in rows
        if row['not_scored']
    ]
    outlined = [
        f'Without {", ".join(row["sources"])}, the lesion model has seen {row["lesions"]}.'
        for row in rows
        if row['lesions']
    ]
    outlined += [
        f'Without {", ".join(row["sources"])}, the lungs of slices without Hounsfield units are found by the model of '
        f'this package, which has seen {" and ".join(row["lungs_seen"])}.'
        for row in rows
        if row['lungs_seen']
    ]
    return Section(
        'left-out',
        'Sources left out',
        [
            'Each source or group of sources was left out once, from training, early stopping, calibration and '
            'thresholds. Sick against normal: a group that has both is scored by the area under the ROC curve of 1 - p '
            'of normal, and a group that has one by the share of right calls at the threshold that the member chose on '
            'its own validation.',
            *absent,
            *outlined,
            Table(
                'Sources left out, 95 % intervals by patient', ('', *(', '.join(row['sources']) for row in rows)), table
            ),
            'Left out: by the member that saw nothing of the group, on its patients in the lists for training and '
            'validation; below it baselines that were fitted on the same sources as the member. Inside: by the members '
            'that trained with the group, on its patients of the test list, which no member used; the difference is of '
            'the same patients. By ridge regression and file names there is no threshold: a group of one class counts '
            'their most probable class.',
        ],
    )


def _show(score: dict[str, Any] | None, *, sign: bool = False) -> str:
    if score is None:
        return '-'
    number = '+.3f' if sign else '.3f'
    interval = '' if score['interval'] is None else ' [{:{n}}, {:{n}}]'.format(*score['interval'], n=number)
    return f'{score["value"]:{number}}{interval}'


def _build_folds(out: dict[str, Any], unit: str) -> Section:
    names = [name for name in SCORES if name in out['spread']]
    rows = [
        (
            fold['fold'],
            fold['num_patients'],
            fold['num_examples'],
            *(fold['classes'][name] for name in CLASSES),
            *(fold[name] for name in names),
            fold['num_epochs'],
            f'{fold["seconds"]:,.0f} s',
        )
        for fold in out['by_fold']
    ]
    spread = [
        (SCORES[name], *(out['spread'][name][key] for key in ('mean', 'deviation', 'lowest', 'highest', 'num_folds')))
        for name in names
    ]
    warnings = [f'{fold["fold"]}: {warning}.' for fold in out['by_fold'] for warning in fold['warnings']]
    return Section(
        'folds',
        'Folds',
        [
            'Scores of each fold on the patients that it held out. The spread shows how far one division of the same '
            'data can lead; it is not an interval for other patients.',
            *warnings,
            Table(
                'Folds',
                ('fold', 'patients', unit, *CLASSES, *(_SHORT[name] for name in names), 'epochs', 'training'),
                rows,
            ),
            Table('Spread', ('score', 'mean', 'standard deviation', 'lowest', 'highest', 'folds'), spread),
        ],
    )


def _build_ensemble(results: dict[str, Any], unit: str) -> Section:
    ensemble = results['ensemble']
    count = len(results['out_of_fold']['by_fold'])
    rows = [
        (SCORES[name], s['ensemble'], s['mean_member'], min(s['members']), max(s['members']), s['gain'], s['interval'])
        for name, s in ensemble['scores'].items()
    ]
    found = ensemble['disagreement']
    parts: list[Any] = [
        f'The ensemble averages the logits of the {count} members, each divided by the temperature of its fold. Its '
        f'own temperature, thresholds and conformal sets were fitted on out-of-fold {unit}. All numbers from here to '
        '"Labels that may be wrong" are on the test list, which no fold used; "validation" there means out-of-fold.',
        Table(
            f'The ensemble against its members on {results["num_examples"]:,} test {unit}, interval by patient',
            ('score', 'ensemble', 'mean member', 'lowest member', 'highest member', 'gain', 'interval of the gain'),
            rows,
        ),
    ]
    if found['limit'] is None:
        return Section('ensemble', 'Ensemble', [*parts, found['note']])
    parts += [
        found['rule'],
        f'The limit is {found["limit"]:.3f}; a prediction beyond it is uncertain. On the test list the median is '
        f'{found["test_median"]:.3f}.',
        Table(
            f'Test {unit} by disagreement',
            ('members', f'share of {unit}', 'accuracy'),
            [
                ('agree within the limit', 1 - found['test_share_beyond'], found['test_accuracy_within']),
                ('disagree beyond the limit', found['test_share_beyond'], found['test_accuracy_beyond']),
            ],
        ),
    ]
    return Section('ensemble', 'Ensemble', parts)


def _build_facts(results: dict[str, Any]) -> Section:
    dataset, training = results['dataset'], results['training']
    facts = [
        ('written', datetime.datetime.now().astimezone().isoformat(' ', 'minutes')),
        ('data', results['data']),
        ('raw directory', dataset['raw_dir'] or 'none: generated phantoms'),
        ('fingerprint of lists and image size', dataset['fingerprint']),
        ('start', training['pretrained']),
        ('training time of all folds', f'{training["seconds"]:,.0f} s'),
        *(
            (name, ', '.join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in results['environment'].items()
        ),
    ]
    return Section(
        'run',
        'Training and environment',
        [
            'The folders fold_1, fold_2, ... are the workdirs of the folds, each with its own report.',
            Table('Cross-validation', ('property', 'value'), facts),
        ],
    )
