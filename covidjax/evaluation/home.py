"""The training source that a scan is nearest to, by the feature statistics that `novelty` uses.

Every source has a centre. Distances to it are Mahalanobis distances with the covariance inside the sources, one for all
of them (as in linear discriminant analysis) and fitted as in `novelty`.

Shapes: N slices, F statistics, S sources.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from covidjax.errors import UserError
from covidjax.evaluation.novelty import Novelty, fit_distribution, measure_distance
from covidjax.files import replace_file

MAX_PER_SOURCE = 200  # slices
_MIN_SLICES = 16


class Home(NamedTuple):
    """The sources of a run.

    Attributes:
      names: of the sources, str [S].
      centres: mean statistics of each source [S, F].
      inside: distribution of the statistics less their centre.
      typical: median distance of the slices from the centre of their own source.
    """

    names: np.ndarray
    centres: np.ndarray
    inside: Novelty
    typical: np.ndarray


def choose_slices(sources: Sequence[str], max_total: int) -> list[int]:
    """Returns numbers of slices, of every source at most `MAX_PER_SOURCE` and an equal part of `max_total`, evenly.

    Args:
      sources: of each slice; '' is unknown and never chosen.
      max_total: largest number of all of them.
    """
    names = sorted(set(sources) - {''})
    limit = min(MAX_PER_SOURCE, max_total // max(len(names), 1))
    chosen = []
    for name in names:
        of_source = [i for i, source in enumerate(sources) if source == name]
        spread = np.unique(np.linspace(0, len(of_source) - 1, limit).round().astype(int))
        chosen += [of_source[i] for i in spread]
    return sorted(chosen)


def fit_home(statistics_NxF: np.ndarray, sources: Sequence[str]) -> Home | None:
    """Fits centres and distribution; None with fewer than 16 slices, or if the slices of each source are alike.

    Args:
      statistics_NxF: see `outputs.SliceOutputs`.
      sources: source of each slice, no ''.
    """
    names, members = np.unique(np.array(sources, str), return_inverse=True)
    if len(members) < _MIN_SLICES:
        return None
    centres = np.stack([statistics_NxF[members == s].mean(0, dtype=np.float64) for s in range(len(names))])
    rest_NxF = statistics_NxF - centres[members]
    if not rest_NxF.std(0).any():
        return None
    inside = fit_distribution(rest_NxF)
    typical = np.median(measure_distance(inside, rest_NxF))
    return Home(names, centres.astype(np.float32), inside, np.float32(typical))


def compute_distances(home: Home, statistics_NxF: np.ndarray) -> dict[str, float]:
    """Returns, by source, the median distance of the slices from its centre, divided by `Home.typical`."""
    return {
        str(name): float(np.median(measure_distance(home.inside, statistics_NxF - centre)) / home.typical)
        for name, centre in zip(home.names, home.centres, strict=True)
    }


def describe_home(distances: Sequence[dict[str, float]], *, is_far: bool) -> dict[str, Any] | None:
    """Returns the part `home` of prediction.json.

    Args:
      distances: `compute_distances` by each member of a run; a member may lack a source.
      is_far: the scan is unlike all of the training data, see `novelty`.

    Returns:
      {'nearest', 'is_far', 'text', 'distances': source -> mean over the members}; None without distances.
    """
    names = sorted({name for of_member in distances for name in of_member})
    if not names:
        return None
    means = {name: float(np.mean([d[name] for d in distances if name in d])) for name in names}
    nearest = min(means, key=means.__getitem__)
    if not is_far:
        text = f'like {nearest}'
    else:
        text = f'nearest to {nearest}, far from all' if len(names) > 1 else f'far from {nearest}'
    return {'nearest': nearest, 'is_far': is_far, 'text': text, 'distances': means}


def save_home(path: Path, home: Home) -> None:
    """Writes an .npz file atomically."""
    arrays = {f'inside_{name}': value for name, value in home.inside._asdict().items()}
    with replace_file(path) as temporary, temporary.open('wb') as file:
        np.savez(file, names=home.names, centres=home.centres, typical=home.typical, **arrays)


def load_home(path: Path) -> Home | None:
    """Returns what `save_home` wrote, None if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            inside = Novelty(*(arrays[f'inside_{name}'] for name in Novelty._fields))
            return Home(arrays['names'], arrays['centres'], inside, arrays['typical'])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} is damaged: run --mode=evaluate to write it again') from error
