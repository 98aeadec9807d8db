"""Says in sentences what prediction.json holds, for the page and for programs."""

from typing import Any

from covidjax.data.scan.volume import format_counts
from covidjax.report.burden import describe_burden
from covidjax.report.prediction import build_headline, describe_sick, describe_windows, is_unusual
from covidjax.report.sections import TARGETS


def describe_prediction(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns 'verdict', 'headline' (a sentence or two), 'warnings' and 'reasons' (sentences) of a prediction.

    Args:
      summary: content of prediction.json. That of a lesion model alone has no verdict.
    """
    burden = [f'{describe_burden(summary["lesions"])}.'] if 'lesions' in summary else []
    has_verdict = 'verdict' in summary
    return {
        'verdict': summary.get('verdict'),
        'headline': build_headline(summary) if has_verdict else burden[0],
        'warnings': _list_warnings(summary),
        'reasons': (_list_reasons(summary) + burden if has_verdict else []) + _list_notes(summary),
    }


def _list_warnings(summary: dict[str, Any]) -> list[str]:
    warnings = [f'Forced in spite of: {doubt}{"" if doubt.endswith("?") else "."}' for doubt in summary['forced']]
    if summary['notice']:
        warnings.insert(0, f'The model was trained on {summary["notice"]}.')
    warnings += [f'{warning[0].upper()}{warning[1:]}.' for warning in summary['warnings']]
    if 'novelty' in summary and is_unusual(summary):
        warnings.append('Do not trust the numbers: this scan is unlike the training data.')
    return warnings


def _list_reasons(summary: dict[str, Any]) -> list[str]:
    reasons = []
    conformal, novelty, members = summary['conformal'], summary['novelty'], summary['members']
    if conformal is not None:
        held = ', '.join(conformal['set']) or 'no class'
        reasons.append(
            f'The {conformal["coverage"]:.0%} conformal set holds {held}: the classes that can not be ruled out for '
            'scans like those of the validation.'
        )
        reasons += conformal['notes']
    if members is not None:
        limit = '' if members['limit'] is None else f', the limit is {members["limit"]:.3f}'
        count = len(members['probabilities'])
        reasons.append(f'The {count} members of the ensemble disagree by {members["disagreement"]:.3f}{limit}.')
    if summary['windows'] is not None:
        changed = 'depends on the grey window' if summary['windows']['is_changed'] else 'is the same under all windows'
        reasons.append(f'The call {changed}. {describe_windows(summary["windows"])}')
    if novelty is not None:
        reasons.append(
            f'Distance from the training data: the median slice is at {novelty["median"]:.2f} of the threshold, and '
            f'{novelty["share_unusual"]:.0%} of the slices are beyond it.'
        )
    if summary['home'] is not None:
        reasons.append(f'Among the sources of the training data, the scan is {summary["home"]["text"]}.')
    if 'sick' in summary:
        reasons += describe_sick(summary['sick'])
    called = ', '.join(f'{count:,} {name}' for name, count in summary['slices_called'].items())
    reasons.append(f'Predicted classes of the slices: {called}.')
    for target, answer in (summary['screening'] or {}).items():
        if answer['is_finding'] is not None:
            found = 'finding' if answer['is_finding'] else 'no finding'
            reasons.append(
                f'Screened for {TARGETS[target]}: {found} (score {answer["score"]:.2f}, threshold '
                f'{answer["threshold"]:.2f}).'
            )
    if summary['screening'] and len({answer['is_finding'] for answer in summary['screening'].values()}) > 1:
        reasons.append('Each screening has a threshold of its own, so they can differ.')
    return reasons


def _list_notes(summary: dict[str, Any]) -> list[str]:
    notes = summary['reading']['notes'] + summary.get('lesions', {}).get('remarks', [])
    found = [f'Left out: {format_counts(summary["left_out"])}.'] if summary['left_out'] else []
    return found + [f'{note[0].upper()}{note[1:].rstrip(".")}.' for note in notes]
