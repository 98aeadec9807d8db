"""Attention, evidence and occlusion maps of a slice model, and checks of such maps.

Attention is class-agnostic: one map for all classes. Evidence and occlusion maps are of one class.

Shapes: N slices, S their side, K classes, h and w the sides of a feature map.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy

from covidjax.data.preprocess import compute_otsu_threshold, resize
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.outputs import apply_in_batches
from covidjax.explain.evidence import combine_evidence
from covidjax.models.att2 import Att2, normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import LesionModel
from covidjax.progress import track

BATCH_SIZE = 16
NUM_STEPS = 8  # of an erasure curve


class Explanations(NamedTuple):
    """Probabilities and maps of N slices.

    Attributes:
      probabilities: [N, K].
      attention: per module [N, h, w]; each map sums to 1.
      evidence: per module [N, h, w, K], see `att2.Att2Outputs`.
      lesions: lesion probability by a lesion model [N, h, h]; None without one.
    """

    probabilities: np.ndarray
    attention: tuple[np.ndarray, np.ndarray]
    evidence: tuple[np.ndarray, np.ndarray]
    lesions: np.ndarray | None = None


@functools.partial(compile_fast, static_argnums=(0, 1))
def _explain(model: Att2, full: bool, variables: Any, images: jax.Array) -> Explanations:
    outputs = model.apply(variables, normalise(images), train=False, full=full)
    return Explanations(nn.softmax(outputs.logits), outputs.attention, outputs.evidence)


def explain(
    model: Att2, variables: Any, images: np.ndarray, *, full: bool = False, lesions: LesionModel | None = None
) -> Explanations:
    """Computes class probabilities, attention and evidence of slices in one pass of the model.

    Args:
      model: the slice model.
      variables: its parameters and batch statistics.
      images: uint8 [N, S, S, 1], N at least 1.
      full: computes the tail even if it cannot change the output.
      lesions: outlines the slices, as the slice model sees them; None leaves that out.
    """
    explained = apply_in_batches(
        functools.partial(_explain, model, full, fold_batch_norm(variables)), BATCH_SIZE, images
    )
    if lesions is None:
        return explained
    resized = np.stack([resize(image[..., 0], lesions.image_size) for image in images])
    return explained._replace(lesions=outline_slices(lesions, resized)[..., 1])


# ---------------------------------------------------------------------------------------------------------------------
# Maps


def upsample(maps: np.ndarray, size: int) -> np.ndarray:
    """Upsamples maps [N, h, w] to float32 [N, size, size], bilinearly with half-pixel centres."""
    return np.asarray(jax.image.resize(jnp.asarray(maps, jnp.float32), (len(maps), size, size), 'bilinear'))


def scale_to_unit(maps: np.ndarray) -> np.ndarray:
    """Scales each map of [N, S, S] to [0, 1]; a flat map becomes 0."""
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return np.where(high > low, (maps - low) / np.where(high > low, high - low, 1), 0)


def combine_attention(attention: tuple[np.ndarray, np.ndarray], size: int) -> np.ndarray:
    """Returns sqrt(a1 * a2) of both modules' upsampled maps, each scaled to [0, 1]: [N, size, size] (as in Fig. 7)."""
    first, second = (upsample(maps, size) for maps in attention)
    return scale_to_unit(np.sqrt(first * second))


def segment(maps: np.ndarray) -> np.ndarray:
    """Returns the pixels at or above the Otsu threshold of each map, bool [N, S, S]; none for a flat map."""
    return np.stack([m >= compute_otsu_threshold(m) if m.max() > m.min() else np.zeros(m.shape, bool) for m in maps])


# ---------------------------------------------------------------------------------------------------------------------
# Checks of maps


def compute_occlusion(
    predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, classes_N: Sequence[int], *, num_cells: int = 8
) -> np.ndarray:
    """Measures how far the probability of a class falls when a cell of the slice is blurred; slow but model-agnostic.

    Args:
      predict: uint8 [M, S, S, 1] -> probabilities [M, K].
      images: uint8 [N, S, S, 1].
      classes_N: the class of each slice.
      num_cells: along each side; a slice is classified num_cells^2 + 1 times.

    Returns:
      Falls of the probability [N, num_cells, num_cells]; rises become 0.
    """
    classes_N = np.asarray(classes_N)
    blurred, edges = _blur(images), np.linspace(0, images.shape[1], num_cells + 1).round().astype(int)
    whole = predict(images)[np.arange(len(images)), classes_N]
    falls = np.zeros((len(images), num_cells, num_cells))
    for i in track(range(num_cells), 'occlusion', num_cells, 'row'):
        for j in range(num_cells):
            cell = (slice(None), slice(edges[i], edges[i + 1]), slice(edges[j], edges[j + 1]))
            changed = images.copy()
            changed[cell] = blurred[cell]
            falls[:, i, j] = whole - predict(changed)[np.arange(len(images)), classes_N]
    return falls.clip(min=0)


def _blur(images: np.ndarray) -> np.ndarray:
    """Removes detail from slices: Gaussian blur, standard deviation a tenth of their side."""
    sigma = images.shape[1] / 10
    return np.stack([scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode='nearest') for image in images])


