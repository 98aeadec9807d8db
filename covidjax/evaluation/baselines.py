"""Trivial baselines, scored on the same data as the models."""

from collections.abc import Callable, Sequence

import joblib
import numpy as np
from PIL import Image

from covidjax.data.lists import CLASSES
from covidjax.data.sequences import Scan
from covidjax.data.slice_lungs import find_lungs_in_slice
from covidjax.progress import track

THUMBNAIL_SIZE = 32
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def _measure(source: Sequence[dict], compute: Callable[[np.ndarray], np.ndarray], name: str) -> np.ndarray:
    """Returns a function of every image uint8 [S, S], float32 [N, D]."""
    # Threads suffice: reading, decoding and resizing release the GIL.
    parallel = joblib.Parallel(n_jobs=-1, backend='threading', return_as='generator')
    results = parallel(joblib.delayed(lambda i: compute(source[i]['image'][..., 0]))(i) for i in range(len(source)))
    return np.stack(list(track(results, name, len(source), 'slice')))


def _shrink(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel() / 255


def compute_thumbnails(source: Sequence[dict], *, name: str) -> np.ndarray:
    """Returns prepared slices as thumbnails in [0, 1], float32 [N, 32 * 32]."""
    return _measure(source, _shrink, f'thumbnails {name}')


def fit_thumbnails(
    sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fits ridge regression to the 'train' thumbnails and chooses its penalty on 'val'; see `fit_ridge`."""
    return fit_ridge({split: compute_thumbnails(sources[split], name=split) for split in ('train', 'val')}, labels)


def fit_ridge(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fits ridge regression to the features [N, D] of 'train' and chooses its penalty on those of 'val'.

    Returns:
      A function features [N, D] -> scores [N, K], and the penalty. The scores are not probabilities; the largest is the
      prediction. A class without training examples scores below all others.
    """
    from sklearn.linear_model import RidgeClassifier  # slow to import

    models = [RidgeClassifier(alpha=alpha).fit(features['train'], labels['train']) for alpha in RIDGE_ALPHAS]
    best = max(models, key=lambda model: model.score(features['val'], labels['val']))

    def predict(features_NxD: np.ndarray) -> np.ndarray:
        found = best.decision_function(features_NxD)
        if found.ndim == 1:  # of the second of two classes against the first
            found = np.stack([-found, found], axis=1)
        scores = np.full((len(found), len(CLASSES)), found.min() - 1)
        scores[:, best.classes_] = found
        return scores

    return predict, best.alpha


def compute_thumbnail_scores(
    sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Returns the scores [N, K] of the 'test' thumbnails by `fit_thumbnails`, and its penalty."""
    predict, alpha = fit_thumbnails(sources, labels)
    return predict(compute_thumbnails(sources['test'], name='test')), alpha


def compute_shape_scores(sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores test slices by silhouette, and by mean grey, with `fit_ridge`.

    The silhouette is the outline of the lungs without their greys, by `slice_lungs.find_lungs_in_slice`, as a
    thumbnail; the mean grey is that inside it. A slice without lungs has a black silhouette and the grey 0.
    """

    def describe(image: np.ndarray) -> np.ndarray:
        lungs = find_lungs_in_slice(image)
        if lungs is None or not lungs.any():
            return np.zeros(THUMBNAIL_SIZE**2 + 1, np.float32)
        return np.append(_shrink(lungs.astype(np.uint8) * 255), np.float32(image[lungs].mean() / 255))

    found = {split: _measure(source, describe, f'silhouettes {split}') for split, source in sources.items()}
    scores = {}
    for name, columns in (('silhouette ridge', slice(-1)), ('mean grey', slice(-1, None))):
        features = {split: values[:, columns] for split, values in found.items()}
        scores[name] = fit_ridge(features, labels)[0](features['test'])
    return scores


def compute_majority_scores(train_labels: np.ndarray, num_examples: int, num_classes: int) -> np.ndarray:
    """Returns the class shares of the training labels, one row per example: [N, K]."""
    return np.tile(np.bincount(train_labels, minlength=num_classes) / len(train_labels), (num_examples, 1))


def compute_file_name_features(scan: Scan) -> np.ndarray:
    """Returns log(1 + x) of a scan's slice count, first and last slice number, mean and largest gap: [5]."""
    gaps = np.diff(scan.slices) if len(scan.slices) > 1 else np.zeros(1)
    return np.log1p([len(scan.slices), scan.slices[0], scan.slices[-1], gaps.mean(), gaps.max()])


def fit_file_names(
    features_MxD: np.ndarray, labels_M: np.ndarray, weights_M: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fits a random forest to features from file names; it reads no pixel.

    COVIDx keeps mostly lesion slices of sick scans but all slices of normal ones, so file names alone score far above
    chance. On the public CT-2A validation list, cross-validated by patient, the accuracy over scans is 0.70 (logistic
    regression: 0.58).

    Args:
      features_MxD: see `compute_file_name_features`.
      labels_M: int.
      weights_M: sample weight of each scan.

    Returns:
      Features -> probabilities [M, K]; 0 for classes that are not among the labels.
    """
    from sklearn.ensemble import RandomForestClassifier  # slow to import

    forest = RandomForestClassifier(100, min_samples_leaf=3, random_state=0)
    forest.fit(features_MxD, labels_M, weights_M)

    def predict(features: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(features), len(CLASSES)))
        probabilities[:, forest.classes_] = forest.predict_proba(features)
        return probabilities

    return predict


def compute_file_name_scores(train: Sequence[Scan], test: Sequence[Scan], *, per_slice: bool) -> np.ndarray:
    """Fits `fit_file_names` to whole training scans and scores test scans.

    Args:
      train, test: scans with all their slices.
      per_slice: weights a training scan by its number of slices instead of equally.

    Returns:
      Probabilities [M, K] of the test scans.
    """
    features, others = (np.stack([compute_file_name_features(scan) for scan in part]) for part in (train, test))
    weights = [len(scan.records) if per_slice else 1 for scan in train]
    return fit_file_names(features, [scan.label for scan in train], weights)(others)
