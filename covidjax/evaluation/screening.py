"""Screening: thresholds chosen on validation for a target sensitivity, and their performance on test.

All scores are temperature-scaled probabilities. Shapes: N examples, K classes, P patients, T thresholds.
"""

from collections.abc import Sequence

import numpy as np

from covidjax.evaluation.calibration import (
    apply_temperature,
    compute_calibration,
    compute_prior_correction,
    fit_temperature,
)
from covidjax.evaluation.conformal import compute_conformal, compute_rank, compute_risk_coverage, fit_thresholds
from covidjax.evaluation.metrics import compute_share_interval, compute_wilson_interval

TARGETS = ('covid19', 'disease')  # conditions to screen for
PREVALENCES = (0.01, 0.05, 0.1, 0.2, 0.5)
DECISION_THRESHOLDS = tuple(i / 100 for i in range(1, 100))
DEPLOYMENT_SHARES = {'normal': 0.8, 'pneumonia': 0.1, 'covid19': 0.1}  # an example population, mostly healthy


def compute_target_scores(probabilities_NxK: np.ndarray, classes: Sequence[str], target: str) -> np.ndarray:
    """Returns the score of each example [N]: the probability of 'covid19', or of any 'disease', 1 - p_normal."""
    if target == 'covid19':
        return probabilities_NxK[:, classes.index('covid19')]
    return 1 - probabilities_NxK[:, classes.index('normal')]


def find_target(labels_N: np.ndarray, classes: Sequence[str], target: str) -> np.ndarray:
    """Returns which examples have the target condition, bool [N]."""
    return labels_N == classes.index('covid19') if target == 'covid19' else labels_N != classes.index('normal')


def choose_threshold(
    scores_N: np.ndarray, positive_N: np.ndarray, patients: Sequence[str], target_sensitivity: float = 0.98
) -> dict:
    """Chooses the highest threshold that reaches the target sensitivity; a score equal to it is positive.

    Args:
      scores_N: of validation examples, higher for positives.
      positive_N: bool.
      patients: patient of each example.
      target_sensitivity: in (0, 1].

    Returns:
      A JSON-able dict: 'threshold', 'target_sensitivity', and of the validation examples 'sensitivity',
      'sensitivity_lower', 'specificity' (None without negatives), 'tp', 'fp', 'fn', 'tn', 'num_positive_patients' and
      'attainable_sensitivity_lower', the bound if all positives were found. Lower bounds are those of Wilson's 95 %
      interval with one trial per positive patient, since a bootstrap is too optimistic near 1 (see
      `compute_wilson_interval`). A 'note' says if the attainable bound is below the target, or that there are no
      positives; without these threshold, scores, counts and bounds are None.

    Raises:
      ValueError: the target is outside (0, 1].
    """
    if not 0 < target_sensitivity <= 1:
        raise ValueError(f'target_sensitivity must be above 0 and at most 1, got {target_sensitivity}')
    descending = np.sort(scores_N[positive_N])[::-1]
    num_patients = len(set(np.asarray(patients)[positive_N].tolist()))
    if not len(descending):
        names = ('threshold', 'sensitivity', 'sensitivity_lower', 'specificity', 'attainable_sensitivity_lower')
        return {
            **dict.fromkeys((*names, 'tp', 'fp', 'fn', 'tn')),
            'target_sensitivity': target_sensitivity,
            'num_positive_patients': 0,
            'note': 'No validation example is positive: no threshold was chosen.',
        }
    needed = int(np.ceil(target_sensitivity * len(descending) - 1e-9))  # rounding makes 0.07 * 100 exceed 7
    threshold = float(descending[needed - 1])
    counts = _count(scores_N, positive_N, threshold)
    sensitivity = _divide(counts['tp'], counts['tp'] + counts['fn'])
    attainable = compute_wilson_interval(num_patients, num_patients)[0]
    result = {
        'threshold': threshold,
        'target_sensitivity': target_sensitivity,
        'sensitivity': sensitivity,
        'sensitivity_lower': compute_wilson_interval(sensitivity * num_patients, num_patients)[0],
        'specificity': _divide(counts['tn'], counts['tn'] + counts['fp']),
        **counts,
        'num_positive_patients': num_patients,
        'attainable_sensitivity_lower': attainable,
    }
    if attainable < target_sensitivity:
        result['note'] = (
            f'{num_patients} positive patients are too few to support a sensitivity of {target_sensitivity:g}: even if '
            f'all were found, the lower bound would be {attainable:.3f}.'
        )
    return result


def _count(scores_N: np.ndarray, positive_N: np.ndarray, threshold: float) -> dict[str, int]:
    called = scores_N >= threshold
    return {
        'tp': int((called & positive_N).sum()),
        'fp': int((called & ~positive_N).sum()),
        'fn': int((~called & positive_N).sum()),
        'tn': int((~called & ~positive_N).sum()),
    }


