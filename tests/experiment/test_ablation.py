import json

import numpy as np
import pytest

from covidjax.configs import att2
from covidjax.data.lesions import LesionSlice
from covidjax.data.lists import Row
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.evaluation.metrics import draw_resamples
from covidjax.experiment.ablation import Outcome, compare, create_config, estimate

SIZE = 32


def create_tiny_config(raw_dir):
    config = att2.get_config(str(raw_dir)).unlock()
    config.data.image_size = SIZE
    config.model.update(
        {'stage_sizes': (1, 1), 'width': 4, 'block': 'basic', 'stem': 'small', 'tail_blocks': 1, 'pretrained': ''}
    )
    config.train.update({'batch_size': 8, 'steps_per_epoch': 2, 'num_epochs': 1, 'augment': 'none'})
    return config.lock()


@pytest.mark.usefixtures('without_pictures')
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
    # Average pooling weights all positions equally.
    chance = comparison['references']['flat map (chance)']
    for score in ('pointing', 'energy', 'map_auc'):
        assert figures[score]['mean'] == pytest.approx(chance[score]['mean'], abs=1e-5)
    report = (output / 'ablation.md').read_text()
    assert '| uniform-concat |' in report
    assert 'energy in lesion' in report

    # Repeated with another variant: finished runs are not trained again.
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
    lesion = LesionSlice('c.png', 'c', 2, np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4), bool), None)
    figures = estimate(Outcome(p, {'pointing': np.array([[0.7]])}), rows, [lesion], draw_resamples(3, seed=0))
    assert figures['accuracy'].by_seed == pytest.approx([0.5])
    # One-vs-rest, pairs in correct order: normal 3 of 3, pneumonia 3 of 3, COVID-19 3 of 4 (0.4 is below 0.6).
    assert figures['auc'].by_seed == pytest.approx([(1 + 1 + 3 / 4) / 3])
    # Patient b: 0.6 - 0.3; patient c: (0.5 + 0.3) / 2, above it.
    assert figures['auc_covid19_pneumonia'].by_seed == pytest.approx([1.0])
    assert figures['pointing'].by_seed == pytest.approx([0.7])
    # Resamples without patient c have no lesion.
    drawn = draw_resamples(3, seed=0)[:, 2] > 0
    np.testing.assert_allclose(figures['pointing'].resampled, np.where(drawn, 0.7, np.nan))


def test_two_classes_without_masks():
    rows = make_rows([1, 2], ['b', 'c'])
    p = np.array([[[0.0, 0.6, 0.4], [0.7, 0.1, 0.2]]])
    figures = estimate(Outcome(p, {}), rows, [], draw_resamples(2, seed=0))
    assert figures.keys() == {'accuracy', 'auc', 'auc_covid19_pneumonia'}
    assert figures['auc'].by_seed == pytest.approx([1.0])
