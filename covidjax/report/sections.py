"""report.html of a run: what both experiments tell, from results.json alone.

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
      name: anchor.
      title: heading.
      parts: str, Table or Picture.
    """

    name: str
    title: str
    parts: Sequence[str | Table | Picture]


def write_report(path: Path, results: dict[str, Any], sections: Sequence[Section], *, unit: str) -> None:
    """Writes a self-contained page; `unit` names what was classified, 'slices' or 'scans'."""
    beside = ', '.join(f'{name} {metrics["accuracy"]:.1%}' for name, metrics in results['baselines'].items())
    headline = (
        f'{results["accuracy"]:.1%} of {results["num_examples"]:,} test {unit} of {results["num_patients"]:,} patients '
        f'are classified rightly ({describe_interval(results["intervals"]["accuracy"])}). Beside it: {beside}.'
    )
    title = f'{results["model"]} on {results["data"]}'
    write_page(path, 'run.html', title=title, notice=results['notice'], headline=headline, sections=sections)


def describe_interval(interval: Sequence[float] | None) -> str:
    """Returns e.g. '95 % interval 85.1% to 87.9%'; None, the interval of a single patient, is said to be missing."""
    return f'95 % interval {interval[0]:.1%} to {interval[1]:.1%}' if interval else 'one patient, so no interval'


def build_scores(
    results: dict[str, Any], published: Sequence[Sequence[float]] | None, *, table: str, unit: str, others: Mapping
) -> list[Section]:
    """Returns accuracy beside the baselines, and the scores per class.

    Args:
      results: of the run.
      published: the paper's precision, recall and F1 of each class and of their average; None on other data.
      table: name of the paper's table.
      unit: 'slices' or 'scans'.
      others: further classifiers to show beside the model, `compute_metrics` by name.
    """
    every = {'model': results, **others, **results['baselines']}
    rows = [
        (name, m['accuracy'], m['intervals']['accuracy'], m['macro_average']['recall'], m['weighted_average']['f1'])
        for name, m in every.items()
    ]
    accuracy = Section(
        'accuracy',
        'Accuracy beside what needs no model',
        [
            'What the model has to beat: always answering the commonest class, reading only the numbers in file names, '
            'and seeing only 32 x 32 thumbnails, too small for most lesions.',
            create_picture(figures.render_accuracies(every), 'Accuracies with 95 % intervals by classifier'),
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
            Table(f'{table} of the paper, in its form', columns, rows),
            create_picture(confusion, f'Confusion matrix: {results["confusion_matrix"]}, rows are the true classes'),
            Table(
                'Each class against the rest',
                ('class', 'sensitivity', 'interval', 'specificity', 'interval', 'PPV', 'interval', 'NPV', 'interval'),
                binary,
            ),
            *results['notes'],
            f'Predictive values hold for the mix of classes of this test list only. Brackets are 95 % intervals, '
            f'{intervals["method"]}.',
        ],
    )
    return [accuracy, scores_section]


