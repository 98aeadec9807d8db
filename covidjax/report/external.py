"""The report of a run on other data: inside and outside side by side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from covidjax.data.lists import CLASSES
from covidjax.evaluation.metrics import format_score
from covidjax.report import figures, sections
from covidjax.report.charts import create_picture
from covidjax.report.page import Table, write_page
from covidjax.report.sections import TARGETS, Section
from covidjax.report.subgroups import build_subgroups

_TARGET_NAMES = {'covid19': 'COVID-19', 'disease': 'any disease'}
SCORES = {
    'accuracy': 'accuracy',
    **{f'recall_{name}': f'recall, {name}' for name in CLASSES},
    **{f'auc_{name}': f'AUC, {name} against the rest' for name in CLASSES},
    **{
        f'{score}_{target}': f'{score} at the threshold, {_TARGET_NAMES[target]}'
        for target in TARGETS
        for score in ('sensitivity', 'specificity')
    },
    'ece': 'calibration error (ECE)',
    'brier': 'Brier score',
    'nll': 'log loss',
    'coverage': 'conformal coverage',
    **{f'coverage_{name}': f'conformal coverage, {name}' for name in CLASSES},
    'set_size': 'mean size of the conformal sets',
    'unusual': 'share of slices unlike the training data',
}
_LOWER_IS_BETTER = ('ece', 'brier', 'nll', 'unusual')
_SHARES = ('accuracy', 'recall', 'auc', 'sensitivity', 'specificity', 'coverage', 'unusual')
_MAX_LISTED = 100
_MIN_PATIENTS = 5  # of each side, for a verdict


def list_scores(comparison: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (key, title, {inside, outside, difference, interval, note}) of `external.compare_sides` in order."""
    for key, title in SCORES.items():
        yield key, title, comparison['scores'][key]


def judge(key: str, comparison: dict[str, Any]) -> str:
    """Returns 'worse' or 'better' outside if the interval of the difference excludes 0, else 'no clear difference'.

    The size of conformal sets is 'smaller' or 'larger'; without an interval there is no verdict, ''. Resampling fewer
    than `_MIN_PATIENTS` patients misleads.
    """
    interval = comparison['scores'][key]['interval']
    if interval is None:
        return ''
    if min(comparison['num_patients'].values()) < _MIN_PATIENTS:
        return 'too few patients'
    if interval[0] <= 0 <= interval[1]:
        return 'no clear difference'
    if key == 'set_size':
        return 'larger' if interval[0] > 0 else 'smaller'
    return 'worse' if (interval[1] < 0) != (key in _LOWER_IS_BETTER) else 'better'


def format_comparison(results: dict[str, Any], folder: Path) -> str:
    """Returns the summary that is printed of a test on other data."""
    comparison = results['comparison']
    lines = [
        '',
        f'{results["name"]}: {results["num_examples"]:,} {results["unit"]} of {results["num_patients"]:,} patients; '
        f'inside: {comparison["num_examples"]["inside"]:,} of {comparison["num_patients"]["inside"]:,}',
        f'{"":<46}{"inside":<24}{"outside":<24}{"outside less inside"}',
    ]
    for key, title, score in list_scores(comparison):
        if score['note']:
            lines.append(f'{title:<46}{score["note"]}')
            continue
        inside, outside = (
            format_score(score[side]['value'], score[side]['interval']) for side in ('inside', 'outside')
        )
        low_high = score['interval']
        shown = f' [{low_high[0]:+.3f}, {low_high[1]:+.3f}]' if low_high else ' [-]'
        lines.append(
            f'{title:<46}{inside:<24}{outside:<24}{score["difference"]:+.3f}{shown} {judge(key, comparison)}'.rstrip()
        )
    lines += [
        f'{name:<46}{format_score(metrics["accuracy"], metrics["intervals"]["accuracy"])} accuracy outside'
        for name, metrics in results['baselines'].items()
    ]
    lines += [f'Warning: {warning}.' for warning in results['warnings']]
    return '\n'.join([*lines, f'Report: {folder / "report.html"}'])


