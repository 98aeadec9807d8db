"""Trivial baselines, scored on the same data as the models."""

from collections.abc import Callable, Sequence

import joblib
import numpy as np
from PIL import Image

from covidjax.data.lists import CLASSES
from covidjax.data.lungs import find_lungs_in_slice
from covidjax.data.sequences import Scan
from covidjax.progress import track

THUMBNAIL_SIZE = 32
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def compute_thumbnails(source: Sequence[dict], *, name: str) -> np.ndarray:
    """Returns prepared slices as thumbnails in [0, 1], float32 [N, 32 * 32]."""

    def compute(i: int) -> np.ndarray:
        image = Image.fromarray(source[i]['image'][..., 0])
        small = image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
        return np.asarray(small, np.float32).ravel() / 255

    # Threads suffice: reading, decoding and resizing release the GIL.
    parallel = joblib.Parallel(n_jobs=-1, backend='threading', return_as='generator')
    thumbnails = parallel(joblib.delayed(compute)(i) for i in range(len(source)))
    return np.stack(list(track(thumbnails, f'thumbnails {name}', len(source), 'slice')))


def fit_thumbnails(
    sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Fits ridge regression to the 'train' thumbnails and chooses its penalty on 'val'.

    Returns:
      A function thumbnails [N, 32 * 32] -> scores [N, K], and the penalty. The scores are not probabilities; the
      largest is the prediction. A class without training examples scores below all others.
    """
    from sklearn.linear_model import RidgeClassifier  # slow to import

    thumbnails = {split: compute_thumbnails(sources[split], name=split) for split in ('train', 'val')}
    models = [RidgeClassifier(alpha=alpha).fit(thumbnails['train'], labels['train']) for alpha in RIDGE_ALPHAS]
    best = max(models, key=lambda model: model.score(thumbnails['val'], labels['val']))

    def predict(thumbnails: np.ndarray) -> np.ndarray:
        found = best.decision_function(thumbnails)
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


class _Mapped:
    """Records whose image is replaced by a function of it."""

    def __init__(self, source: Sequence[dict], change: Callable[[np.ndarray], np.ndarray]):
        self._source, self._change = source, change

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        record = self._source[index]
        return {**record, 'image': self._change(record['image'])}


def compute_shape_scores(sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores test slices by silhouette, and by mean grey, as `compute_thumbnail_scores` does by thumbnails.

    The silhouette is the outline of the lungs without their greys, by `lungs.find_lungs_in_slice`; the mean grey is
    that inside it. A slice without lungs has a black silhouette and the grey 0.
    """

    def draw_silhouette(image: np.ndarray) -> np.ndarray:
        lungs = find_lungs_in_slice(image[..., 0])
        return np.zeros_like(image) if lungs is None else lungs[..., np.newaxis].astype(np.uint8) * 255

    def average(image: np.ndarray) -> np.ndarray:
        lungs = find_lungs_in_slice(image[..., 0])
        return np.full_like(image, 0 if lungs is None or not lungs.any() else image[..., 0][lungs].mean())

    return {
        name: compute_thumbnail_scores({split: _Mapped(s, change) for split, s in sources.items()}, labels)[0]
        for name, change in (('silhouette ridge', draw_silhouette), ('mean grey', average))
    }


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
