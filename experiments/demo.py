"""Logging and scale of the notebooks: a short demo, and a still shorter run that only tests the notebooks."""

import logging
import os
from pathlib import Path

from ml_collections import ConfigDict

from covidjax import cli

TINY_MODEL = {'stage_sizes': (1, 1), 'width': 4, 'block': 'basic', 'stem': 'small', 'tail_blocks': 1, 'pretrained': ''}


def set_up_log() -> None:
    """Shows log messages as main.py does; a notebook lacks the handler that absl's `app.run` creates."""
    cli.set_up_log()
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)


def share_phantoms(source: Path, workdir: Path) -> None:
    """Links a workdir to the phantoms of another one, if it has any, so that they are not generated again."""
    if (source / 'phantoms').exists() and not (workdir / 'phantoms').exists():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'phantoms').symlink_to((source / 'phantoms').absolute())


def shorten(config: ConfigDict, num_epochs: int) -> ConfigDict:
    """Returns the config with fewer epochs on phantoms; a config with a raw directory stays unchanged.

    If COVIDJAX_NOTEBOOK_STEPS is set, a tiny slice model is trained for so many steps on 64-pixel slices, and a scan
    model for one epoch: enough to test a notebook, not to learn.

    Args:
      config: config of configs/att2.py or configs/seq.py.
      num_epochs: number of epochs on phantoms.
    """
    config = config.copy_and_resolve_references().unlock()
    if not config.data.raw_dir:
        config.train.num_epochs = num_epochs
    steps = os.environ.get('COVIDJAX_NOTEBOOK_STEPS')
    if steps:
        config.data.image_size = 64
        config.train.num_epochs = 1
        if config.name == 'att2':
            config.model.update(TINY_MODEL)
            config.train.steps_per_epoch = int(steps)
    return config.lock()
