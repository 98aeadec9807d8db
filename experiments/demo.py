"""Log and scale of the notebooks: a demo that fits into a lesson, and one for trials of the notebooks themselves."""

import logging
import os
from pathlib import Path

from ml_collections import ConfigDict

from covidjax import cli

TINY_MODEL = {'stage_sizes': (1, 1), 'width': 4, 'block': 'basic', 'stem': 'small', 'tail_blocks': 1, 'pretrained': ''}


def set_up_log() -> None:
    """Shows messages as main.py does, for which absl's `app.run` makes a handler; a notebook has none."""
    cli.set_up_log()
    logging.basicConfig(format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True)


def share_phantoms(source: Path, workdir: Path) -> None:
    """Lets a workdir use the phantoms of another one, if there are any, instead of drawing the same ones again."""
    if (source / 'phantoms').exists() and not (workdir / 'phantoms').exists():
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / 'phantoms').symlink_to((source / 'phantoms').absolute())


def shorten(config: ConfigDict, num_epochs: int) -> ConfigDict:
    """Returns the config with fewer epochs on phantoms; with a raw directory it stays as it is.

    If COVIDJAX_NOTEBOOK_STEPS is set, a tiny model makes so many training steps on small slices, and a scan model a
    single pass: enough to see whether a notebook runs, not to learn.

    Args:
      config: of configs/att2.py or configs/seq.py.
      num_epochs: on phantoms.
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
