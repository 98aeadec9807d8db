"""What trivial classifiers reach on the same data: every result stands beside them."""

from collections.abc import Callable, Sequence

import joblib
import numpy as np
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier

from covidjax.data.lists import CLASSES
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

    # Threads, since reading, decoding and resizing run outside Python's lock.
    parallel = joblib.Parallel(n_jobs=-1, backend='threading', return_as='generator')
    thumbnails = parallel(joblib.delayed(compute)(i) for i in range(len(source)))
    return np.stack(list(track(thumbnails, f'thumbnails {name}', len(source), 'slice')))


def compute_thumbnail_scores(
    sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Fits ridge regression on thumbnails of 'train', its penalty chosen on 'val', and scores 'test'.

    Returns:
      Scores per class [N, K] of the test split (not probabilities; the largest is the prediction), and the penalty.
    """
    thumbnails = {split: compute_thumbnails(source, name=split) for split, source in sources.items()}
    models = [RidgeClassifier(alpha=alpha).fit(thumbnails['train'], labels['train']) for alpha in RIDGE_ALPHAS]
    best = max(models, key=lambda model: model.score(thumbnails['val'], labels['val']))
    return best.decision_function(thumbnails['test']), best.alpha


def compute_majority_scores(train_labels: np.ndarray, num_examples: int, num_classes: int) -> np.ndarray:
    """Returns the class shares of the training labels for every example, [N, K]."""
    return np.tile(np.bincount(train_labels, minlength=num_classes) / len(train_labels), (num_examples, 1))


def compute_file_name_features(scan: Scan) -> np.ndarray:
    """Returns what file names tell of a whole scan: slice count, first and last number, mean and largest gap [5]."""
    gaps = np.diff(scan.slices) if len(scan.slices) > 1 else np.zeros(1)
    return np.log1p([len(scan.slices), scan.slices[0], scan.slices[-1], gaps.mean(), gaps.max()])


def fit_file_names(
    features_MxD: np.ndarray, labels_M: np.ndarray, weights_M: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Fits a random forest on features of scans; no pixel is read.

    COVIDx keeps mostly lesion slices of sick scans and all slices of normal ones: this alone is far from chance. On the
    scans of the public CT-2A validation list, cross-validated by patient, a forest reaches an accuracy of 0.70 where
    logistic regression reaches 0.58.

    Args:
      features_MxD: as `compute_file_name_features` makes them.
      labels_M: int.
      weights_M: how much each scan counts.

    Returns:
      Features -> probabilities [M, K], 0 for classes that were not among the labels.
    """
    forest = RandomForestClassifier(100, min_samples_leaf=3, random_state=0)
    forest.fit(features_MxD, labels_M, weights_M)

    def predict(features: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(features), len(CLASSES)))
        probabilities[:, forest.classes_] = forest.predict_proba(features)
        return probabilities

    return predict


def compute_file_name_scores(train: Sequence[Scan], test: Sequence[Scan], *, per_slice: bool) -> np.ndarray:
    """Fits `fit_file_names` on whole training scans and scores test scans.

    Args:
      train, test: scans with all their slices.
      per_slice: a scan counts with its number of slices, else every scan alike.

    Returns:
      Probabilities [M, K] of the test scans.
    """
    features, others = (np.stack([compute_file_name_features(scan) for scan in part]) for part in (train, test))
    weights = [len(scan.records) if per_slice else 1 for scan in train]
    return fit_file_names(features, [scan.label for scan in train], weights)(others)
