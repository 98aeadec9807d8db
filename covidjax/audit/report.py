"""Writes an audit as text, JSON and HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from covidjax.audit.check import VERDICTS, Check, count_things, find_worst
from covidjax.audit.dataset import Dataset
from covidjax.errors import MAX_FAULTS_SHOWN
from covidjax.files import write_json
from covidjax.report.page import write_page

_MAX_PRINTED = 5
_MAX_SAVED = 1000
_ORDER = ('broken', 'look', 'not checked', 'ok')


def describe_audit(dataset: Dataset, checks: Sequence[Check]) -> dict[str, Any]:
    """Returns an audit as a JSON-able dict, the content of audit.json.

    Returns:
      {'data', 'version', 'splits': slices per list, 'verdict': the worst, 'num_verdicts', 'checks': [{'name', 'title',
      'verdict', 'reason', 'num_faults', 'faults': the first 1,000, 'tables': [{'title', 'columns', 'rows'}]}]}.
    """
    return {
        'data': str(dataset.raw_dir),
        'version': dataset.version,
        'splits': {split: len(part.rows) for split, part in dataset.splits.items()},
        'verdict': find_worst(checks),
        'num_verdicts': {verdict: sum(check.verdict == verdict for check in checks) for verdict in VERDICTS},
        'checks': [
            {
                'name': check.name,
                'title': check.title,
                'verdict': check.verdict,
                'reason': check.reason,
                'num_faults': len(check.faults),
                'faults': list(check.faults[:_MAX_SAVED]),
                'tables': [
                    {'title': t.title, 'columns': list(t.columns), 'rows': [list(row) for row in t.rows]}
                    for t in check.tables
                ],
            }
            for check in checks
        ],
    }


def format_summary(audit: dict[str, Any]) -> str:
    """Returns an audit as text for a terminal, worst verdicts first."""
    lists = ', '.join(f'{split} {count:,}' for split, count in audit['splits'].items()) or 'no valid row'
    lines = [f'COVIDx CT-{audit["version"]} lists in {audit["data"]}: {lists}']
    for verdict in _ORDER:
        for check in audit['checks']:
            if check['verdict'] != verdict:
                continue
            lines.append(f'{verdict:<12}{check["name"]:<27}{check["reason"]}')
            shown = check['faults'][:_MAX_PRINTED]
            lines += [f'{"":<12}- {fault}' for fault in shown]
            if check['num_faults'] > len(shown):
                lines.append(f'{"":<12}- and {check["num_faults"] - len(shown):,} more')
    lines.append('verdicts: ' + ', '.join(f'{audit["num_verdicts"][verdict]} {verdict}' for verdict in _ORDER))
    return '\n'.join(lines)


def save_audit(audit: dict[str, Any], checks: Sequence[Check], workdir: Path) -> None:
    """Writes audit.json and audit.html, each atomically."""
    write_json(workdir / 'audit.json', audit)
    pictures = {check.name: [draw() for draw in check.pictures] for check in checks}
    write_page(
        workdir / 'audit.html',
        'audit.html',
        audit=audit,
        pictures=pictures,
        order=_ORDER,
        max_shown=MAX_FAULTS_SHOWN,
        count_things=count_things,
    )
