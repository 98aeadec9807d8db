"""A model on its own test list and on data from elsewhere, with an interval for every difference.

Shapes: N examples, S slices, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.evaluation.calibration import (
    apply_temperature,
    compute_brier,
    compute_calibration,
    correct_prior,
    fit_temperature,
)
from covidjax.evaluation.conformal import predict_sets
from covidjax.evaluation.estimates import (
    UNDEFINED,
    Estimate,
    Sample,
    describe,
    draw_sample,
    estimate_auc,
    estimate_ece,
    estimate_mean,
    subtract,
)
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.screening import TARGETS, compute_target_scores, find_target

_EPSILON = np.finfo(np.float64).eps


class Side(NamedTuple):
    """What a model says of a list.

    Attributes:
      labels: int [N], 0 .. K-1.
      logits: [N, K], not calibrated.
      patients: patient of each example.
      unusual: whether each slice is unlike the validation slices (see `novelty`), bool [S]; None if not measured.
      slice_patients: patient of each of these S slices, of which there may be more or fewer than examples.
    """

    labels: np.ndarray
    logits: np.ndarray
    patients: Sequence[str]
    unusual: np.ndarray | None
    slice_patients: Sequence[str]


def compare_sides(inside: Side, outside: Side, rules: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Compares a model on two lists by the rules that were chosen on its validation list.

    Only classes that both lists have are compared, so that a class that is absent does not count as a difference.

    Args:
      inside: of the run's test list.
      outside: of other data.
      rules: of `screening.fit_rules`.
      classes: K names.

    Returns:
      A JSON-able dict: 'classes' compared; 'absent' from outside, and 'absent_inside'; 'num_examples' and
      'num_patients' by side; 'scores', <score>.{inside, outside: {value, interval}, difference, interval, note}. A
      difference is outside less inside; its interval resamples the patients of both sides (`estimates.subtract`). A
      note says why a value is None.
    """
    sides = {'inside': inside, 'outside': outside}
    present = {name: set(np.unique(side.labels).tolist()) for name, side in sides.items()}
    common = sorted(present['inside'] & present['outside'])
    kept = {name: _keep(side, common) for name, side in sides.items()}
    # Independent seeds, as the patients differ. That of outside is the one of its other scores.
    found = {name: _estimate(kept[name], rules, classes, seed=seed) for name, seed in (('inside', 1), ('outside', 0))}
    scores = {}
    for key in found['outside']:
        values = {name: found[name][key] for name in sides}
        scores[key] = {
            **{name: describe(estimate) for name, estimate in values.items()},
            **subtract(values['outside'], values['inside']),
            'note': _explain(key, values, kept, present['outside'], classes),
        }
    return {
        'classes': [classes[label] for label in common],
        'absent': [name for label, name in enumerate(classes) if label not in present['outside']],
        'absent_inside': [name for label, name in enumerate(classes) if label not in present['inside']],
        'num_examples': {name: len(side.labels) for name, side in kept.items()},
        'num_patients': {name: len(set(side.patients)) for name, side in kept.items()},
        'scores': scores,
    }


def _keep(side: Side, labels: Sequence[int]) -> Side:
    members = np.isin(side.labels, labels)
    patients = np.asarray(side.patients)[members].tolist()
    return side._replace(labels=side.labels[members], logits=side.logits[members], patients=patients)


def _estimate(side: Side, rules: Mapping[str, Any], classes: Sequence[str], *, seed: int) -> dict[str, Estimate]:
    labels, sample = side.labels, draw_sample(side.patients, seed=seed)
    probabilities = apply_temperature(side.logits, rules['temperature'])
    right = probabilities.argmax(1) == labels
    found = {'accuracy': estimate_mean(sample, right)}
    for label, name in enumerate(classes):
        found[f'recall_{name}'] = estimate_mean(sample, right, labels == label)
    for label, name in enumerate(classes):  # not calibrated, as in every report
        found[f'auc_{name}'] = estimate_auc(sample, softmax(side.logits)[:, label], labels == label)
    for target in TARGETS:
        threshold = rules['thresholds'][target]['threshold']
        called = None if threshold is None else compute_target_scores(probabilities, classes, target) >= threshold
        positive = find_target(labels, classes, target)
        found[f'sensitivity_{target}'] = UNDEFINED if called is None else estimate_mean(sample, called, positive)
        found[f'specificity_{target}'] = UNDEFINED if called is None else estimate_mean(sample, ~called, ~positive)
    found |= _estimate_calibration(sample, probabilities, labels)
    thresholds = [rules['conformal']['thresholds'][name] for name in classes]
    sets = predict_sets(probabilities, thresholds)
    covered = sets[np.arange(len(labels)), labels]
    found['coverage'] = estimate_mean(sample, covered)
    for label, name in enumerate(classes):
        found[f'coverage_{name}'] = estimate_mean(sample, covered, labels == label)
    found['set_size'] = estimate_mean(sample, sets.sum(1).astype(float))
    unusual = UNDEFINED
    if side.unusual is not None and len(side.unusual):
        unusual = estimate_mean(draw_sample(side.slice_patients, seed=seed), side.unusual)
    return found | {'unusual': unusual}


