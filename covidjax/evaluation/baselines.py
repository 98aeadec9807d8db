"""What trivial classifiers reach on the same data: every result stands beside them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from tqdm import tqdm

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


def compute_thumbnail_scores(sources: dict[str, Sequence[dict]], labels: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
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
