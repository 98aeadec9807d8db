import json

import numpy as np
import pytest
from PIL import Image

from configs import att2
from covidjax.ablation import Outcome, compare, create_config, estimate, load_masks
from covidjax.data.lists import Row
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.evaluation.metrics import draw_resamples

SIZE = 32


def create_tiny_config(raw_dir):
    config = att2.get_config(str(raw_dir)).unlock()
    config.data.image_size = SIZE
    config.model.update(
        {'stage_sizes': (1, 1), 'width': 4, 'block': 'basic', 'stem': 'small', 'tail_blocks': 1, 'pretrained': ''}
    )
    config.train.update({'batch_size': 8, 'steps_per_epoch': 2, 'num_epochs': 1, 'augment': False})
    return config.lock()


def test_comparison_of_tiny_runs(tmp_path):
    raw_dir, output = tmp_path / 'raw', tmp_path / 'out'
    write_phantoms(
        raw_dir, PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=64, min_slices=6, max_slices=8)
    )
    config = create_tiny_config(raw_dir)
    config.unlock().data.prepared_dir = str(tmp_path / 'prepared')
    comparison = compare(config, [0], ['uniform'], ['concat'], output)
    assert json.loads((output / 'ablation.json').read_text()) == comparison
    assert comparison['test']['patients'] == 3
    assert comparison['test']['lesion_slices'] > 0
    figures = comparison['variants']['uniform-concat']
    results_path = output / 'uniform-concat' / 'seed0' / 'results.json'
    assert figures['accuracy']['by_seed'] == pytest.approx([json.loads(results_path.read_text())['accuracy']])
    # Average pooling looks at everything alike.
    chance = comparison['references']['flat map (chance)']
    for score in ('pointing', 'energy', 'auc'):
        assert figures[f'combined/{score}']['mean'] == pytest.approx(chance[f'combined/{score}']['mean'], abs=1e-5)
    report = (output / 'ablation.md').read_text()
    assert '| uniform-concat |' in report
    assert 'energy in lesion' in report

    # Once more with another variant: what is finished is not trained again.
    stamp = results_path.stat().st_mtime_ns
    again = compare(config, [0], ['uniform', 'dot'], ['concat'], output)
    assert results_path.stat().st_mtime_ns == stamp
    assert again['variants']['uniform-concat'] == figures
    assert again['reference'] == 'uniform-concat'
    difference = again['differences']['dot-concat']['accuracy']
    assert difference['mean'] == pytest.approx(
        again['variants']['dot-concat']['accuracy']['mean'] - figures['accuracy']['mean']
    )


def test_runs_differ_in_three_fields():
    base = att2.get_config()
    config = create_config(base, 'tanh', 'average', 7)
    assert (config.model.compatibility, config.model.combination, config.seed) == ('tanh', 'average', 7)
    restored = create_config(config, base.model.compatibility, base.model.combination, base.seed)
    assert restored.to_dict() == base.to_dict()


def make_rows(labels, patients):
    return [
        Row(f'{p}_{i:04d}.png', label, (0, 0, 9, 9), p, p, i)
        for i, (label, p) in enumerate(zip(labels, patients, strict=True))
    ]


def test_figures_by_hand():
    rows = make_rows([0, 1, 2, 2], ['a', 'b', 'c', 'c'])
    p = np.array([[[0.8, 0.1, 0.1], [0.1, 0.3, 0.6], [0.1, 0.2, 0.7], [0.5, 0.1, 0.4]]])
    mask = np.zeros((4, 4), bool)
    mask[:2, :2] = True
    maps = [np.array([[[[1.0, 0.0], [0.0, 0.0]]]]), np.array([[[[0.25]]]])]
    figures = estimate(Outcome(p, maps), rows, {2: mask}, draw_resamples(3, seed=0))
    assert figures['accuracy'].by_seed == pytest.approx([0.5])
    # One class against the rest, pairs in order: normal 3 of 3, pneumonia 3 of 3, COVID-19 3 of 4 (0.4 is below 0.6).
    assert figures['auc'].by_seed == pytest.approx([(1 + 1 + 3 / 4) / 3])
    # Patient b: 0.6 - 0.3; patient c: (0.5 + 0.3) / 2, above it.
    assert figures['auc_covid19_pneumonia'].by_seed == pytest.approx([1.0])
    assert figures['attention1/pointing'].by_seed == pytest.approx([1.0])
    assert figures['attention2/energy'].by_seed == pytest.approx([0.25])
    assert figures['combined/pointing'].by_seed == pytest.approx([1.0])


def test_two_classes_without_masks():
    rows = make_rows([1, 2], ['b', 'c'])
    p = np.array([[[0.0, 0.6, 0.4], [0.7, 0.1, 0.2]]])
    figures = estimate(Outcome(p, []), rows, {}, draw_resamples(2, seed=0))
    assert figures.keys() == {'accuracy', 'auc', 'auc_covid19_pneumonia'}
    assert figures['auc'].by_seed == pytest.approx([1.0])


def test_masks_lie_in_the_frame_of_the_slices(tmp_path):
    (tmp_path / 'lesion_masks').mkdir()
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 20:40] = 255
    Image.fromarray(mask).save(tmp_path / 'lesion_masks' / 'b_0001.png')
    box = (20, 10, 60, 30)  # its left upper quarter is lesion
    rows = [Row('a_0001.png', 0, box, 'a', 'a', 1), Row('b_0001.png', 1, box, 'b', 'b', 1)]
    masks = load_masks(tmp_path, rows, 8)
    assert masks.keys() == {1}
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = True
    np.testing.assert_array_equal(masks[1], expected)