def write_external_report(path: Path, results: dict[str, Any], rules: dict[str, Any]) -> None:
    """Writes report.html of a test on other data.

    Args:
      path: of the page.
      results: see `experiment.external.write_external`.
      rules: of the run, that were applied.
    """
    unit, comparison = results['unit'], results['comparison']
    accuracy = comparison['scores']['accuracy']
    inside = accuracy['inside']
    beside = ', '.join(f'{name} {metrics["accuracy"]:.1%}' for name, metrics in results['baselines'].items())
    headline = (
        f'{results["accuracy"]:.1%} of {results["num_examples"]:,} {unit} of {results["num_patients"]:,} patients from '
        f'outside are classified correctly ({sections.describe_interval(results["intervals"]["accuracy"])})'
    )
    if inside['value'] is not None:
        headline += (
            f', against {inside["value"]:.1%} of {comparison["num_examples"]["inside"]:,} on the own test list '
            f'({sections.describe_interval(inside["interval"])})'
        )
    parts = [
        _build_comparison(results),
        *sections.build_scores(results, None, table='Table III', unit=unit, others={}),
        _build_own_baselines(results),
        *sections.build_statistics(results, rules, unit=unit),
        _build_refit(results['refit']),
        _build_own_shares(results['own_shares']),
        *build_subgroups(results['subgroups'], unit=unit),
        _build_data(results),
    ]
    write_page(
        path,
        'run.html',
        title=f'{results["model"]} on {results["data"]}, data from outside',
        notice=results['notice'],
        warnings=[f'{warning[0].upper()}{warning[1:]}.' for warning in results['warnings']],
        headline=f'{headline}. Baselines outside: {beside}.',
        sections=[part for part in parts if part.parts],
    )


def _build_comparison(results: dict[str, Any]) -> Section:
    comparison = results['comparison']
    rows, missing = [], []
    for key, title, score in list_scores(comparison):
        if score['note']:
            missing.append((title, score['note']))
            continue
        values = [score[side][part] for side in ('inside', 'outside') for part in ('value', 'interval')]
        rows.append((title, *values, score['difference'], score['interval'], judge(key, comparison)))
    verdicts = {row[0]: row[-1] for row in rows}
    worse, better = ([title for title, verdict in verdicts.items() if verdict == v] for v in ('worse', 'better'))
    shown = {
        title: (score['inside'], score['outside'])
        for key, title, score in list_scores(comparison)
        if key.partition('_')[0] in _SHARES and not score['note']
    }
    examples, patients = comparison['num_examples'], comparison['num_patients']
    return Section(
        'comparison',
        'Inside and outside',
        [
            'The model, its temperature, its thresholds and its conformal sets are those of the run, unchanged. Inside '
            f'is its own test list ({examples["inside"]:,} {results["unit"]} of {patients["inside"]:,} patients), '
            f'outside are these data ({examples["outside"]:,} of {patients["outside"]:,}), both only with the classes '
            f'that both have: {", ".join(comparison["classes"]) or "none"}. Intervals are 95 % intervals that resample '
            'patients, of the differences on both sides.',
            f'Worse outside: {"; ".join(worse) or "nothing clearly"}. Better outside: '
            f'{"; ".join(better) or "nothing clearly"}.',
            *(
                [create_picture(figures.render_sides(shown), 'Scores inside and outside with intervals')]
                if shown
                else []
            ),
            Table(
                'Outside less inside; a verdict where the interval excludes 0',
                ('score', 'inside', 'interval', 'outside', 'interval', 'difference', 'interval', 'outside is'),
                rows,
            ),
            Table('Not computed', ('score', 'reason'), missing),
        ],
    )


