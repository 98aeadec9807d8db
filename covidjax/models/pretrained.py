"""ImageNet weights: torchvision's ResNet from a safetensors file into the Flax backbone. No pickle is ever read."""

import re
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from covidjax.errors import UserError, compare_shapes, join_faults

_BATCH_NORM = {
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}


def torchvision_name(collection: str, path: str) -> str:
    """Returns torchvision's name of a backbone variable, e.g. 'layer1.0.downsample.0.weight'.

    Args:
      collection: 'params' or 'batch_stats'.
      path: of the variable below 'backbone', e.g. 'layer1_0/downsample_conv/dense/kernel'.
    """
    *module, leaf = path.replace('/dense/', '/').split('/')
    name = re.sub(r'^(layer\d)_(\d+)', r'\1.\2', '.'.join(module))
    name = name.replace('downsample_conv', 'downsample.0').replace('downsample_bn', 'downsample.1')
    return f'{name}.{"weight" if leaf == "kernel" else _BATCH_NORM[collection, leaf]}'


def find_weights(pretrained: str) -> Path:
    """Returns the local file behind `config.model.pretrained`: a .safetensors path, or a Hugging Face repository.

    Raises:
      UserError: no such file; not a safetensors file; the repository is not in the local cache and can't be fetched.
    """
    path = Path(pretrained)
    if path.suffix == '.safetensors':
        if not path.is_file():
            raise UserError(f'config.model.pretrained names {pretrained}, which is not a file')
        return path
    if path.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', pretrained):
        raise UserError(
            f'config.model.pretrained={pretrained!r} is neither a .safetensors file nor owner/name on the Hugging Face '
            'hub (pickled .pth files are not read: convert one with safetensors.torch.save_file)'
        )
    import huggingface_hub  # Slow to import, and needed by this branch only.

    try:
        return Path(huggingface_hub.hf_hub_download(pretrained, 'model.safetensors'))
    except Exception as error:  # The hub's client raises a dozen kinds, and all mean the same to the user.
        raise UserError(
            f'could not get the ImageNet weights {pretrained!r} from the Hugging Face hub ({type(error).__name__}): '
            f'download https://huggingface.co/{pretrained}/resolve/main/model.safetensors on a machine with a network '
            'and pass --config.model.pretrained=<that file>, or --config.model.pretrained= to train from scratch'
        ) from error


def load_pretrained(variables: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns `variables` with every array of 'backbone' replaced by the file's.

    Convolutions turn from [out, in, h, w] into [h, w, in, out]. The file's classifier (`fc`) is not used.

    Raises:
      UserError: names or shapes of the file and of the backbone differ; all differences are listed.
    """
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} is not a readable safetensors file: {error}') from error
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    wanted = {}
    for key in flat:
        collection, module, *rest = key.split('/')
        if module == 'backbone':
            wanted[torchvision_name(collection, '/'.join(rest))] = key
    given = {}
    for name, array in tensors.items():
        if name.startswith('fc.') or name.endswith('num_batches_tracked'):
            continue
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
            if array.shape[:2] == (1, 1):
                array = array[0, 0]
        given[name] = np.asarray(array, np.float32)
    faults = compare_shapes(
        {name: array.shape for name, array in given.items()}, {name: flat[key].shape for name, key in wanted.items()}
    )
    if faults:
        raise UserError(f'{path} does not fit config.model: {join_faults(faults)}')
    for name, key in wanted.items():
        flat[key] = given[name]
    return flax.traverse_util.unflatten_dict(flat, sep='/')
