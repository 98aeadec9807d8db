"""Scores of a slice model's maps: localisation of lesions, erasure, shuffling of parameters, and which map leads."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from covidjax.data.lesions import LesionSlice
from covidjax.evaluation.outputs import compute_outputs
from covidjax.evaluation.predictions import softmax
from covidjax.explain import catalogue, leading, localisation
from covidjax.explain.catalogue import CENTRE, CONTROLS, RANDOM
from covidjax.explain.maps import (
    NUM_STEPS,
    compute_erasure_curves,
    compute_occlusion,
    compute_randomisation,
    explain,
    scale_to_unit,
    segment,
    upsample,
)
from covidjax.models.att2 import Att2
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import LesionModel

_CHUNK = 64  # slices whose maps are in memory at the same time
_MAX_CHOOSING = 200  # slices with a lesion to choose the leading map on
_CHOOSING_STEPS = 4  # of the erasure curves of all maps
_ERASED = ('attention 1 x 2', 'evidence, predicted class', CENTRE, RANDOM)

Scores = dict[str, dict[str, list[float | None]]]  # map -> measure -> a value per slice


def compute_all_maps(
    model: Att2, variables: Any, images: np.ndarray, *, lesions: LesionModel | None = None, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the maps of slices uint8 [N, S, S, 1], also inside the lungs, and the controls: name -> [N, S, S]."""
    lungs = catalogue.find_lungs(images)
    explained = explain(model, variables, images, lesions=lesions)
    maps = catalogue.compute_maps(explained, images.shape[1], model.combination)
    return maps | catalogue.restrict(maps, lungs), catalogue.compute_controls(images, lungs, seed=seed)


def score_each_slice(
    model: Att2,
    variables: Any,
    slices: Sequence[LesionSlice],
    is_shown: Callable[[str], bool],
    *,
    lesions: LesionModel | None,
    occlusion: bool,
) -> Scores:
    """Scores maps and controls against the lesions of each slice.

    Args:
      model, variables: the slice model.
      slices: with lesions, at least one.
      is_shown: name of a map or control -> whether to score it.
      lesions: the lesion model, whose map is scored too.
      occlusion: includes occlusion maps of the true class, which classify every slice 65 times.

    Returns:
      Values of `localisation.score_each` by map and measure.
    """
    parts: list[Scores] = []
    for start in range(0, len(slices), _CHUNK):
        chunk = slices[start : start + _CHUNK]
        images = np.stack([s.image for s in chunk])
        maps, controls = compute_all_maps(model, variables, images, lesions=lesions, seed=start)
        maps |= controls
        if occlusion:
            falls = compute_occlusion(create_predictor(model, variables), images, [s.label for s in chunk])
            maps = {'occlusion': scale_to_unit(upsample(falls, images.shape[1])), **maps}
        parts.append(
            {name: localisation.score_each(m, segment(m), chunk) for name, m in maps.items() if is_shown(name)}
        )
    return {
        name: {measure: [x for part in parts for x in part[name][measure]] for measure in of_map}
        for name, of_map in parts[0].items()
    }


def choose_by_lesions(
    model: Att2, variables: Any, slices: Sequence[LesionSlice], *, lesions: LesionModel | None = None
) -> str:
    """Returns the map that finds the lesions of these slices best, see `leading.choose_map`."""
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(slices), _CHUNK):
        chunk = slices[start : start + _CHUNK]
        maps, _ = compute_all_maps(model, variables, np.stack([s.image for s in chunk]), lesions=lesions)
        parts.append(
            {
                name: np.array([_measure(m, s.lesion) for m, s in zip(of_slices, chunk, strict=True)])
                for name, of_slices in maps.items()
            }
        )
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return leading.choose_map(scores, 'lesions')


def _measure(scores: np.ndarray, lesion: np.ndarray) -> tuple[float, float]:
    auc = localisation.compute_rank_auc(scores, lesion)
    return localisation.compute_pointing(scores, lesion), 0.5 if auc is None else auc


def score_localisation(scores: Scores, slices: Sequence[LesionSlice], names: Sequence[str]) -> dict[str, Any]:
    """Averages scores against lesions.

    Args:
      scores: from `score_each_slice`.
      slices: with lesions, at least one.
      names: of the maps and controls to return.

    Returns:
      'num_slices', 'num_patients', 'maps' (name -> measure -> `localisation.average_by_patient`) and 'chance', the
      scores of a map without preference: 'pointing', 'energy_lesion', 'energy_lung' and 'auc'.
    """
    patients = [s.patient for s in slices]
    lesion_share = float(np.mean([s.lesion.mean() for s in slices]))
    lungs = [s.lung.mean() for s in slices if s.lung is not None]
    return {
        'num_slices': len(slices),
        'num_patients': len(set(patients)),
        'maps': {
            name: {measure: localisation.average_by_patient(v, patients) for measure, v in scores[name].items()}
            for name in names
        },
        'chance': {
            'pointing': lesion_share,
            'energy_lesion': lesion_share,
            'energy_lung': float(np.mean(lungs)) if lungs else None,
            'auc': 0.5,
        },
    }


