"""Maps config names to experiments, and loads finished runs and ensembles of them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from covidjax.errors import UserError
from covidjax.evaluation.home import Home, compute_distances, load_home
from covidjax.evaluation.novelty import Novelty, compute_novelty, load_novelty
from covidjax.evaluation.outputs import SliceOutputs, compute_outputs
from covidjax.evaluation.sick import SickRule, parse_rule
from covidjax.experiment import common, lesions, scans, slices
from covidjax.experiment.config import load_config
from covidjax.experiment.lesions import load_lesions
from covidjax.experiment.workdir import list_folds
from covidjax.models.att2 import Att2
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import LesionModel
from covidjax.training.checkpoints import open_checkpoints

EXPERIMENTS = {'att2': slices, 'lite': slices, 'ct': slices, 'seq': scans, 'lesions': lesions}  # by `config.name`


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a run.

    Attributes:
      slice_model, slice_variables: the slice model and its variables.
      sequence: parameters of the sequence model; None for a slice run.
      novelty: the usual features; None if there are no such statistics.
      home: those of every source; None if none is known.
      temperature: divisor of its logits before they are averaged with those of other members; 1 for a single model.
    """

    slice_model: Att2
    slice_variables: dict[str, Any]
    sequence: dict[str, Any] | None
    novelty: Novelty | None
    temperature: float = 1.0
    home: Home | None = None

    @functools.cached_property
    def folded(self) -> dict[str, Any]:
        """Variables of the slice model for evaluation mode, on the device (see `folding.fold_batch_norm`)."""
        return jax.device_put(fold_batch_norm(self.slice_variables))

    @property
    def variables(self) -> dict[str, Any]:
        """All variables; a scan run has them under 'extractor' and 'sequence'."""
        if self.sequence is None:
            return self.slice_variables
        variables = {kind: {'extractor': leaves} for kind, leaves in self.slice_variables.items()}
        variables['params']['sequence'] = self.sequence
        return variables


class Run(NamedTuple):
    """A finished run or cross-validation, ready to predict and to export.

    The logits of the members, each divided by the member's temperature, are averaged. `rules` apply to the average. So
    the evidence, which is linear in the logits, averages to the exact shares in the logits of the ensemble.

    Attributes:
      config: config of the run.
      results: content of results.json.
      rules: content of calibration.json.
      members: one model, or those of the folds; all have the same architecture. Empty for a lesion model alone, which
        knows no classes.
      lesions: the model that outlines lungs and lesions; None if the run has none.
    """

    config: ConfigDict
    results: dict[str, Any]
    rules: dict[str, Any]
    members: tuple[Member, ...]
    lesions: LesionModel | None = None

    @property
    def is_scan_run(self) -> bool:
        """Whether a sequence model classifies whole scans."""
        return bool(self.members) and self.members[0].sequence is not None

    @property
    def min_slices(self) -> int:
        """Smallest number of slices per scan that the model accepts."""
        return self.config.data.min_slices if self.is_scan_run else 1

    @property
    def slice_model(self) -> Att2:
        """The slice model of every member."""
        return self.members[0].slice_model

    @property
    def temperature(self) -> float:
        """Divisor of the averaged logits for calibrated probabilities; with lesions, of the joined ones."""
        return self.rules['temperature']

    @property
    def classifier_temperature(self) -> float:
        """Divisor of the classifier's own averaged logits."""
        return self.rules['sick']['classifier_temperature'] if self.lesions else self.temperature

    @property
    def sick_rule(self) -> SickRule:
        """The rule by which lesions tell sick from normal, of a run with classes and lesions; see `parse_rule`."""
        return parse_rule(self.rules['sick'])


