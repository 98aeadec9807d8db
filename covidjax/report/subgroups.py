"""Report section: scores by subgroup of the patients."""

from typing import Any

from covidjax.report.page import Table
from covidjax.report.sections import TARGETS, Section

_COLUMNS = {
    'accuracy': 'accuracy',
    'sensitivity_covid19': 'sensitivity, COVID-19',
    'auc_covid19': 'AUC, COVID-19',
    'sensitivity_disease': 'sensitivity, any disease',
    'auc_disease': 'AUC, any disease',
}


def build_subgroups(subgroups: dict[str, Any], *, unit: str) -> list[Section]:
    """Returns the section 'subgroups', or nothing if no column is known.

    Args:
      subgroups: from `evaluation.subgroups.compute_subgroups`.
      unit: 'slices' or 'scans'.
    """
    columns = subgroups['columns']
    if not columns:
        return []
    parts: list[str | Table] = [
        f'Sensitivity is at the thresholds of the run ({" and ".join(TARGETS.values())}), AUC is the area under ROC. '
        f'Intervals resample patients. Groups of fewer than {subgroups["min_patients"]} patients are listed and not '
        'scored. Columns of metadata.csv that say nothing of these patients are left out.'
    ]
    for name, column in columns.items():
        scored = [group for group in column['groups'] if group['scores']]
        small = [f'{group["group"]} ({group["num_patients"]})' for group in column['groups'] if not group['scores']]
        headings = ['group', 'patients', unit]
        for title in _COLUMNS.values():
            headings += [title, 'interval']
        rows = [
            (
                group['group'],
                group['num_patients'],
                group['num_examples'],
                *(group['scores'][key][part] for key in _COLUMNS for part in ('value', 'interval')),
            )
            for group in scored
        ]
        parts.append(Table(f'By {name}', headings, rows))
        if small:
            parts.append(f'By {name}, not scored, with their patients: {", ".join(small)}.')
        gaps = [
            (title, gap['highest'], gap['lowest'], gap['difference'], gap['interval'])
            for key, title in _COLUMNS.items()
            if (gap := column['gaps'].get(key))
        ]
        if gaps:
            title = f'Largest gap by {name}; the pair was chosen for its gap, so its interval is optimistic'
            parts.append(Table(title, ('score', 'highest', 'lowest', 'difference', 'interval'), gaps))
    return [Section('subgroups', 'Subgroups', parts)]
