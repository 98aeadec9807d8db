import functools
import types

import jax
import numpy as np
import optax
import pytest

from covidjax.configs import seq
from covidjax.data.lists import Row
from covidjax.data.sequences import group_scans, locate_slices
from covidjax.errors import UserError
from covidjax.experiment import common, scans, slices
from covidjax.experiment.embeddings import compute_embeddings
from covidjax.models.att2 import normalise
from covidjax.training.augment import AugmentOptions, augment
from covidjax.training.checkpoints import open_checkpoints
from covidjax.training.devices import compile_step
from covidjax.training.state import create_train_state
from tests.variables import draw_variables

SIZE = 32
TINY = {
    'data.image_size': SIZE,
    'data.min_slices': 2,
    'att2.model.stage_sizes': (1, 1),
    'att2.model.width': 4,
    'model.hidden': 4,
    'train.batch_size': 2,
    'train.num_epochs': 3,
    'train.schedule': 'constant',
    'train.learning_rate': 0.01,
}
TIMINGS = ('seconds', 'val_seconds', 'examples_per_second')


class Records(list):
    """A list of records that counts reads."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def make_split(counts, seed):
    """Returns rows and records of scans with these slice counts; images are grey blocks that depend on the class."""
    rng = np.random.default_rng(seed)
    rows = [
        Row(f's{s}_{i:04d}.png', s % 3, (0, 0, 9, 9), f's{s}', f'p{s}', i)
        for s, n in enumerate(counts)
        for i in range(n)
    ]
    fields = [rng.integers(20 * row.label, 200 + 20 * row.label, (4, 4), dtype=np.uint8) for row in rows]
    images = [np.kron(field, np.ones((SIZE // 4, SIZE // 4), np.uint8))[..., None] for field in fields]
    return rows, Records({'image': image, 'label': row.label} for row, image in zip(rows, images, strict=True))


def make_data():
    splits = {'train': make_split([3, 5, 2, 16, 4], 0), 'val': make_split([2, 9, 3], 1), 'test': make_split([2], 2)}
    return types.SimpleNamespace(
        rows={split: rows for split, (rows, _) in splits.items()},
        sources={split: source for split, (_, source) in splits.items()},
    )


def make_config(**changes):
    config = seq.get_config()
    config.update_from_flattened_dict({**TINY, **{name.replace('__', '.'): value for name, value in changes.items()}})
    return config


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
    """Returns a slice model, its variables, and the workdir of a run that has it as its best model."""
    workdir = tmp_path_factory.mktemp('extractor')
    model = slices.create_model(make_config().att2.model)
    variables = draw_variables(model, np.zeros((1, SIZE, SIZE, 1), np.float32), train=False, full=True)
    variables = jax.tree.map(jax.numpy.asarray, variables)
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save_best(1, create_train_state(variables, optax.sgd(0.1), jax.random.key(0)))
    return model, variables, workdir


compiled = {}  # steps by what they depend on: equal runs share one, compiled once


def run(workdir, extractor_dir, data=None, **changes):
    """Returns the history without timings and the variables of the best epoch."""
    config = make_config(**changes)
    key = tuple(sorted((name, value) for name, value in changes.items() if name != 'train__num_epochs'))

    def compile_once(*arguments):
        if key not in compiled:
            compiled[key] = compile_step(*arguments)
        return compiled[key]

    with open_checkpoints(workdir) as checkpoints, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, 'compile_step', compile_once)
        experiment = scans.create_experiment(config, data or make_data(), extractor_dir)
        history = common.fit(experiment, checkpoints, workdir)
        variables = scans.restore_best(config, checkpoints)
    return [{name: value for name, value in e.items() if name not in TIMINGS} for e in history], variables


@pytest.fixture(scope='module')
def data():
    return make_data()


@pytest.fixture(scope='module')
def cached(extractor, data, tmp_path_factory):
    return run(tmp_path_factory.mktemp('cached'), extractor[2], data, data__cached_draws=2)


def test_without_augmentation_a_cached_run_is_the_uncached_one(extractor, tmp_path):
    plain, plain_variables = run(tmp_path / 'plain', extractor[2], train__augment='none')
    history, variables = run(tmp_path / 'cached', extractor[2], train__augment='none', data__cached_draws=3)
    assert len(history) == 3
    for one, other in zip(plain, history, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    # The trees are equal too: a cached run is saved, tested and exported like any other.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), variables, plain_variables)


def test_draws_are_those_of_their_keys(extractor):
    model, variables, _ = extractor
    rows, source = make_split([3, 17, 2], 0)
    chosen, key = group_scans(rows), jax.random.key(5)

    def compute(num_draws, key=key):
        options = {'batch_size': 2, 'dtype': 'float32', 'title': 'embeddings'}
        options['augmentation'] = None if key is None else AugmentOptions()
        return compute_embeddings(model, variables, source, chosen, key=key, num_draws=num_draws, **options)

    embeddings = compute(3)
    assert embeddings.shape == (3, 22, 4 + 8)  # widths of the two stages
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(compute(3), embeddings)
    np.testing.assert_array_equal(compute(1), embeddings[:1])

    with pytest.raises(UserError, match=r'1000000000000 draws, need 1,056,000,000 MB .*cached_draws'):
        compute(10**12)

    # One draw by hand: all slices of a scan share it.
    draw, scan = 1, 2
    for number in (2**32 - 1, draw, scan):
        key = jax.random.fold_in(key, number)
    images = np.concatenate([source[record]['image'] for record in chosen[scan].records], axis=-1)
    augment_scan = jax.jit(functools.partial(augment, options=AugmentOptions()))
    augmented = augment_scan(key, np.float32(images) / 255).transpose(2, 0, 1)[..., None]
    embed = jax.jit(functools.partial(model.apply, train=False))
    expected = embed(variables, normalise(255 * augmented)).embedding
    place = locate_slices(chosen)[scan]
    np.testing.assert_allclose(embeddings[draw, place], expected, atol=1e-5)

    plain = compute(1, key=None)[0]
    for a, b in ((embeddings[0], embeddings[1]), (embeddings[1], embeddings[2]), (embeddings[0], plain)):
        assert all(np.abs(a[place] - b[place]).max() > 1e-3 for place in locate_slices(chosen))


def test_extractor_stays_and_the_rest_is_trained(extractor, cached):
    _, variables = cached
    for name in ('params', 'batch_stats'):
        jax.tree.map(np.testing.assert_array_equal, variables[name]['extractor'], extractor[1][name])
    assert len({entry['train_loss'] for entry in cached[0]}) == 3


def test_resumed_run_ends_the_same_bit_for_bit_whatever_became_of_the_extractor(extractor, cached, tmp_path):
    run(tmp_path, extractor[2], data__cached_draws=2, train__num_epochs=1)
    history, variables = run(tmp_path, tmp_path / 'gone', data__cached_draws=2)
    assert history == cached[0]
    jax.tree.map(np.testing.assert_array_equal, variables, cached[1])


def test_every_image_is_read_once(data, cached):
    assert len(cached[0]) == 3  # epochs
    # In addition, the first record is read once per batch of two scans for its size.
    assert {split: data.sources[split].reads for split in ('train', 'val')} == {'train': 30 + 3, 'val': 14 + 2}