def _divide(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def compute_predictive_values(
    sensitivity: float, specificity: float, prevalence: float
) -> tuple[float | None, float | None]:
    """Returns PPV and NPV by Bayes' rule; a value is None if the test never gives that answer."""
    tp, fn = sensitivity * prevalence, (1 - sensitivity) * prevalence
    tn, fp = specificity * (1 - prevalence), (1 - specificity) * (1 - prevalence)
    return _divide(tp, tp + fp), _divide(tn, tn + fn)


def compute_operating_point(
    scores_N: np.ndarray,
    positive_N: np.ndarray,
    patients: Sequence[str],
    threshold: float,
    *,
    prevalences: Sequence[float] = PREVALENCES,
    seed: int = 0,
) -> dict:
    """Evaluates a threshold on test examples, with predictive values at other prevalences.

    Args:
      scores_N: higher for positives; a score of at least the threshold is positive.
      positive_N: bool.
      patients: patient of each example.
      threshold: chosen on other examples.
      prevalences: in (0, 1), shares of positives among those screened.
      seed: of the resampling.

    Returns:
      A JSON-able dict: 'threshold', 'tp', 'fp', 'fn', 'tn'; 'sensitivity' and 'specificity', each with '_interval' by
      patient (see `compute_share_interval`) and '_wilson', a wide interval with one trial per patient;
      'predictive_values', a list of {prevalence, is_test_share, ppv, ppv_interval, npv, npv_interval} for the
      prevalences and, last, for the share of positives on test. PPV and NPV rise with sensitivity and with specificity,
      so their intervals combine both low ends and both high ends, which is conservative. Without positives or negatives
      the scores that need them are None, the list is empty and a 'note' says so.
    """
    patients = np.asarray(patients)
    counts = _count(scores_N, positive_N, threshold)
    result = {'threshold': threshold, **counts}
    for name, members, hits in (
        ('sensitivity', positive_N, scores_N >= threshold),
        ('specificity', ~positive_N, scores_N < threshold),
    ):
        num_patients = len(set(patients[members].tolist()))
        share = float(hits[members].mean()) if num_patients else None
        result[name] = share
        result[f'{name}_interval'] = compute_share_interval(hits[members], patients[members], seed=seed)
        result[f'{name}_wilson'] = compute_wilson_interval(share * num_patients, num_patients) if num_patients else None

    sensitivity, specificity = result['sensitivity'], result['specificity']
    result['predictive_values'] = []
    if sensitivity is None or specificity is None:
        missing = 'positive' if sensitivity is None else 'negative'
        return result | {'note': f'No test example is {missing}.'}
    ends = list(
        zip(
            *(result[f'{name}_interval'] or result[f'{name}_wilson'] for name in ('sensitivity', 'specificity')),
            strict=True,
        )
    )
    test_share = float(positive_N.mean())
    for prevalence in (*prevalences, test_share):
        ppv, npv = compute_predictive_values(sensitivity, specificity, prevalence)
        lows, highs = (compute_predictive_values(*pair, prevalence) for pair in ends)
        result['predictive_values'].append(
            {
                'prevalence': prevalence,
                'is_test_share': False,
                'ppv': ppv,
                'ppv_interval': None if ppv is None else [lows[0], highs[0]],
                'npv': npv,
                'npv_interval': None if npv is None else [lows[1], highs[1]],
            }
        )
    result['predictive_values'][-1]['is_test_share'] = True
    return result


def compute_decision_curve(scores_N: np.ndarray, positive_N: np.ndarray, thresholds: Sequence[float]) -> dict:
    """Computes the net benefit tp/N - fp/N * t/(1-t) at probability thresholds t (Vickers and Elkin 2006).

    A threshold t means that missing one positive is as bad as (1-t)/t false alarms. The net benefit counts true
    positives per example, at the test's share of positives.

    Args:
      scores_N: probabilities.
      positive_N: bool.
      thresholds: in (0, 1).

    Returns:
      A JSON-able dict of lists [T]: 'threshold', and the net benefits of the 'model', of calling 'all' positive and of
      calling 'none' positive. Without examples the net benefits are None.

    Raises:
      ValueError: a threshold is outside (0, 1).
    """
    t = np.asarray(thresholds, float)
    if not ((t > 0) & (t < 1)).all():
        raise ValueError(f'thresholds must be between 0 and 1, got {list(thresholds)}')
    n = len(scores_N)
    if not n:
        return {'threshold': t.tolist(), 'model': None, 'all': None, 'none': None}
    odds, share = t / (1 - t), float(positive_N.mean())
    positives, negatives = np.sort(scores_N[positive_N]), np.sort(scores_N[~positive_N])
    tp, fp = (len(scores) - np.searchsorted(scores, t) for scores in (positives, negatives))
    return {
        'threshold': t.tolist(),
        'model': (tp / n - fp / n * odds).tolist(),
        'all': (share - (1 - share) * odds).tolist(),
        'none': [0.0] * len(t),
    }


def fit_rules(
    logits_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    target_sensitivity: float = 0.98,
    coverage: float = 0.9,
) -> dict:
    """Fits on validation what turns logits into answers: temperature, screening thresholds, conformal thresholds.

    Args:
      logits_NxK: of the validation examples.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      classes: K names, 'normal' and 'covid19' among them.
      target_sensitivity: see `choose_threshold`.
      coverage: see `conformal.fit_thresholds`.

    Returns:
      A JSON-able dict: 'classes', 'num_examples', 'num_patients', 'class_counts' and 'class_shares' by class of the
      validation examples; 'temperature'; 'thresholds' by target (`choose_threshold`); 'conformal': {coverage,
      thresholds by class, notes on classes with too few examples}.

    Raises:
      ValueError: there are no examples.
    """
    classes = list(classes)
    temperature = fit_temperature(logits_NxK, labels_N)
    probabilities = apply_temperature(logits_NxK, temperature)
    counts = np.bincount(labels_N, minlength=len(classes))
    conformal_thresholds = fit_thresholds(probabilities, labels_N, coverage)
    return {
        'classes': classes,
        'num_examples': len(labels_N),
        'num_patients': len(set(patients)),
        'class_counts': dict(zip(classes, counts.tolist(), strict=True)),
        'class_shares': dict(zip(classes, (counts / counts.sum()).tolist(), strict=True)),
        'temperature': temperature,
        'thresholds': {
            target: choose_threshold(
                compute_target_scores(probabilities, classes, target),
                find_target(labels_N, classes, target),
                patients,
                target_sensitivity,
            )
            for target in TARGETS
        },
        'conformal': {
            'coverage': coverage,
            'thresholds': dict(zip(classes, conformal_thresholds.tolist(), strict=True)),
            'notes': [
                f'Too few validation examples are {name} ({count}) for a coverage of {coverage:g}: it is in every set.'
                for name, count in zip(classes, counts, strict=True)
                if compute_rank(count, coverage) > count
            ],
        },
    }


def evaluate_rules(
    rules: dict,
    logits_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    train_shares_K: Sequence[float],
) -> dict:
    """Evaluates the rules of `fit_rules` on test examples.

    Args:
      rules: as returned, or read back from JSON.
      logits_NxK: of the test examples.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      classes: K names.
      train_shares_K: class shares of the training list.

    Returns:
      A JSON-able dict: 'calibration', {temperature, before, after} scaling (`compute_calibration`); 'operating_points'
      by target (`compute_operating_point`), {threshold: None, note} if validation gave none; 'decision_curves' by
      target; 'conformal' (`compute_conformal`) with 'target_coverage', 'thresholds' and 'notes' of the rules;
      'risk_coverage'; 'prior_correction' to `DEPLOYMENT_SHARES` (`compute_prior_correction`).

    Raises:
      ValueError: the rules are for other classes.
    """
    classes = list(classes)
    if rules['classes'] != classes:
        raise ValueError(f'the rules are for classes {rules["classes"]}, the logits for {classes}')
    probabilities = apply_temperature(logits_NxK, rules['temperature'])
    operating_points, decision_curves = {}, {}
    for target in TARGETS:
        scores, positive = (
            compute_target_scores(probabilities, classes, target),
            find_target(labels_N, classes, target),
        )
        chosen = rules['thresholds'][target]
        operating_points[target] = (
            {'threshold': None, 'note': chosen['note']}
            if chosen['threshold'] is None
            else compute_operating_point(scores, positive, patients, chosen['threshold'])
        )
        decision_curves[target] = compute_decision_curve(scores, positive, DECISION_THRESHOLDS)
    conformal = rules['conformal']
    thresholds = [conformal['thresholds'][name] for name in classes]
    return {
        'calibration': {
            'temperature': rules['temperature'],
            'before': compute_calibration(apply_temperature(logits_NxK, 1.0), labels_N),
            'after': compute_calibration(probabilities, labels_N),
        },
        'operating_points': operating_points,
        'decision_curves': decision_curves,
        'conformal': {
            'target_coverage': conformal['coverage'],
            'thresholds': conformal['thresholds'],
            'notes': conformal['notes'],
            **compute_conformal(probabilities, labels_N, patients, thresholds, classes),
        },
        'risk_coverage': compute_risk_coverage(probabilities, labels_N),
        'prior_correction': compute_prior_correction(
            probabilities,
            labels_N,
            patients,
            classes,
            train_shares_K=train_shares_K,
            to_shares_K=[DEPLOYMENT_SHARES[name] for name in classes],
        ),
    }
