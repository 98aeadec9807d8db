"""The scale of the notebooks: a demo that fits into a lesson, and one for trials of the notebooks themselves."""

import os

from ml_collections import ConfigDict


def shorten(config: ConfigDict, num_epochs: int) -> ConfigDict:
    """Returns the config with fewer epochs on phantoms; with a raw directory it stays as it is.

    COVIDJAX_NOTEBOOK_STEPS, if set, is the number of training steps of a slice model, and a single epoch is all that
    any model gets: enough to see whether a notebook runs, not to learn.

    Args:
      config: of configs/att2.py or configs/seq.py.
      num_epochs: on phantoms.
    """
    config = config.copy_and_resolve_references().unlock()
    if not config.data.raw_dir:
        config.train.num_epochs = num_epochs
    steps = os.environ.get('COVIDJAX_NOTEBOOK_STEPS')
    if steps:
        config.train.num_epochs = 1
        if 'steps_per_epoch' in config.train:
            config.train.steps_per_epoch = int(steps)
    return config.lock()