def create_predictor(model: Att2, variables: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from uint8 [N, S, S, 1] to probabilities [N, K]."""
    folded = fold_batch_norm(variables)
    return lambda images: softmax(compute_outputs(model, folded, images).logits)


def lead_by_lesions(
    model: Att2,
    variables: Any,
    slices: Sequence[LesionSlice],
    choosing: Sequence[LesionSlice],
    *,
    lesions: LesionModel | None = None,
    occlusion: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores maps against lesions and finds the map that leads.

    Args:
      model, variables: the slice model.
      slices: with lesions, at least one; the scores are theirs.
      choosing: slices with lesions of other patients, to choose the map on; up to 200 are used. Without them, the map
        is chosen on every second patient of `slices` and compared with chance on the others.
      lesions: the lesion model of the run, whose map can lead too.
      occlusion: includes occlusion maps in the scores; they cannot lead.

    Returns:
      `score_localisation` of all maps of the whole slice and of the controls; and `leading.measure_lead` with
      'chosen_on'.
    """
    patients = [s.patient for s in slices]
    measured = list(range(len(slices)))
    if choosing:
        used = np.unique(np.linspace(0, len(choosing) - 1, _MAX_CHOOSING).round().astype(int)).tolist()
        chosen_on = f'{len(used)} validation slices with a lesion'
        name = choose_by_lesions(model, variables, [choosing[i] for i in used], lesions=lesions)
    else:
        first, second = leading.split_patients(patients)
        measured = second or first  # of a single patient, no map leads
        chosen_on = f'{len(first)} slices of every second patient'
        name = choose_by_lesions(model, variables, [slices[i] for i in first], lesions=lesions)

    def is_shown(n: str) -> bool:
        return n in (name, *CONTROLS) or not n.endswith(catalogue.IN_LUNGS)

    scores = score_each_slice(model, variables, slices, is_shown, lesions=lesions, occlusion=occlusion)
    compared = {n: _stack(scores[n], measured) for n in (name, *leading.name_references(name, 'lesions').values())}
    lead = leading.measure_lead(compared, name, 'lesions', [patients[i] for i in measured])
    # FLAT is reported as chance, and the scores of the best map inside the lungs are with the leading map.
    shown = [n for n in scores if n != catalogue.FLAT and (n in CONTROLS or not n.endswith(catalogue.IN_LUNGS))]
    return score_localisation(scores, slices, shown), lead | {'chosen_on': chosen_on}


def _stack(of_map: dict[str, list[float | None]], numbers: Sequence[int]) -> np.ndarray:
    """Returns the measures of a map for the choice, [N, M]; a slice that is all lesion gets the chance level."""
    columns = [[of_map[measure][i] for i in numbers] for measure in leading.MEASURES['lesions']]
    return np.array([[0.5 if x is None else x for x in column] for column in columns]).T


def lead_by_erasure(
    model: Att2, variables: Any, images: np.ndarray, patients: Sequence[str], choosing: np.ndarray
) -> dict[str, Any]:
    """Finds the map that leads by erasure, for slices without outlined lesions.

    The measure of a map is the area under its insertion curve less that under its deletion curve.

    Args:
      model, variables: the slice model.
      images: uint8 [N, S, S, 1], few.
      patients: of the slices.
      choosing: uint8 [L, S, S, 1], slices of other patients to choose the map on.

    Returns:
      `leading.measure_lead` with 'chosen_on'.
    """
    maps, _ = compute_all_maps(model, variables, choosing)
    called, predict = find_called(model, variables, choosing), create_predictor(model, variables)
    erased = {n: _erase_each(predict, choosing, m, called, _CHOOSING_STEPS) for n, m in maps.items()}
    name = leading.choose_map(erased, 'erasure')
    maps, controls = compute_all_maps(model, variables, images)
    called = find_called(model, variables, images)
    compared = {n: (maps | controls)[n] for n in (name, *leading.name_references(name, 'erasure').values())}
    scores = {n: _erase_each(predict, images, m, called) for n, m in compared.items()}
    what = f'{len(choosing)} validation slices'
    return leading.measure_lead(scores, name, 'erasure', patients) | {'chosen_on': what}


def find_called(model: Att2, variables: Any, images: np.ndarray) -> np.ndarray:
    """Returns the predicted class of slices uint8 [N, S, S, 1], int [N]."""
    return create_predictor(model, variables)(images).argmax(1)


def _erase_each(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    maps: np.ndarray,
    called: np.ndarray,
    num_steps: int = NUM_STEPS,
) -> np.ndarray:
    curves = compute_erasure_curves(predict, images, maps, called, num_steps=num_steps)
    return _compute_area(curves['insertion'] - curves['deletion'])[:, np.newaxis]


def _compute_area(curves: np.ndarray) -> np.ndarray:
    return np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1), axis=-1)


def score_faithfulness(
    model: Att2, variables: Any, images: np.ndarray, best: str, *, lesions: LesionModel | None = None
) -> dict[str, Any]:
    """Scores maps by erasing pixels and by shuffling parameters, for the predicted class of each slice.

    Args:
      model, variables: the slice model.
      images: uint8 [N, S, S, 1], few.
      best: the best map of the run, see `leading.measure_lead`.
      lesions: the lesion model of the run.

    Returns:
      'num_slices'; 'erasure': name -> {'deletion' and 'insertion', mean curves; 'deletion_area', lower is better;
      'insertion_area', higher is better}; 'erasure_of_best', the same for the best map; 'randomisation': rows of
      `compute_randomisation`.
    """
    predict, called = create_predictor(model, variables), find_called(model, variables, images)
    maps, controls = compute_all_maps(model, variables, images, lesions=lesions)

    def erase(name: str) -> dict[str, Any]:
        curves = compute_erasure_curves(predict, images, (maps | controls)[name], called)
        areas = {f'{kind}_area': float(_compute_area(curve.mean(0))) for kind, curve in curves.items()}
        return {kind: curve.mean(0).tolist() for kind, curve in curves.items()} | areas

    return {
        'num_slices': len(images),
        'erasure': {name: erase(name) for name in _ERASED},
        'erasure_of_best': erase(best),
        'randomisation': compute_randomisation(model, variables, images[:16], called[:16]),
    }
