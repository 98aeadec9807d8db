"""ImageNet weights: torchvision's ResNet from a safetensors file into the Flax backbone. No pickle is ever read."""

import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from covidjax.errors import UserError, compare_shapes, join_faults
from covidjax.models.torch_names import from_torch, list_shapes

# What a file may hold beside the backbone: torchvision's classifier, and the other parts of an exported slice model.
_OTHER_PARTS = ('fc.', 'tail.', 'attention1.', 'attention2.', 'classifier')


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
    """Returns `variables` with every array of 'backbone' replaced by the file's (see `torch_names`).

    The file's classifier is not used, nor are tail and attention of a file that `--mode=export` wrote.

    Raises:
      UserError: names or shapes of the file and of the backbone differ; all differences are listed.
    """
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} is not a readable safetensors file: {error}') from error
    backbone = {name: {'backbone': variables[name]['backbone']} for name in variables}
    given = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if not name.startswith(_OTHER_PARTS) and not name.endswith('num_batches_tracked')
    }
    faults = compare_shapes(given, list_shapes(backbone))
    if faults:
        raise UserError(f'{path} does not fit config.model: {join_faults(faults)}')
    loaded = from_torch(tensors, backbone)
    return {name: {**variables[name], **loaded[name]} for name in variables}
