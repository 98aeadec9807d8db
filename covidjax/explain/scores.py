"""Scores of a slice model's maps: localisation of lesions, erasure of pixels, shuffling of parameters."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from covidjax.data.lesions import LesionSlice
from covidjax.evaluation.outputs import compute_outputs
from covidjax.evaluation.predictions import softmax
from covidjax.explain import localisation
from covidjax.explain.maps import (
    NUM_STEPS,
    Explanations,
    combine_attention,
    compute_erasure_curves,
    compute_occlusion,
    compute_randomisation,
    draw_random_maps,
    explain,
    scale_to_unit,
    segment,
    upsample,
)
from covidjax.models.att2 import Att2

CONTROLS = ('always the centre', 'random map')


def compute_maps(explained: Explanations, size: int) -> dict[str, np.ndarray]:
    """Returns all maps of N slices by name, with two controls: float [N, size, size], each scaled to [0, 1]."""
    count = len(explained.probabilities)
    return {
        'attention 1': scale_to_unit(upsample(explained.attention[0], size)),
        'attention 2': scale_to_unit(upsample(explained.attention[1], size)),
        'attention 1 x 2': combine_attention(explained.attention, size),
        'Grad-CAM': scale_to_unit(upsample(explained.grad_cam, size)),
        CONTROLS[0]: np.repeat(localisation.create_centre_map(size)[np.newaxis], count, axis=0),
        CONTROLS[1]: draw_random_maps(count, size),
    }


def score_localisation(
    model: Att2, variables: Any, slices: Sequence[LesionSlice], *, occlusion: bool = False
) -> dict[str, Any]:
    """Scores all maps against lesions; Grad-CAM and occlusion are for the true class.

    Args:
      model, variables: the slice model.
      slices: with lesions, at least one.
      occlusion: includes occlusion maps, which classify every slice 65 times.

    Returns:
      'num_slices', 'num_patients', 'maps' (name -> `localisation.score_maps`) and 'chance', the scores of a map without
      preference: 'pointing', 'energy_lesion', 'energy_lung' and 'auc'.
    """
    size = slices[0].image.shape[0]
    images, labels = np.stack([s.image for s in slices]), [s.label for s in slices]
    maps = compute_maps(explain(model, variables, images, labels), size)
    if occlusion:
        falls = compute_occlusion(create_predictor(model, variables), images, labels)
        maps = {'occlusion': scale_to_unit(upsample(falls, size)), **maps}
    scores = {name: localisation.score_maps(m, segment(m), slices) for name, m in maps.items()}
    lesion_share = float(np.mean([s.lesion.mean() for s in slices]))
    lungs = [s.lung.mean() for s in slices if s.lung is not None]
    return {
        'num_slices': len(slices),
        'num_patients': len({s.patient for s in slices}),
        'maps': scores,
        'chance': {
            'pointing': lesion_share,
            'energy_lesion': lesion_share,
            'energy_lung': float(np.mean(lungs)) if lungs else None,
            'auc': 0.5,
        },
    }


def create_predictor(model: Att2, variables: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from uint8 [N, S, S, 1] to probabilities [N, K]."""
    return lambda images: softmax(compute_outputs(model, variables, images).logits)


def score_faithfulness(model: Att2, variables: Any, images: np.ndarray) -> dict[str, Any]:
    """Scores maps by erasing pixels and by shuffling parameters, for the predicted class of each slice.

    Args:
      model, variables: the slice model.
      images: uint8 [N, S, S, 1], few.

    Returns:
      'num_slices'; 'erasure': name -> {'deletion' and 'insertion', mean curves; 'deletion_area', lower is better;
      'insertion_area', higher is better}; 'randomisation': rows of `compute_randomisation`.
    """
    predict = create_predictor(model, variables)
    called = predict(images).argmax(1)
    maps = compute_maps(explain(model, variables, images, called), images.shape[1])
    erasure = {}
    for name in ('attention 1 x 2', 'Grad-CAM', *CONTROLS):
        curves = compute_erasure_curves(predict, images, maps[name], called)
        erasure[name] = {kind: curve.mean(0).tolist() for kind, curve in curves.items()}
        erasure[name] |= {
            f'{kind}_area': float(np.trapezoid(curve.mean(0), dx=1 / NUM_STEPS)) for kind, curve in curves.items()
        }
    return {
        'num_slices': len(images),
        'erasure': erasure,
        'randomisation': compute_randomisation(model, variables, images[:16], called[:16]),
    }
