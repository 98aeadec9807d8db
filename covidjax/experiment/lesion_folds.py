"""The lesion model of a fold that leaves sources out: one that has not seen them, or is trained without them."""

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
from ml_collections import ConfigDict

from covidjax.audit.overlap import Pictures, find_shared_pictures, measure_prepared
from covidjax.data.masked import read_masked
from covidjax.data.sources import parse_sources
from covidjax.errors import UserError, join_faults
from covidjax.experiment import common, lesions
from covidjax.experiment.config import load_config
from covidjax.models.lesion_weights import BOX, holds_lesion_weights

log = logging.getLogger(__name__)

FOLDER = 'lesions'  # in the workdir of a fold, the run of its lesion model


def read_seen_sources(name: str) -> set[str]:
    """Returns the sources that a lesion model was trained, validated or tested on, those of its start included.

    Args:
      name: see `lesions.load_lesions`.

    Raises:
      UserError: the model records no sources.
    """
    path = BOX if name == 'box' else Path(name).expanduser()
    if path.suffix != '.safetensors':
        config = load_config(path)
        seen = set(common.load_output(path, 'results.json')['dataset']['sources'])
        start = lesions.find_start(config.model.pretrained)
        return seen | (read_seen_sources(str(start)) if start and holds_lesion_weights(start) else set())
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            return set(json.loads((file.metadata() or {})['sources']))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f'config.lesions={name} does not say which sources it has seen: name the workdir of a run of '
            'configs/lesions.py'
        ) from error


def plan_lesions(name: str, left_out: Collection[str]) -> ConfigDict | None:
    """Returns the config of the lesion model to train for a fold; None if the given one has not seen its sources.

    Args:
      name: `config.lesions` of a cross-validation.
      left_out: sources that the fold leaves out.

    Raises:
      UserError: the given model has seen them and can't be trained without them.
    """
    seen = read_seen_sources(name) & set(left_out)
    if not seen:
        return None
    shown = ', '.join(sorted(seen))
    if name == 'box' or name.endswith('.safetensors'):
        raise UserError(
            f'config.lesions={name} has seen {shown}, which a fold leaves out: name the workdir of a run of '
            'configs/lesions.py, whose model every fold then trains without its sources'
        )
    config = load_config(Path(name).expanduser()).copy_and_resolve_references().unlock()
    start = lesions.find_start(config.model.pretrained)
    if start and holds_lesion_weights(start) and read_seen_sources(str(start)) & set(left_out):
        raise UserError(
            f'config.lesions={name} started from {config.model.pretrained}, which has seen {shown}: train one that '
            'starts from ImageNet'
        )
    every = parse_sources(config.data.sources) or common.load_output(Path(name), 'results.json')['dataset']['sources']
    config.data.sources = ','.join(source for source in every if source not in left_out)
    if not config.data.sources:
        raise UserError(f'config.lesions={name} has no sources but {shown}, which a fold leaves out: add others')
    return config.lock()


def train_lesions(config: ConfigDict, workdir: Path, held_out: Pictures, fold: str) -> dict[str, Any]:
    """Trains the lesion model of a fold, or resumes its run, and returns its results.

    Args:
      config: of the lesion model, see `plan_lesions`.
      workdir: of its run.
      held_out: pictures of the patients that the fold holds out.
      fold: its name, for messages.

    Raises:
      UserError: pictures that the fold holds out are among those to train on, under another source.
    """
    if not (workdir / 'config.json').exists():
        folders = [Path(name).expanduser() for name in config.data.raw_dir.split(',') if name]
        data = read_masked(folders, config.data.image_size, parse_sources(config.data.sources))
        pictures = measure_prepared(
            (row.name, record['image'][..., 0])
            for split, rows in data.rows.items()
            for row, record in zip(rows, data.sources[split], strict=True)
        )
        shared = find_shared_pictures(pictures, held_out)
        if shared:
            raise UserError(
                f'{fold}: pictures that it holds out are among the outlined slices: {join_faults(shared)}: leave '
                'them out of one side'
            )
    log.info('%s: its lesion model, trained on %s', fold, config.data.sources)
    return lesions.train(config, workdir)
