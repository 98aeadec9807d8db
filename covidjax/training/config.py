"""What a config must satisfy."""

from typing import Any

from ml_collections import ConfigDict

from covidjax.errors import UserError
from covidjax.models.att2 import COMBINATIONS
from covidjax.models.attention import COMPATIBILITIES
from covidjax.models.resnet import BLOCKS
from covidjax.training.optim import DECAYS, SCHEDULES

_AT_LEAST = {
    'seed': 0,
    'data.image_size': 32,
    'data.phantom_seed': 0,
    'model.width': 1,
    'model.tail_blocks': 1,
    'train.batch_size': 1,
    'train.steps_per_epoch': 1,
    'train.num_epochs': 1,
    'train.patience': 1,
    'train.min_delta': 0,
    'train.warmup_steps': 0,
    'train.weight_decay': 0,
}
_ONE_OF = {
    'model.block': tuple(BLOCKS),
    'model.stem': ('imagenet', 'small'),
    'model.compatibility': COMPATIBILITIES,
    'model.combination': COMBINATIONS,
    'train.schedule': SCHEDULES,
    'train.decay': DECAYS,
}


def flatten_config(config: ConfigDict) -> dict[str, Any]:
    """Returns {'data.image_size': 64, ...} with JSON-able values."""
    return {
        f'{section}.{key}' if section else key: list(value) if isinstance(value, tuple) else value
        for section, fields in [('', {k: v for k, v in config.items() if not isinstance(v, ConfigDict)})]
        + [(k, v) for k, v in config.items() if isinstance(v, ConfigDict)]
        for key, value in fields.items()
    }


def check_config(config: ConfigDict) -> None:
    """Checks the range of every field.

    Raises:
      UserError: values out of range; all of them are listed.
    """
    flat = flatten_config(config)
    problems = [
        f'{name}={flat[name]} must be at least {least}' for name, least in _AT_LEAST.items() if flat[name] < least
    ]
    problems += [
        f'{name}={flat[name]!r} must be one of {", ".join(choices)}'
        for name, choices in _ONE_OF.items()
        if flat[name] not in choices
    ]
    if not flat['train.learning_rate'] > 0:
        problems.append(f'train.learning_rate={flat["train.learning_rate"]} must be above 0')
    if len(flat['model.stage_sizes']) < 2 or min(flat['model.stage_sizes']) < 1:
        problems.append(f'model.stage_sizes={flat["model.stage_sizes"]} must be two or more positive numbers')
    if problems:
        raise UserError('config: ' + '; '.join(problems))
