"""The config of a run: the range of every field; saved in the workdir, read back and compared."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from covidjax.data.balance import BALANCES
from covidjax.data.preprocess import REGIONS
from covidjax.data.sequences import NUM_SLICES
from covidjax.errors import UserError
from covidjax.files import write_json
from covidjax.models.att2 import BACKBONES, COMBINATIONS
from covidjax.models.attention import COMPATIBILITIES, NEED_GLOBAL_FEATURE
from covidjax.models.ct_weights import ASTRA, STAGE_SIZES
from covidjax.models.lesions import STRIDE
from covidjax.models.resnet import BLOCKS
from covidjax.models.seq import HEADS
from covidjax.training.augment import AUGMENTATIONS
from covidjax.training.devices import PARALLELISMS
from covidjax.training.hosts import is_first
from covidjax.training.optimizer import DECAYS, SCHEDULES

# These fields do not change the results.
_MAY_DIFFER = ('data.prepared_dir', 'train.checkpoint_steps', 'att2.train.checkpoint_steps')
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
    'train.attention_loss': 0,
}
_BELOW_1 = ('model.dropout', 'train.label_smoothing', 'train.ema_decay')  # from 0
_ONE_OF = {
    'data.balance': BALANCES,
    'data.region': REGIONS,
    'model.backbone': BACKBONES,
    'model.head': tuple(HEADS),
    'model.block': tuple(BLOCKS),
    'model.stem': ('imagenet', 'small'),
    'model.compatibility': COMPATIBILITIES,
    'model.combination': COMBINATIONS,
    'train.schedule': SCHEDULES,
    'train.augment': AUGMENTATIONS,
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
    'data': {'region': 'body', 'sources': '', 'balance': 'none', 'outlines': ''},
    'model': {'backbone': 'resnet', 'dropout': 0.0, 'mirror': False, 'frozen': False, 'pooled': False},
    'train': {'scale': (0.9, 1.1), 'brightness': 0.0, 'contrast': 0.0, 'label_smoothing': 0.0, 'ema_decay': 0.0},
}
_LATER_IN_SLICES = {'attention_loss': 0.0}  # of section train


def add_later_fields(config: ConfigDict) -> None:
    """Adds the fields that a config saved by an earlier version lacks."""
    if config.name == 'lesions':
        return
    of_slices = config.att2 if 'att2' in config else config
    _add(config, {'lesions': ''})
    if of_slices is not config:
        _add(config.model, {'head': 'lstm'})
        _add(config.train, _LATER['train'])
    _add(config.data, _LATER['data'])
    _add(of_slices.model, _LATER['model'])
    _add(of_slices.train, _LATER['train'])
    _add(of_slices.train, _LATER_IN_SLICES)
    for train in (config.train, of_slices.train):
        if isinstance(train.augment, bool):
            with config.ignore_type():
                train.augment = 'paper' if train.augment else 'none'


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
        if config.name == 'lesions' and rule == 'data.image_size' and value % 32:
            problems.append(f'{name}={value} must be a multiple of 32')
        if rule == 'train.scale' and not (len(value) == 2 and 0 < value[0] <= value[1]):
            problems.append(f'{name}={value} must be two numbers above 0, the lower first')
        if rule == 'train.learning_rate' and not value > 0:
            problems.append(f'{name}={value} must be above 0')
        if rule == 'model.stage_sizes' and (len(value) < 2 or min(value) < 1):
            problems.append(f'{name}={value} must be two or more positive numbers')
        if rule == 'model.pretrained' and value == ASTRA:
            problems += _check_astra(name, flatten_config(config))
        if rule == 'model.frozen' and value:
            problems += _check_frozen(name, flatten_config(config))
        if rule == 'model.pooled' and value:
            compatibility = flatten_config(config)[name.replace('pooled', 'compatibility')]
            if compatibility in NEED_GLOBAL_FEATURE:
                problems.append(f'{name}=True has no map for the global feature of compatibility {compatibility!r}')
        if rule == 'data.min_slices' and value > NUM_SLICES:
            problems.append(f'{name}={value} must be at most {NUM_SLICES}')
    of_slices = config.att2 if 'att2' in config else config
    if of_slices.train.get('attention_loss'):
        if config.data.raw_dir and not config.data.outlines:
            problems.append('train.attention_loss needs data.outlines, the folders of the outlined slices')
        if config.data.image_size % STRIDE:
            problems.append(f'train.attention_loss needs a data.image_size that is a multiple of {STRIDE}')
        if of_slices.model.frozen:
            problems.append('train.attention_loss needs images, and model.frozen keeps their features only')
    if problems:
        raise UserError('config: ' + '; '.join(problems))


def _check_astra(name: str, flat: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the other fields of a config whose field `name` asks for Astra's weights."""
    section = name.removesuffix('pretrained')
    wanted = {
        'backbone': 'resnet',
        'stage_sizes': list(STAGE_SIZES),
        'width': 64,
        'block': 'bottleneck',
        'stem': 'imagenet',
    }
    wrong = [f'{section}{field}={value}' for field, value in wanted.items() if flat.get(section + field) != value]
    return [f'{name}={ASTRA} is a ResNet-152: it needs {" ".join(wrong)}'] if wrong else []


def _check_frozen(name: str, flat: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the other fields of a config whose field `name` freezes the backbone."""
    section = name.removesuffix('model.frozen')
    problems = []
    if not flat[f'{section}model.pretrained']:
        problems.append(f'{name}=True needs weights to freeze: set {section}model.pretrained')
    if section:
        if not flat['extractor']:
            problems.append(f'{name}=True: train the slice model first and pass it as --config.extractor')
    elif flat['train.augment'] != 'none':
        problems.append(f'{name}=True computes features once, of unchanged slices: set train.augment=none')
    return problems


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a workdir is new or belongs to the same config.

    Raises:
      UserError: the workdir holds a run with another config; the differences are listed.
    """
    if not (workdir / 'config.json').exists():
        return
    flat, saved = flatten_config(config), flatten_config(load_config(workdir))
    differences = [
        f'{name} was {saved.get(name, "absent")!r}, now {flat.get(name, "absent")!r}'
        for name in sorted(saved.keys() | flat.keys())
        if saved.get(name) != flat.get(name) and name not in _MAY_DIFFER
    ]
    if differences:
        raise UserError(
            f'{workdir} holds a run with another config ({"; ".join(differences)}): choose another --workdir, or '
            'pass the same fields again'
        )


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Saves the config of a run.

    Call it after loading the data, so that a mistyped command does not claim the workdir.
    """
    if is_first():
        write_json(workdir / 'config.json', config.to_dict())


def load_config(workdir: Path) -> ConfigDict:
    """Returns the config saved in a workdir.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / 'config.json'
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f'{workdir} is not the workdir of a run (it has no config.json)') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is unreadable ({error}): put a copy back, or choose another --workdir') from error
    add_later_fields(config)
    return config.lock()