def _build_own_baselines(results: dict[str, Any]) -> Section:
    rows = [
        (name, metrics['fitted_on'], metrics['accuracy'], metrics['intervals']['accuracy'])
        for name, metrics in results['own_baselines'].items()
    ]
    text = (
        'The baselines above are fitted to the training list of the run. These are fitted to the data from outside '
        'themselves, on other patients than they are scored on. If they beat the model, the classes of these data '
        'differ in something simple, such as their source.'
    )
    if not rows:
        text = 'Too few patients or classes to fit a baseline to these data themselves.'
    return Section(
        'own-baselines',
        'Baselines fitted outside',
        [text, Table('Accuracy', ('baseline', 'fitted on', 'accuracy', '95 % interval'), rows)],
    )


def _build_refit(refit: dict[str, Any]) -> Section:
    scores = {'ece': 'expected calibration error (ECE)', 'brier': 'Brier score', 'nll': 'log loss'}
    rows = [
        (title, *(refit[when][key][part] for when in ('before', 'after') for part in ('value', 'interval')))
        for key, title in scores.items()
    ]
    before, after = ({'bins': refit[when]['bins'], 'ece': refit[when]['ece']['value']} for when in ('before', 'after'))
    return Section(
        'refit',
        'Calibration with a new temperature',
        [
            f'The run divides logits by {refit["temperature"]:.3f}. Fitted to these data it would be '
            f'{refit["fitted_temperature"]:.3f}. This is fitted on the test itself and shows what is to be gained at '
            'best; no other figure on this page uses it.',
            Table(
                'Calibration; lower is better',
                ('score', "run's temperature", 'interval', 'fitted on the test', 'interval'),
                rows,
            ),
            create_picture(
                figures.render_reliability(before, after),
                'Reliability diagram: before and after fitting the temperature on the test',
            ),
        ],
    )


def _build_own_shares(own: dict[str, Any]) -> Section:
    shares = ', '.join(f'{share:.1%} {name}' for name, share in own['shares'].items())
    rows = [
        (
            key,
            *(own[when][key][part] for when in ('before', 'after') for part in ('value', 'interval')),
            own['difference'][key]['difference'],
            own['difference'][key]['interval'],
        )
        for key in ('accuracy', 'brier')
    ]
    return Section(
        'own-shares',
        'Correction to the class shares of these data',
        [
            'The loss assumes equal class shares. Here the probabilities are corrected to the shares of these data, '
            f'which are taken from their labels: {shares}. In use they would have to be estimated.',
            Table(
                'Prior-corrected probabilities',
                ('score', 'before', 'interval', 'after', 'interval', 'difference', 'interval'),
                rows,
            ),
        ],
    )


def _build_data(results: dict[str, Any]) -> Section:
    dataset, left_out = results['dataset'], results['left_out']
    facts = [
        ('data', results['path']),
        ('split', results['split']),
        *((name, str(dataset[name])) for name in ('version', 'fingerprint', 'image_size', 'region') if name in dataset),
        *(
            (f'{split} slices', ', '.join(f'{count:,} {name}' for name, count in counts.items()))
            for split, counts in dataset.get('slices', {}).items()
        ),
        *(
            [('scans', ', '.join(f'{n:,} {name}' for name, n in dataset['scans'].items()))]
            if 'scans' in dataset
            else []
        ),
        ('trained on', f'{results["trained_on"]["raw_dir"] or "phantoms"}, {results["trained_on"]["fingerprint"]}'),
        ('patients in both', results['shared']['patients']),
        ('pictures in both', results['shared']['pictures']),
        *((name, str(value)) for name, value in results['environment'].items()),
    ]
    more = len(left_out) - _MAX_LISTED
    return Section(
        'data',
        'Data and environment',
        [
            Table('Test', ('property', 'value'), facts),
            f'Left out: {len(left_out):,}.',
            Table('Left out', ('name', 'reason'), [(one['name'], one['reason']) for one in left_out[:_MAX_LISTED]]),
            *([f'{more:,} more are listed in results.json.'] if more > 0 else []),
        ],
    )
