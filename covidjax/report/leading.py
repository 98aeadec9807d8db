"""Says in words and in a table which map of a slice model leads, and why."""

from collections.abc import Mapping
from typing import Any

from covidjax.explain.catalogue import LESIONS
from covidjax.report.page import Table

_MEASURES = {
    'pointing': 'pointing game',
    'auc': 'area under ROC',
    'insertion_less_deletion': 'insertion area less deletion area',
}
_BASES = {
    'lesions': 'outlined lesions: its area under ROC plus half its pointing game was the highest',
    'erasure': 'erasure, as no lesions are outlined: its insertion area less its deletion area was the highest',
}
_CONTROLS = {
    'chance': 'chance',
    'lungs': 'chance inside the lungs',
    'centre': 'always the centre',
    'grey': 'smoothed grey values inside the lungs',
}


def describe_lead(lead: Mapping[str, Any]) -> str:
    """Returns a few sentences on `explanations.leading_map` of results.json."""
    how = (
        f'Chosen on {lead["chosen_on"]}, by {_BASES[lead["by"]]}. Measured on {lead["num_slices"]:,} other slices of '
        f'{lead["num_patients"]:,} patients.'
    )
    if lead['name'] is None:
        return (
            'No map of this run beats chance, so none is shown as an explanation. The margins of the best, '
            f'{lead["best"]!r}, over chance are not clearly above 0. {how}'
        )
    losses = [
        what
        for control, what in (
            ('centre', 'the centre of the slice'),
            ('lungs', 'chance inside the lungs'),
            ('grey', 'smoothed grey values inside the lungs'),
        )
        if any(margin['interval'][0] <= 0 for margin in lead['margins'].get(control, {}).values())
    ]
    beaten = ' or '.join(losses)
    limits = (
        f' It does not clearly beat {beaten} in every measure: do not take it for a map of lesions.' if losses else ''
    )
    return f'The leading map is {lead["name"]!r}: it beats chance.{limits} {how}'


def get_shown_map(results: Mapping[str, Any]) -> str | None:
    """Returns the map to show as an explanation; None if the run's own scores refute all of its maps.

    Args:
      results: results.json of a run. A run that scored no map shows its exact evidence.
    """
    lead = (results.get('explanations') or {}).get('leading_map')
    return 'evidence, predicted class' if lead is None else lead['name']


def get_classifier_map(results: Mapping[str, Any]) -> str | None:
    """Returns `get_shown_map`, but None if it is that of the lesion model, which outlines show better."""
    shown = get_shown_map(results)
    return None if shown is None or shown.startswith(LESIONS) else shown


def list_margins(lead: Mapping[str, Any]) -> Table:
    """Returns the scores of the best map and its margins over the controls."""
    rows = [
        (_MEASURES[measure], 'the map itself', score['mean'], score['interval'])
        for measure, score in lead['scores'].items()
    ]
    rows += [
        (_MEASURES[measure], f'less {_CONTROLS[control]}', margin['mean'], margin['interval'])
        for control, margins in lead['margins'].items()
        for measure, margin in margins.items()
    ]
    return Table(f'The map {lead["best"]!r} and its margins', ('measure', 'of', 'mean', 'interval'), rows)
