"""A trained run as one file that PyTorch users can load: torchvision's names, safetensors, nothing pickled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.errors import UserError
from covidjax.files import replace_file
from covidjax.models.torch_names import to_torch
from covidjax.training.checkpoints import Checkpoints, open_checkpoints
from covidjax.training.workdir import load_config

NORMALISATION = {'channels': 3, 'mean': 127.5, 'std': 127.5}  # of grey values 0 to 255, see `models.att2.normalise`


def export_run(
    workdir: Path, output: Path, restore_best: Callable[[ConfigDict, Checkpoints], dict[str, Any]]
) -> dict[str, str]:
    """Writes the best model of a finished run as safetensors, whole or not at all, and returns the file's metadata.

    Args:
      workdir: of the run.
      output: path of the file, ending in .safetensors; one that exists is replaced.
      restore_best: (config, checkpoints) -> variables of the best epoch, of the run's experiment.

    Returns:
      Strings, of which 'classes', 'normalisation' and 'config' are JSON: the names of the outputs, what makes an input
      of a grey slice, (x - mean) / std in that many equal channels, and the run's config. 'notice' is not empty if the
      run was made on phantoms.

    Raises:
      UserError: another kind of file is asked for; the folder is not the workdir of a finished run; the file can't be
        written.
    """
    if output.suffix != '.safetensors':
        raise UserError(f'--output={output} must end in .safetensors, the only kind of file that can be written')
    config = load_config(workdir)
    try:
        results = json.loads((workdir / 'results.json').read_text())
    except FileNotFoundError as error:
        raise UserError(f'{workdir} has not finished: run its training command again first') from error
    with open_checkpoints(workdir) as checkpoints:
        tensors = to_torch(restore_best(config, checkpoints))
    metadata = {
        'format': 'pt',
        'covidjax': covidjax.__version__,
        'model': results['model'],
        'data': results['data'],
        'notice': results['notice'],
        'classes': json.dumps(CLASSES),
        'normalisation': json.dumps(NORMALISATION),
        'config': json.dumps(config.to_dict()),
    }
    try:
        with replace_file(output) as temporary:
            safetensors.numpy.save_file(tensors, temporary, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'can not write --output={output}: {error}') from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f'{output}: {len(tensors)} arrays of {results["model"]}, {size / 1e6:.1f} MB')
    return metadata
