import numpy as np
import pytest

from covidjax.data.sequences import Scan
from covidjax.evaluation.baselines import (
    compute_file_name_features,
    compute_file_name_scores,
    compute_majority_scores,
    compute_shape_scores,
    compute_thumbnail_scores,
    compute_thumbnails,
)


def make_slices(count, seed):
    """Returns slices and labels; the label is the index of the bright third of the image."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = [rng.integers(0, 100, (42, 42, 1)).astype(np.uint8) for _ in labels]
    for image, y in zip(images, labels, strict=True):
        image[14 * y : 14 * y + 14] += 50
    return [{'image': image} for image in images], labels


def test_thumbnail_is_a_box_average():
    image = np.kron(np.arange(32 * 32).reshape(32, 32) % 256, np.ones((2, 2)))[..., None].astype(np.uint8)
    thumbnails = compute_thumbnails([{'image': image}], name='test')
    np.testing.assert_allclose(thumbnails[0] * 255, np.arange(32 * 32) % 256, atol=1e-4)


def test_thumbnail_baseline_finds_the_bright_third():
    data = {
        split: make_slices(count, seed)
        for seed, (split, count) in enumerate([('train', 90), ('val', 30), ('test', 30)])
    }
    sources, labels = ({split: pair[i] for split, pair in data.items()} for i in (0, 1))
    scores, alpha = compute_thumbnail_scores(sources, labels)
    assert (scores.argmax(1) == labels['test']).mean() > 0.95
    assert alpha > 0


def test_silhouettes_and_mean_grey_see_nothing_else():
    rng = np.random.default_rng(0)

    def draw(grey, radius):
        rows, columns = np.mgrid[:64, :64]
        lungs = np.minimum(np.hypot(rows - 32, columns - 16), np.hypot(rows - 32, columns - 48)) < radius
        return {'image': np.where(lungs, rng.normal(grey, 4, (64, 64)).clip(30), 0).astype(np.uint8)[..., None]}

    labels = {split: np.arange(20) % 2 for split in ('train', 'val', 'test')}
    for name, blind, values in (
        ('mean grey', 'silhouette ridge', [(80, 11), (140, 11)]),
        ('silhouette ridge', 'mean grey', [(100, 8), (100, 12)]),
    ):
        sources = {split: [draw(*values[y]) for y in of_split] for split, of_split in labels.items()}
        sources['test'].append({'image': np.full((64, 64, 1), 90, np.uint8)})  # no lungs
        found = compute_shape_scores(sources, labels)
        assert (found[name].argmax(1)[:20] == labels['test']).all()
        assert found[name].shape == (21, 3)
        assert (found[name][:, 2] < found[name][:, :2].min(1)).all()  # never seen
        assert (found[blind].argmax(1)[:20] == labels['test']).mean() < 0.9


def test_majority_by_hand():
    scores = compute_majority_scores(np.array([2, 2, 1, 2]), 2, 3)
    np.testing.assert_allclose(scores, [[0, 0.25, 0.75]] * 2)


def make_scan(first, count, gap, label):
    slices = tuple(range(first, first + count * gap, gap))
    return Scan('s', 'p', label, slices, tuple(range(count)))


def test_file_name_features_by_hand():
    features = np.expm1(compute_file_name_features(make_scan(4, 3, 5, 0)))
    assert features == pytest.approx([3, 4, 14, 5, 5])
    assert np.expm1(compute_file_name_features(make_scan(4, 1, 5, 0))) == pytest.approx([1, 4, 4, 0, 0])


def test_file_names_alone_tell_scans_apart_where_they_leak():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [
            make_scan(int(rng.integers(0, 5)), int(rng.integers(30, 60) / (1 + y)), 1 + y, y) for y in [0, 1, 2] * 20
        ]

    train, test = draw(0), draw(1)
    accuracy = (
        compute_file_name_scores(train, test, per_slice=False).argmax(1) == [scan.label for scan in test]
    ).mean()
    assert accuracy > 0.9
