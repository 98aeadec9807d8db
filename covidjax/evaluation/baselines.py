"""What trivial classifiers reach on the same data: every result stands beside them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from covidjax.data.scans import Scan

THUMBNAIL_SIZE = 32
RIDGE_ALPHAS = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def compute_thumbnails(source: Sequence[dict], *, name: str) -> np.ndarray:
    """Returns prepared slices as thumbnails in [0, 1], float32 [N, 32 * 32]."""
    thumbnails = np.empty((len(source), THUMBNAIL_SIZE**2), np.float32)
    for i in tqdm(range(len(source)), desc=f'thumbnails {name}', leave=False, unit='slice'):
        image = Image.fromarray(source[i]['image'][..., 0])
        small = image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
        thumbnails[i] = np.asarray(small, np.float32).ravel() / 255
    return thumbnails


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


def compute_file_name_scores(train: Sequence[Scan], test: Sequence[Scan]) -> np.ndarray:
    """Fits logistic regression on file names of whole training scans; no pixel is read.

    COVIDx keeps mostly lesion slices of sick scans and all slices of normal ones: this alone is far from chance.

    Returns:
      Probabilities [M, K] of the test scans.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(np.stack([compute_file_name_features(scan) for scan in train]), [scan.label for scan in train])
    return model.predict_proba(np.stack([compute_file_name_features(scan) for scan in test]))