def _estimate_calibration(sample: Sample, probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    true = probabilities[np.arange(len(labels)), labels]
    return {
        'ece': estimate_ece(sample, probabilities, labels),
        'brier': estimate_mean(sample, compute_brier(probabilities, labels)),
        'nll': estimate_mean(sample, -np.log(np.maximum(true, _EPSILON))),
    }


def _explain(
    key: str, values: Mapping[str, Estimate], kept: Mapping[str, Side], present: set[int], classes: Sequence[str]
) -> str:
    """Returns why a score is undefined, '' if it is not."""
    undefined = [name for name, estimate in values.items() if estimate.value is None]
    if not undefined:
        return ''
    if key == 'unusual':
        return 'not measured ' + ' and '.join(undefined)
    score, _, what = key.partition('_')
    if what in classes and classes.index(what) not in present:
        return f'no {what} in these data'
    labels = set(np.unique(kept['outside'].labels).tolist())
    if not labels:
        return 'no class is in both lists'
    if what in TARGETS and score in ('sensitivity', 'specificity'):
        positive = find_target(np.array(sorted(labels)), classes, what)
        if score == 'sensitivity' and not positive.any():
            return f'no {"disease" if what == "disease" else what} in these data'
        if score == 'specificity' and positive.all():
            return f'only {what} in these data'
        return 'no threshold was chosen on validation'
    if what in classes and labels == {classes.index(what)}:
        return f'only {what} in these data'
    return f'no {what} in the test list of the run' if what in classes else 'undefined'


def refit(side: Side, temperature: float, *, seed: int = 0) -> dict[str, Any]:
    """Compares the calibration of a list at the run's temperature and at one fitted to this list itself.

    Returns:
      A JSON-able dict: 'temperature' of the run, 'fitted_temperature', and 'before' and 'after', each
      {ece, brier, nll: {value, interval}, bins}. The fitted one is optimistic: it has seen the labels.
    """
    fitted = fit_temperature(side.logits, side.labels)
    sample, found = draw_sample(side.patients, seed=seed), {}
    for name, value in (('before', temperature), ('after', fitted)):
        probabilities = apply_temperature(side.logits, value)
        scores = _estimate_calibration(sample, probabilities, side.labels)
        bins = compute_calibration(probabilities, side.labels)['bins']
        found[name] = {key: describe(estimate) for key, estimate in scores.items()} | {'bins': bins}
    return {'temperature': temperature, 'fitted_temperature': fitted, **found}


def correct_to_own_shares(side: Side, temperature: float, classes: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Corrects probabilities to the class shares of the list itself (see `calibration.correct_prior`).

    The shares are (count + 1) / (N + K), so that an absent class keeps a small share. They are those of the labels: a
    clinic would have to estimate them.

    Returns:
      A JSON-able dict: 'shares' by class; 'before' and 'after', each {accuracy, brier: {value, interval}};
      'difference', after less before of both, {difference, interval} on the same resamples.
    """
    k = len(classes)
    shares = (np.bincount(side.labels, minlength=k) + 1) / (len(side.labels) + k)
    sample = draw_sample(side.patients, seed=seed)
    before = apply_temperature(side.logits, temperature)
    estimates = {}
    for name, probabilities in (('before', before), ('after', correct_prior(before, [1 / k] * k, shares.tolist()))):
        estimates[name] = {
            'accuracy': estimate_mean(sample, probabilities.argmax(1) == side.labels),
            'brier': estimate_mean(sample, compute_brier(probabilities, side.labels)),
        }
    return {
        'shares': dict(zip(classes, shares.tolist(), strict=True)),
        **{name: {key: describe(e) for key, e in scores.items()} for name, scores in estimates.items()},
        'difference': {key: subtract(estimates['after'][key], estimates['before'][key]) for key in estimates['after']},
    }
