import json

import pytest

from covidjax.configs import att2, lite, seq
from covidjax.errors import UserError
from covidjax.experiment.config import check_config, check_workdir, flatten_config, load_config, save_config
from covidjax.experiment.workdir import lock_workdir
from covidjax.files import write_json


def test_paper_values():
    train = att2.get_config('/data').train
    assert (train.learning_rate, train.batch_size, train.steps_per_epoch) == (5e-4, 64, 1000)
    assert (train.num_epochs, train.patience, train.weight_decay) == (25, 5, 0)
    train = seq.get_config('/data').train
    assert (train.learning_rate, train.batch_size, train.weight_decay) == (1e-4, 16, 5e-3)
    assert (train.num_epochs, train.patience, train.decay) == (50, 10, 'decoupled')


@pytest.mark.parametrize('module', [att2, lite, seq])
@pytest.mark.parametrize('raw_dir', ['', '/data'])
def test_shipped_configs_are_valid_and_locked(module, raw_dir):
    config = module.get_config(raw_dir)
    check_config(config)
    assert config.data.raw_dir == raw_dir
    with pytest.raises(AttributeError, match='batchsize'):
        config.train.batchsize = 3


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('train.batch_size', -1, 'train.batch_size=-1 must be at least 1'),
        ('train.learning_rate', 0.0, 'must be above 0'),
        ('train.learning_rate', float('nan'), 'must be above 0'),
        ('model.compatibility', 'cosine', 'additive, dot, tanh'),
        ('model.stage_sizes', (2,), 'two or more'),
        ('data.min_slices', 17, 'at most 16'),
        ('data.region', 'heart', 'body, lungs'),
        ('model.backbone', 'vgg', 'efficientnet_lite0'),
        ('model.dropout', 1.0, 'model.dropout=1.0 must be from 0 to below 1'),
        ('train.ema_decay', -0.1, 'train.ema_decay=-0.1 must be'),
        ('train.scale', (1.2, 0.8), 'the lower first'),
        ('data.cached_draws', -1, 'data.cached_draws=-1 must be at least 0'),
        ('att2.train.batch_size', 0, 'att2.train.batch_size=0 must be at least 1'),
    ],
)
def test_bad_values_are_named(field, value, message):
    config = (seq if field.startswith(('att2', 'data.min', 'data.cached')) else att2).get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_attention_loss_needs_outlines_of_slices_that_divide():
    config = att2.get_config('/data')
    config.train.attention_loss, config.data.image_size = 1.0, 75
    with pytest.raises(UserError, match=r'needs data\.outlines.*; .* a multiple of 4'):
        check_config(config)
    config = att2.get_config()
    config.train.attention_loss = 1.0
    check_config(config)  # phantoms have outlines


def test_all_bad_values_are_listed():
    config = att2.get_config()
    config.train.batch_size, config.data.image_size = 0, 3
    with pytest.raises(UserError, match=r'data\.image_size=3 .*; train\.batch_size=0 '):
        check_config(config)


def test_saved_config_comes_back(tmp_path):
    config = seq.get_config('/data')
    save_config(tmp_path, config)
    assert flatten_config(load_config(tmp_path)) == flatten_config(config)
    check_workdir(tmp_path, config)  # the same config is accepted


def test_other_config_is_refused_with_its_differences(tmp_path):
    save_config(tmp_path, att2.get_config())
    other = att2.get_config()
    other.train.batch_size, other.data.prepared_dir = 8, '/elsewhere'
    with pytest.raises(UserError, match=r'\(train\.batch_size was 32, now 8\)'):
        check_workdir(tmp_path, other)


def test_workdir_of_another_experiment_is_refused(tmp_path):
    save_config(tmp_path, att2.get_config())
    with pytest.raises(UserError, match="name was 'att2', now 'seq'"):
        check_workdir(tmp_path, seq.get_config())


@pytest.mark.parametrize(('content', 'message'), [(None, 'not the workdir of a run'), ('{"name": ', 'unreadable')])
def test_missing_or_damaged_config(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_config_is_readable_json(tmp_path):
    save_config(tmp_path, att2.get_config())
    assert json.loads((tmp_path / 'config.json').read_text())['model']['stage_sizes'] == [1, 1, 1, 1]


def test_second_run_in_a_workdir_is_refused(tmp_path):
    with lock_workdir(tmp_path / 'run'), pytest.raises(UserError, match='another run'), lock_workdir(tmp_path / 'run'):
        pass
    with lock_workdir(tmp_path / 'run'):
        pass  # free again


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write'), lock_workdir(tmp_path / 'file'):
        pass


@pytest.mark.parametrize('module', [att2, seq])
def test_a_config_of_an_earlier_version_gets_the_later_fields(tmp_path, module):
    config = module.get_config('/data')
    old = config.to_dict()
    of_slices = old if module is att2 else old['att2']
    for section, names in (
        (old['data'], ('region', 'outlines')),
        (of_slices['model'], ('backbone', 'dropout', 'mirror')),
        (of_slices['train'], ('scale', 'brightness', 'contrast', 'label_smoothing', 'ema_decay', 'attention_loss')),
    ):
        for name in names:
            del section[name]
    if module is seq:
        del old['model']['head'], old['train']['ema_decay']
    write_json(tmp_path / 'config.json', old)
    assert flatten_config(load_config(tmp_path)) == flatten_config(config)
    check_workdir(tmp_path, config)  # the same run