def load_run(workdir: Path | None) -> Run:
    """Loads the best model of a run, or those of all folds, and the rules chosen on validation or out-of-fold examples.

    Args:
      workdir: of a finished run or cross-validation, also of a lesion model; None for the lesion model that comes with
        this package.

    Raises:
      UserError: the folder is not the workdir of a finished run, or its files are damaged.
    """
    config = None if workdir is None else load_config(workdir)
    if config is None or config.name == 'lesions':
        return create_lesion_run(load_lesions('box' if workdir is None else str(workdir)))
    results, rules = (common.load_output(workdir, name) for name in ('results.json', 'calibration.json'))
    folds = list_folds(workdir)
    if folds and config.get('lesions'):
        raise UserError(
            f'{workdir} tests a recipe: each of its folds has a lesion model and a rule of its own. Pass '
            f'--workdir={folds[0]}, or train a run with --config.lesions={config.lesions}'
        )
    outlining = load_lesions(config.lesions) if config.get('lesions') else None
    if outlining is not None:
        check_lesions(outlining, rules, workdir)
    if not folds:
        return Run(config, results, rules, (_load_member(config, workdir),), outlining)
    members = []
    for folder in folds:
        temperature = common.load_output(folder, 'calibration.json')['temperature']
        members.append(dataclasses.replace(_load_member(config, folder), temperature=temperature))
    return Run(config, results, rules, tuple(members), outlining)


def create_lesion_run(outlining: LesionModel) -> Run:
    """Returns a run without classes: it outlines lungs and lesions."""
    config = ConfigDict({'name': 'lesions', 'data': {'image_size': outlining.image_size, 'region': 'body'}})
    title = f'{lesions.TITLE}, {Path(outlining.name).name}'
    results = {'model': title, 'data': outlining.data, 'notice': outlining.notice}
    return Run(config, results, {}, (), outlining)


def check_lesions(outlining: LesionModel, rules: dict[str, Any], workdir: Path) -> None:
    """Checks that the lesion model is the one that the rules of a run were fitted with.

    Raises:
      UserError: it is another one.
    """
    if rules.get('sick', {}).get('digest') != outlining.digest:
        raise UserError(
            f'{workdir} was tested with another lesion model than {outlining.name} is now: run --mode=evaluate to fit '
            'its rules again'
        )


def _load_member(config: ConfigDict, workdir: Path) -> Member:
    with open_checkpoints(workdir) as checkpoints:
        variables = jax.device_get(EXPERIMENTS[config.name].restore_best(config, checkpoints))
    sequence = variables['params'].get('sequence')
    return Member(
        slices.create_model(config.model if sequence is None else config.att2.model),
        variables if sequence is None else scans.get_extractor(variables),
        sequence,
        load_novelty(workdir / 'novelty.npz'),
        home=load_home(workdir / 'sources.npz'),
    )


def compute_member_outputs(run: Run, images: np.ndarray) -> tuple[SliceOutputs, ...]:
    """Returns the outputs of every member for images uint8 [N, S, S, 1], N at least 1."""
    return tuple(compute_outputs(m.slice_model, m.folded, images) for m in run.members)


def average_outputs(run: Run, outputs: tuple[SliceOutputs, ...]) -> SliceOutputs:
    """Returns the outputs of an ensemble of slice models: means, of logits and evidence after division by temperature.

    Embeddings and statistics have another meaning in every member: those of the first are returned.
    """
    if len(outputs) == 1:
        return outputs[0]

    def average(name: str, *, is_scaled: bool) -> Any:
        divisors = [m.temperature if is_scaled and not run.is_scan_run else 1.0 for m in run.members]
        scaled = [
            jax.tree.map(lambda x, t=t: x / np.float32(t), getattr(o, name))
            for o, t in zip(outputs, divisors, strict=True)
        ]
        return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *scaled)

    return outputs[0]._replace(
        logits=average('logits', is_scaled=True),
        attention=average('attention', is_scaled=False),
        evidence=average('evidence', is_scaled=True),
    )


def compute_mean_novelty(run: Run, outputs: tuple[SliceOutputs, ...]) -> np.ndarray | None:
    """Returns the mean over the members of `compute_novelty` [N]; None if no member has statistics."""
    found = [
        compute_novelty(member.novelty, of_member.statistics)
        for member, of_member in zip(run.members, outputs, strict=True)
        if member.novelty is not None
    ]
    return np.mean(found, axis=0) if found else None


def compute_home_distances(run: Run, outputs: tuple[SliceOutputs, ...]) -> list[dict[str, float]]:
    """Returns `home.compute_distances` of a scan by every member that knows sources."""
    return [
        compute_distances(member.home, of_member.statistics)
        for member, of_member in zip(run.members, outputs, strict=True)
        if member.home is not None
    ]