def compute_erasure_curves(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    maps: np.ndarray,
    classes_N: Sequence[int],
    *,
    num_steps: int = NUM_STEPS,
) -> dict[str, np.ndarray]:
    """Computes the probability of a class while a map's highest pixels are blurred or restored (Petsiuk 2018).

    Args:
      predict: uint8 [M, S, S, 1] -> probabilities [M, K].
      images: uint8 [N, S, S, 1].
      maps: [N, S, S]; equal values are taken in reading order.
      classes_N: the class of each slice.
      num_steps: of the curves.

    Returns:
      'deletion' and 'insertion', float [N, num_steps + 1]: the probability with 0, 1/num_steps ... 1 of the pixels
      blurred, or restored in the blurred slice. For a good map deletion falls early and insertion rises early.
    """
    classes_N = np.asarray(classes_N)
    blurred = _blur(images)
    n, size = len(images), images.shape[1]
    ranks = np.empty((n, size * size), int)
    np.put_along_axis(ranks, np.argsort(-maps.reshape(n, -1), axis=1, kind='stable'), np.arange(size * size)[None], 1)
    curves = {'deletion': np.empty((n, num_steps + 1)), 'insertion': np.empty((n, num_steps + 1))}
    for step in range(num_steps + 1):
        highest = (ranks < step / num_steps * size * size).reshape(n, size, size, 1)
        for name, changed in (
            ('deletion', np.where(highest, blurred, images)),
            ('insertion', np.where(highest, images, blurred)),
        ):
            curves[name][:, step] = predict(changed)[np.arange(n), classes_N]
    return curves


def draw_random_maps(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Returns random maps, about as coarse as those of the last stage: float32 [count, size, size]."""
    return upsample(np.random.default_rng(seed).random((count, 4, 4)), size)


def randomise(variables: Any, chosen: Callable[[str], bool], *, seed: int = 0) -> Any:
    """Returns variables with the values of every chosen parameter shuffled within its array.

    Args:
      variables: of a model.
      chosen: path of a parameter ('backbone/layer1_0/conv1/kernel') -> whether to shuffle it.
      seed: of the shuffling.
    """
    rng = np.random.default_rng(seed)

    def shuffle(path, value):
        name = '/'.join(key.key for key in path)
        return rng.permutation(np.ravel(value)).reshape(np.shape(value)) if chosen(name) else value

    return {**variables, 'params': jax.tree_util.tree_map_with_path(shuffle, variables['params'])}


def list_parts(params: Any) -> dict[str, tuple[str, ...]]:
    """Returns the parts of a slice model but its tail, from output to input: prefixes of parameter paths by name."""
    parts = {'classifier': ('classifier',), 'attention': ('attention',)}
    names = params['backbone'].keys()
    layers = sorted({name.split('_')[0] for name in names if name.startswith('layer')}, reverse=True)
    parts |= {layer: (f'backbone/{layer}',) for layer in layers}
    if '_conv_head' in names:  # an EfficientNet
        parts['head'] = ('backbone/_conv_head/', 'backbone/_bn1/')
        parts |= {f'block {n}': (f'backbone/_blocks_{n}/',) for n in range(15, -1, -1)}
    return parts | {'stem': ('backbone/',)}


def compute_randomisation(
    model: Att2, variables: Any, images: np.ndarray, classes_N: Sequence[int], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Shuffles parameters from the output on and compares the maps with those of the intact model (Adebayo 2018).

    Maps that hardly change do not show what was learnt. The full model is used, so that shuffling only the tail, where
    there is one, is a control: under 'additive' compatibility it must change nothing.

    Returns:
      A dict per row, the control first: 'shuffled', the name of the shuffled parts; 'attention' (both modules combined)
      and 'evidence' (of both modules, for the given classes), Spearman's rank correlation with the intact model's maps,
      mean over the slices that have one, None if none has; 'changed', the largest difference of a probability.
    """

    def get_evidence(explained: Explanations) -> np.ndarray:
        evidence = np.asarray(combine_evidence(explained.evidence, 32, model.combination))
        return np.stack([of_slice[..., c] for of_slice, c in zip(evidence, classes_N, strict=True)])

    intact = explain(model, variables, images, full=True)
    parts = list_parts(variables['params'])
    rows = []
    if 'tail_0' in variables['params']:
        rows.append(('tail only', lambda path: path.startswith('tail_')))
    prefixes = ()
    for number, (part, added) in enumerate(parts.items()):
        prefixes += added
        if part.startswith('block') and int(part.split()[1]) % 5:  # every fifth of many
            continue
        name = 'all down to ' * (number > 0) + part
        rows.append((name, lambda path, prefixes=prefixes: path.startswith(prefixes)))
    results = []
    for name, chosen in rows:
        changed = explain(model, randomise(variables, chosen, seed=seed), images, full=True)
        results.append(
            {
                'shuffled': name,
                'attention': correlate(*(combine_attention(x.attention, 32) for x in (intact, changed))),
                'evidence': correlate(get_evidence(intact), get_evidence(changed)),
                'changed': float(np.abs(intact.probabilities - changed.probabilities).max()),
            }
        )
    return results


def correlate(first: np.ndarray, second: np.ndarray) -> float | None:
    """Returns the mean rank correlation of pairs of maps, leaving out pairs with a flat map."""
    found = [
        scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic
        for a, b in zip(first, second, strict=True)
        if a.min() < a.max() and b.min() < b.max()
    ]
    return float(np.mean(found)) if found else None
