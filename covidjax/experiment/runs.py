"""Maps config names to experiments, and loads finished runs."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from covidjax.evaluation.novelty import Novelty, load_novelty
from covidjax.experiment import common, lesions, scans, slices
from covidjax.experiment.config import load_config
from covidjax.models.att2 import Att2
from covidjax.training.checkpoints import open_checkpoints

EXPERIMENTS = {'att2': slices, 'lite': slices, 'seq': scans, 'lesions': lesions}  # by `config.name`


class Run(NamedTuple):
    """A finished run, ready to predict and to export.

    Attributes:
      config: config of the run.
      results: content of results.json.
      rules: content of calibration.json.
      novelty: content of novelty.npz, the usual features; None if the run has no such file.
      slice_model, slice_variables: the slice model and its variables.
      sequence: parameters of the sequence model; None for a slice run.
    """

    config: ConfigDict
    results: dict[str, Any]
    rules: dict[str, Any]
    novelty: Novelty | None
    slice_model: Att2
    slice_variables: dict[str, Any]
    sequence: dict[str, Any] | None

    @property
    def min_slices(self) -> int:
        """Smallest number of slices per scan that the model accepts."""
        return 1 if self.sequence is None else self.config.data.min_slices

    @property
    def variables(self) -> dict[str, Any]:
        """All variables; a scan run has them under 'extractor' and 'sequence'."""
        if self.sequence is None:
            return self.slice_variables
        variables = {kind: {'extractor': leaves} for kind, leaves in self.slice_variables.items()}
        variables['params']['sequence'] = self.sequence
        return variables


def load_run(workdir: Path) -> Run:
    """Loads the best model of a run and the rules that were chosen on validation.

    Raises:
      UserError: the folder is not the workdir of a finished run, or its files are damaged.
    """
    config = load_config(workdir)
    results, rules = (common.load_output(workdir, name) for name in ('results.json', 'calibration.json'))
    with open_checkpoints(workdir) as checkpoints:
        variables = jax.device_get(EXPERIMENTS[config.name].restore_best(config, checkpoints))
    sequence = variables['params'].get('sequence')
    return Run(
        config,
        results,
        rules,
        load_novelty(workdir / 'novelty.npz'),
        slices.create_model(config.model if sequence is None else config.att2.model),
        variables if sequence is None else scans.get_extractor(variables),
        sequence,
    )
