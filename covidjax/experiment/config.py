"""Checks of a config: the range of every field."""

from typing import Any

from ml_collections import ConfigDict

from covidjax.data.preprocess import REGIONS
from covidjax.data.sequences import NUM_SLICES
from covidjax.errors import UserError
from covidjax.models.att2 import BACKBONES, COMBINATIONS
from covidjax.models.attention import COMPATIBILITIES
from covidjax.models.resnet import BLOCKS
from covidjax.models.seq import HEADS
from covidjax.training.devices import PARALLELISMS
from covidjax.training.optimizer import DECAYS, SCHEDULES

_AT_LEAST = {
    'seed': 0,
    'data.image_size': 32,
    'data.phantom_seed': 0,
    'data.min_slices': 1,
    'data.cached_draws': 0,
    'model.hidden': 1,
    'model.width': 1,
    'model.tail_blocks': 1,
    'train.batch_size': 1,
    'train.steps_per_epoch': 0,
    'train.num_epochs': 1,
    'train.patience': 1,
    'train.min_delta': 0,
    'train.warmup_steps': 0,
    'train.checkpoint_steps': 0,
    'train.accumulation_steps': 1,
    'train.weight_decay': 0,
    'train.brightness': 0,
    'train.contrast': 0,
}
_BELOW_1 = ('model.dropout', 'train.label_smoothing', 'train.ema_decay')  # from 0
_ONE_OF = {
    'data.region': REGIONS,
    'model.backbone': BACKBONES,
    'model.head': tuple(HEADS),
    'model.block': tuple(BLOCKS),
    'model.stem': ('imagenet', 'small'),
    'model.compatibility': COMPATIBILITIES,
    'model.combination': COMBINATIONS,
    'train.schedule': SCHEDULES,
    'train.decay': DECAYS,
    'train.dtype': ('float32', 'bfloat16'),
    'train.parallelism': PARALLELISMS,
}


def flatten_config(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
    """Returns {'data.image_size': 64, ...} with JSON-serialisable values."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten_config(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


# Fields that configs of earlier versions lack, with the values that those runs were made with.
_LATER = {
    'data': {'region': 'body'},
    'model': {'backbone': 'resnet', 'dropout': 0.0, 'mirror': False},
    'train': {'scale': (0.9, 1.1), 'brightness': 0.0, 'contrast': 0.0, 'label_smoothing': 0.0, 'ema_decay': 0.0},
}


def add_later_fields(config: ConfigDict) -> None:
    """Adds the fields that a config saved by an earlier version lacks."""
    of_slices = config.att2 if 'att2' in config else config
    if of_slices is not config:
        _add(config.model, {'head': 'lstm'})
        _add(config.train, _LATER['train'])
    _add(config.data, _LATER['data'])
    _add(of_slices.model, _LATER['model'])
    _add(of_slices.train, _LATER['train'])


def _add(section: ConfigDict, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name not in section:
            section[name] = value


def check_config(config: ConfigDict) -> None:
    """Checks the range of every field; fields under 'att2' follow the rules of the slice experiment.

    Raises:
      UserError: values out of range; all of them are listed.
    """
    problems = []
    for name, value in flatten_config(config).items():
        rule = name.removeprefix('att2.')
        if rule in _AT_LEAST and value < _AT_LEAST[rule]:
            problems.append(f'{name}={value} must be at least {_AT_LEAST[rule]}')
        if rule in _ONE_OF and value not in _ONE_OF[rule]:
            problems.append(f'{name}={value!r} must be one of {", ".join(_ONE_OF[rule])}')
        if rule in _BELOW_1 and not 0 <= value < 1:
            problems.append(f'{name}={value} must be from 0 to below 1')
        if rule == 'train.scale' and not (len(value) == 2 and 0 < value[0] <= value[1]):
            problems.append(f'{name}={value} must be two numbers above 0, the lower first')
        if rule == 'train.learning_rate' and not value > 0:
            problems.append(f'{name}={value} must be above 0')
        if rule == 'model.stage_sizes' and (len(value) < 2 or min(value) < 1):
            problems.append(f'{name}={value} must be two or more positive numbers')
        if rule == 'data.min_slices' and value > NUM_SLICES:
            problems.append(f'{name}={value} must be at most {NUM_SLICES}')
    if problems:
        raise UserError('config: ' + '; '.join(problems))