def build_statistics(results: dict[str, Any], rules: dict[str, Any], *, unit: str) -> list[Section]:
    """Returns curves, operating points, calibration and uncertain cases.

    Args:
      results: with 'curves' and 'screening'.
      rules: of `screening.fit_rules`.
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
        'As a screening test',
        [
            f'False negatives weigh most in screening. The highest threshold that finds {target:.0%} of the validation '
            f'{unit} with the disease is applied to the test {unit}; the lower bound counts each patient once.',
            *notes,
            Table(
                f'Thresholds chosen on validation, tested on test {unit}',
                (
                    'screened for',
                    'threshold',
                    'validation sensitivity',
                    'its lower bound',
                    'sensitivity',
                    'interval',
                    'specificity',
                    'interval',
                    'found',
                    'missed',
                    'false alarms',
                    'rightly cleared',
                ),
                points,
            ),
            Table(
                'What an answer is worth, by the share of sick among those screened',
                ('screened for', 'share of sick', 'PPV', 'interval', 'NPV', 'interval'),
                worth,
            ),
            'Decision curves: the net benefit of following the model, at the test share of sick, for every trade of '
            'missed cases against false alarms. A model is of use where its curve is the highest.',
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
        f'Elsewhere the classes have other shares. At a place with {shares}, imitated by weighting the test list, '
        'probabilities corrected from the equal shares that the weighted loss presumes give:'
    )
    if correction['before'] is None:
        return [f'{text} nothing. {correction["note"]}']
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
        'Do probabilities mean what they say?',
        [
            f'Logits are divided by {calibration["temperature"]:.3f}, the temperature fitted on validation and kept in '
            'calibration.json; above 1 it makes answers less certain. Expected calibration error (ECE), Brier score '
            f'and log loss of the test {unit}, lower is better:',
            Table('Calibration', ('temperature scaling', 'ECE', 'Brier score', 'log loss'), rows),
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
        'Uncertain cases',
        [
            f'Conformal sets hold every class that cannot be ruled out, so that each class is in the set of its own '
            f'{unit} {conformal["target_coverage"]:.0%} of the time. {conformal["single"]:.1%} of the sets hold one, '
            f'{conformal["multiple"]:.1%} several and {conformal["empty"]:.1%} none; the mean size is '
            f'{conformal["mean_size"]:.2f}.',
            *conformal['notes'],
            Table(
                f'How often the sets of test {unit} hold the truth',
                ('class', unit, 'held', 'interval', 'threshold'),
                rows,
            ),
            'Answering only where the model is most confident:',
            create_picture(figures.render_risk_coverage(risk), 'Error rate against the share that is answered'),
            Table('Accuracy of the most confident share', ('answered', 'accuracy'), answered),
        ],
    )


def build_training(results: dict[str, Any], config: Mapping[str, Any], history: Sequence[dict]) -> Section:
    """Returns how the model was trained, on what, and where."""
    training, dataset = results['training'], results['dataset']
    curves = figures.render_training_curves(history, training['best_epoch'])
    facts = [
        ('written', datetime.datetime.now().astimezone().isoformat(' ', 'minutes')),
        ('data', results['data']),
        ('raw directory', dataset['raw_dir'] or 'none: generated phantoms'),
        ('fingerprint of lists and size', dataset['fingerprint']),
        *(
            (f'{split} slices', ', '.join(f'{count:,} {name}' for name, count in counts.items()))
            for split, counts in dataset['slices'].items()
        ),
        ('images dropped', f'{dataset["num_dropped"]:,}'),
        ('tested', f'epoch {training["best_epoch"]} of {training["num_epochs"]}, the lowest validation loss'),
        ('training time', f'{training["seconds"]:,.0f} s, {training["num_steps"]:,} steps'),
        *(
            (name, ', '.join(map(str, value)) if isinstance(value, list) else str(value))
            for name, value in results['environment'].items()
        ),
    ]
    return Section(
        'run',
        'What was run',
        [
            create_picture(curves, 'Loss and accuracy per epoch, training and validation'),
            Table('Facts', ('what', 'value'), facts),
            Table('Settings', ('field', 'value'), [(name, str(value)) for name, value in config.items()]),
        ],
    )


def build_limits(results: dict[str, Any]) -> Section:
    """Returns limits of use and the model card."""
    is_phantom = bool(results['notice'])
    card = [
        ('intended use', 'research on methods for chest CT; to compare models and to study attention'),
        (
            'not intended',
            'any decision on a patient; chest X-rays; CT of other regions, of children, with other windows',
        ),
        (
            'input',
            f'axial chest CT slices, grey, cropped to the body, {results["dataset"]["image_size"]} pixels a side',
        ),
        ('output', 'probabilities of normal, pneumonia and COVID-19, which sum to 1: no other disease is known to it'),
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
            else 'COVIDx CT joins sources with licences of their own, some non-commercial: read them at the source',
        ),
        ('code', f'covidjax {results["environment"]["covidjax"]}, Apache License 2.0'),
    ]
    return Section(
        'limits',
        'Limits of use, and model card',
        [
            'Labels belong to scans: a slice of a sick scan may show nothing, and is counted as sick all the same.',
            'Classes come from different hospitals, scanners and preparations, which a network can learn instead of '
            'the disease. The audit of the dataset measures how far that goes.',
            'Intervals resample the patients of this one test list. They say nothing about another hospital, another '
            'protocol or another year.',
            'The share of sick patients here is not that of any clinic: predictive values have to be read at the '
            'prevalence where a test is used.',
            'Attention shows what was weighed, not why; how well it finds lesions stands above as numbers, beside maps '
            'that know nothing.',
            Table('Model card', ('what', 'value'), card),
        ],
    )
