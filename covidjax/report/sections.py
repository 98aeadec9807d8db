"""Sections of report.html that both experiments share, built from results.json alone.

A section is a title and its parts in reading order: paragraphs, tables and pictures.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covidjax.data.lists import CLASSES
from covidjax.report import figures
from covidjax.report.charts import create_picture
from covidjax.report.page import Picture, Table, write_page

TARGETS = {'covid19': 'COVID-19 against the rest', 'disease': 'any disease against normal'}


class Section(NamedTuple):
    """A section of a report.

    Attributes:
      name: HTML anchor.
      title: heading.
      parts: paragraphs (str), tables and pictures, in reading order.
    """

    name: str
    title: str
    parts: Sequence[str | Table | Picture]


def write_report(path: Path, results: dict[str, Any], sections: Sequence[Section], *, unit: str) -> None:
    """Writes a self-contained page; `unit` names what was classified, 'slices' or 'scans'."""
    beside = ', '.join(f'{name} {metrics["accuracy"]:.1%}' for name, metrics in results['baselines'].items())
    headline = (
        f'{results["accuracy"]:.1%} of {results["num_examples"]:,} test {unit} of {results["num_patients"]:,} patients '
        f'are classified correctly ({describe_interval(results["intervals"]["accuracy"])}). Baselines: {beside}.'
    )
    title = f'{results["model"]} on {results["data"]}'
    warnings = [f'{warning[0].upper()}{warning[1:]}.' for warning in results.get('warnings', ())]
    write_page(
        path,
        'run.html',
        title=title,
        notice=results['notice'],
        warnings=warnings,
        headline=headline,
        sections=sections,
    )


def describe_interval(interval: Sequence[float] | None) -> str:
    """Returns e.g. '95 % interval 85.1% to 87.9%'; for None (a single patient) says that there is no interval."""
    return f'95 % interval {interval[0]:.1%} to {interval[1]:.1%}' if interval else 'one patient, so no interval'


def build_scores(
    results: dict[str, Any], published: Sequence[Sequence[float]] | None, *, table: str, unit: str, others: Mapping
) -> list[Section]:
    """Returns the sections 'accuracy' (against the baselines) and 'scores' (per class).

    Args:
      results: results.json of the run.
      published: the paper's precision, recall and F1 of each class and of their average; None for other data.
      table: name of the paper's table, e.g. 'Table III'.
      unit: 'slices' or 'scans'.
      others: further classifiers to compare: name -> `compute_metrics`.
    """
    every = {'model': results, **others, **results['baselines']}
    rows = [
        (name, m['accuracy'], m['intervals']['accuracy'], m['macro_average']['recall'], m['weighted_average']['f1'])
        for name, m in every.items()
    ]
    accuracy = Section(
        'accuracy',
        'Accuracy against trivial baselines',
        [
            'The model has to beat three baselines: the majority class, a classifier of the numbers in file names, and '
            'one of 32 x 32 thumbnails, which are too small for most lesions.',
            create_picture(figures.render_accuracies(every), 'Accuracy of each classifier with its 95 % interval'),
            Table(
                f'Accuracy over test {unit}, intervals by bootstrap over patients',
                ('classifier', 'accuracy', '95 % interval', 'mean recall of the classes', 'weighted F1'),
                rows,
            ),
        ],
    )
    names = [*CLASSES, 'weighted average', 'macro average']
    scores = [results['per_class'][c] for c in CLASSES] + [results['weighted_average'], results['macro_average']]
    intervals = results['intervals']
    found = [intervals['per_class'][c] for c in CLASSES] + [intervals['weighted_average'], intervals['macro_average']]
    columns, rows = ['class'], [[name] for name in names]
    for i, (key, label) in enumerate((('precision', 'precision'), ('recall', 'recall'), ('f1', 'F1'))):
        columns += [label, 'interval']
        for row, score, interval in zip(rows, scores, found, strict=True):
            row += [score[key], interval[key]]
        if published:
            columns.append(f'paper {label}')
            for row, theirs in zip(rows, [*published, (None,) * 3], strict=True):
                row.append(theirs[i])
    columns.append(unit)
    for row, score in zip(rows, scores, strict=True):
        row.append(score.get('support', results['num_examples']))
    binary = [
        (
            c,
            *(
                value
                for key in ('recall', 'specificity', 'precision', 'npv')
                for value in (results['per_class'][c][key], intervals['per_class'][c][key])
            ),
        )
        for c in CLASSES
    ]
    confusion = figures.render_confusion_matrix(results['confusion_matrix'], CLASSES, title=f'Test {unit}')
    scores_section = Section(
        'scores',
        'Scores per class',
        [
            Table(f'Precision, recall and F1, laid out as {table} of the paper', columns, rows),
            create_picture(confusion, f'Confusion matrix: {results["confusion_matrix"]}, rows are the true classes'),
            Table(
                'Each class against the rest',
                ('class', 'sensitivity', 'interval', 'specificity', 'interval', 'PPV', 'interval', 'NPV', 'interval'),
                binary,
            ),
            *results['notes'],
            f'Predictive values hold only for the class mix of this test list. Intervals are 95 % intervals: '
            f'{intervals["method"]}.',
        ],
    )
    return [accuracy, scores_section]


def build_verdicts(verdicts: Mapping[str, Any] | None, *, unit: str) -> list[Section]:
    """Returns the section 'verdicts': classifier, lesions and both; none without a lesion model.

    Args:
      verdicts: part of results.json, see `experiment.sick.compare_splits`.
      unit: 'slices' or 'scans'.
    """
    if verdicts is None:
        return []
    names = {'classifier': 'classifier alone', 'lesions': 'lesions alone', 'both': 'both, which is the verdict'}
    titles = {'val': f'Validation {unit}', 'test': f'Test {unit}'}
    columns = ('verdict', 'sick against normal, area under ROC', 'interval', 'accuracy of three classes', 'interval')
    tables = [
        Table(
            titles[split],
            columns,
            [
                (
                    names[name],
                    found['sick_auc'],
                    found['interval'],
                    found.get('accuracy'),
                    found.get('accuracy_interval'),
                )
                for name, found in compared.items()
            ],
        )
        for split, compared in verdicts.items()
    ]
    text = (
        'The lesions decide on sick or not, the classifier on which disease: with s the probability of sick by the '
        'lesions and q that of COVID-19 against pneumonia by the classifier, normal, pneumonia and COVID-19 have the '
        'probabilities 1 - s, s (1 - q) and s q. So lesions alone tell sick from normal only, and rank it as both do. '
        'A classifier that knows the hospital can score higher here and fail elsewhere.'
    )
    return [Section('verdicts', 'Lesions and classifier', [text, *tables])]


def build_statistics(results: dict[str, Any], rules: dict[str, Any], *, unit: str) -> list[Section]:
    """Returns the sections 'curves', 'screening', 'calibration' and 'uncertainty'.

    Args:
      results: results.json, with 'curves' and 'screening'.
      rules: from `screening.fit_rules`.
      unit: 'slices' or 'scans'.
    """
    return [
        _build_curves(results['curves'], unit),
        _build_operating_points(results['screening'], rules, unit),
        _build_calibration(results['screening'], unit),
        _build_uncertainty(results['screening'], unit),
    ]


def _build_curves(curves: dict[str, Any], unit: str) -> Section:
    rows = [
        (
            name,
            c['num_positive'],
            c['num_negative'],
            c['auc'],
            c['auc_interval'],
            c['average_precision'],
            c['average_precision_interval'],
        )
        for name, c in curves['per_class'].items()
    ]
    columns = (
        'class',
        unit,
        'others',
        'area under ROC',
        'interval',
        'average precision',
        'interval',
    )
    drawn = []
    if curves['macro_auc'] is not None:
        figure = figures.render_curves(curves['per_class'])
        drawn.append(create_picture(figure, 'ROC and precision-recall curve of each class'))
    return Section(
        'curves',
        'ROC and precision-recall curves',
        [
            *drawn,
            *[c['note'] for c in curves['per_class'].values() if 'note' in c],
            Table('One class against the rest', columns, rows),
        ],
    )


def _build_operating_points(screening: dict[str, Any], rules: dict[str, Any], unit: str) -> Section:
    points, worth, notes = [], [], []
    for target, what in TARGETS.items():
        chosen, point = rules['thresholds'][target], screening['operating_points'][target]
        notes += [f'{what[0].upper()}{what[1:]}: {found["note"]}' for found in (chosen, point) if 'note' in found]
        if point['threshold'] is None:
            continue
        points.append(
            (
                what,
                point['threshold'],
                chosen['sensitivity'],
                chosen['sensitivity_lower'],
                point['sensitivity'],
                point['sensitivity_interval'],
                point['specificity'],
                point['specificity_interval'],
                *(point[name] for name in ('tp', 'fn', 'fp', 'tn')),
            )
        )
        for value in point['predictive_values']:
            share = f'{value["prevalence"]:.1%}' + (' (this test list)' if value['is_test_share'] else '')
            worth.append((what, share, value['ppv'], value['ppv_interval'], value['npv'], value['npv_interval']))
    target = rules['thresholds']['covid19']['target_sensitivity']
    return Section(
        'screening',
        'Operating points for screening',
        [
            f'False negatives are the costliest errors in screening. The threshold is the highest with a sensitivity '
            f'of at least {target:.0%} on the validation {unit}; it is applied to the test {unit} unchanged. The '
            'lower bound counts each patient once.',
            *notes,
            Table(
                f'Thresholds chosen on validation, tested on test {unit}',
                (
                    'screened for',
                    'threshold',
                    'validation sensitivity',
                    'lower bound',
                    'sensitivity',
                    'interval',
                    'specificity',
                    'interval',
                    'TP',
                    'FN',
                    'FP',
                    'TN',
                ),
                points,
            ),
            Table(
                'Predictive values by prevalence',
                ('screened for', 'prevalence', 'PPV', 'interval', 'NPV', 'interval'),
                worth,
            ),
            'Decision curves: net benefit at the test prevalence. The threshold probability trades missed cases '
            'against false alarms. The model is useful where its curve is the highest.',
            create_picture(
                figures.render_decision_curves(
                    {what: screening['decision_curves'][target] for target, what in TARGETS.items()}
                ),
                'Decision curves for both targets',
            ),
            *_describe_prior_correction(screening['prior_correction']),
        ],
    )


def _describe_prior_correction(correction: dict[str, Any]) -> list[str | Table]:
    shares = ', '.join(f'{share:.0%} {name}' for name, share in correction['to_shares'].items())
    text = (
        'Correction to another class mix. The weighted loss assumes equal class shares. Here the probabilities are '
        f'corrected to {shares}, and the test list is weighted to that mix:'
    )
    if correction['before'] is None:
        return [f'{text} not computed. {correction["note"]}']
    rows = [
        (
            when,
            *(
                correction[when][key]
                for name in ('accuracy', 'balanced_accuracy', 'brier')
                for key in (name, f'{name}_interval')
            ),
        )
        for when in ('before', 'after')
    ]
    columns = ('correction', 'accuracy', 'interval', 'mean recall', 'interval', 'Brier score', 'interval')
    return [text, Table('Correction to another class mix', columns, rows)]


def _build_calibration(screening: dict[str, Any], unit: str) -> Section:
    calibration = screening['calibration']
    rows = [(when, *(calibration[when][name] for name in ('ece', 'brier', 'nll'))) for when in ('before', 'after')]
    return Section(
        'calibration',
        'Calibration',
        [
            f'Logits are divided by the temperature {calibration["temperature"]:.3f}, which is fitted on validation '
            'and stored in calibration.json. Above 1 it makes predictions less confident.',
            Table(
                f'Calibration on the test {unit}; lower is better',
                ('temperature scaling', 'expected calibration error (ECE)', 'Brier score', 'log loss'),
                rows,
            ),
            create_picture(
                figures.render_reliability(calibration['before'], calibration['after']),
                'Reliability diagram: accuracy against confidence before and after temperature scaling',
            ),
        ],
    )


def _build_uncertainty(screening: dict[str, Any], unit: str) -> Section:
    conformal, risk = screening['conformal'], screening['risk_coverage']
    rows = [
        (name, c['num_examples'], c['coverage'], c['interval'], conformal['thresholds'][name])
        for name, c in conformal['per_class'].items()
    ]
    answered = [(f'{float(share):.0%}', accuracy) for share, accuracy in risk['accuracy_at'].items()]
    return Section(
        'uncertainty',
        'Conformal sets and risk-coverage',
        [
            f'A conformal set holds every class that cannot be ruled out. Per class, the target is that '
            f'{conformal["target_coverage"]:.0%} of the {unit} have the true class in their set. '
            f'{conformal["single"]:.1%} of the sets hold one class, {conformal["multiple"]:.1%} several and '
            f'{conformal["empty"]:.1%} none; the mean size is {conformal["mean_size"]:.2f}.',
            *conformal['notes'],
            Table(
                f'Coverage of the true class in the sets of the test {unit}',
                ('class', unit, 'coverage', 'interval', 'threshold'),
                rows,
            ),
            'Risk-coverage: errors if the model answers only its most confident cases.',
            create_picture(figures.render_risk_coverage(risk), 'Error rate against coverage'),
            Table('Accuracy by coverage', ('coverage', 'accuracy'), answered),
        ],
    )


def build_sources(dataset: Mapping[str, Any]) -> list[Section]:
    """Returns the section 'sources', slices by source, list and class; none if no source is known."""
    rows = [
        (source, split, *counts.values(), sum(counts.values()))
        for source, by_split in dataset['sources'].items()
        for split, counts in by_split.items()
    ]
    if not rows:
        return []
    parts = [
        'Sources are those of metadata.csv. Whatever tells two sources apart also tells their classes apart.',
        Table('Slices by source', ('source', 'list', *CLASSES, 'slices'), rows),
    ]
    return [Section('sources', 'Sources', parts)]


def build_training(
    results: dict[str, Any], config: Mapping[str, Any], history: Sequence[dict], score: str = 'accuracy'
) -> Section:
    """Returns the section 'run': training curves, data, environment and settings."""
    training, dataset = results['training'], results['dataset']
    curves = figures.render_training_curves(history, training['best_epoch'], score)
    facts = [
        ('written', datetime.datetime.now().astimezone().isoformat(' ', 'minutes')),
        ('data', results['data']),
        ('raw directory', dataset['raw_dir'] or 'none: generated phantoms'),
        ('fingerprint of lists and image size', dataset['fingerprint']),
        *(
            (f'{split} slices', ', '.join(f'{count:,} {name}' for name, count in counts.items()))
            for split, counts in dataset['slices'].items()
        ),
        ('images dropped', f'{dataset["num_dropped"]:,}'),
        (
            'tested checkpoint',
            f'epoch {training["best_epoch"]} of {training["num_epochs"]}, the lowest validation loss',
        ),
        ('training time', f'{training["seconds"]:,.0f} s, {training["num_steps"]:,} steps'),
        *(
            (name, ', '.join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in results['environment'].items()
        ),
    ]
    return Section(
        'run',
        'Training and environment',
        [
            create_picture(curves, f'Loss and {score} per epoch, training and validation'),
            Table('Run', ('property', 'value'), facts),
            Table('Settings', ('field', 'value'), [(name, str(value)) for name, value in config.items()]),
        ],
    )


def build_limits(results: dict[str, Any]) -> Section:
    """Returns the section 'limits': limits of use and the model card."""
    is_phantom = bool(results['notice'])
    card = [
        ('intended use', 'research on methods for chest CT; to compare models and to study attention'),
        (
            'not intended',
            'any decision on a patient; chest X-rays; CT of other regions, of children, with other windows',
        ),
        (
            'input',
            f'axial chest CT slices, greyscale, cropped to the body, {results["dataset"]["image_size"]} pixels a side',
        ),
        ('output', 'probabilities of normal, pneumonia and COVID-19, which sum to 1; the model knows no other disease'),
        (
            'training data',
            'generated phantoms'
            if is_phantom
            else f'{results["data"]}, fingerprint {results["dataset"]["fingerprint"]}',
        ),
        (
            'licences of the data',
            'none needed'
            if is_phantom
            else 'COVIDx CT combines sources with their own licences, some non-commercial: check each source',
        ),
        ('code', f'covidjax {results["environment"]["covidjax"]}, Apache License 2.0'),
    ]
    return Section(
        'limits',
        'Limits of use and model card',
        [
            'Labels are per scan: every slice of a sick scan counts as sick, even if it shows no lesion.',
            'Classes come from different hospitals, scanners and preparations. A network can learn these instead of '
            'the disease. The dataset audit (--mode=audit) measures how far that goes.',
            'Intervals resample the patients of this test list. They do not cover another hospital, protocol or year.',
            'The prevalence here is not that of a clinic: read predictive values at the prevalence where the test is '
            'used.',
            'Attention shows what the model weighed, not why. The sections above score how well it finds lesions, '
            'next to uninformed controls.',
            Table('Model card', ('property', 'value'), card),
        ],
    )
