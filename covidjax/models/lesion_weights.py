"""Reads and writes the weights of a lesion model as one safetensors file; `BOX` comes with the package.

The names and layouts are those of `torch_names`, so that PyTorch can read the file too. The metadata, strings of JSON,
say how the model is used and where it comes from.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import covidjax
from covidjax.errors import UserError, compare_shapes, join_faults
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesions import LesionNet
from covidjax.models.torch_names import from_torch, list_shapes, to_torch

BOX = Path(covidjax.__file__).parent / 'weights' / 'lesions.safetensors'
_MARK = 'decoder_0.weight'  # only the model of lesions has it


@dataclasses.dataclass(frozen=True)
class LesionModel:
    """A trained lesion model, ready to use.

    Attributes:
      name: 'box', or the workdir or file it comes from.
      model, variables: the network and its weights.
      image_size: side of a slice in pixels.
      threshold: probability from which a position counts as lesion, chosen on validation.
      notice: not empty for a model trained on phantoms.
      digest: SHA-256 of the weights, in hex.
      data: what it was trained on.
    """

    name: str
    model: LesionNet
    variables: dict[str, Any]
    image_size: int
    threshold: float
    notice: str
    digest: str
    data: str

    @functools.cached_property
    def folded(self) -> dict[str, Any]:
        """Variables for evaluation mode, on the device (see `folding.fold_batch_norm`)."""
        return jax.device_put(fold_batch_norm(self.variables))


def compute_digest(variables: dict[str, Any]) -> str:
    """Returns the SHA-256 of the weights in half precision, in hex."""
    return _compute_digest(to_torch(variables))


def _compute_digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + str(tensor.shape).encode() + tensor.astype(np.float16).tobytes())
    return digest.hexdigest()


def write_lesion_weights(path: Path, lesions: LesionModel, facts: dict[str, Any]) -> int:
    """Writes the weights in half precision; returns the number of arrays.

    Args:
      path: of the file.
      lesions: the model.
      facts: what else the metadata shall hold, JSON-serialisable.
    """
    tensors = {name: tensor.astype(np.float16) for name, tensor in to_torch(lesions.variables).items()}
    used = {
        'image_size': lesions.image_size,
        'threshold': lesions.threshold,
        'mirror': lesions.model.mirror,
        'data': lesions.data,
    }
    texts = {name: json.dumps(value) for name, value in {**used, **facts}.items()}
    metadata = {'format': 'pt', 'covidjax': covidjax.__version__, 'notice': lesions.notice, **texts}
    safetensors.numpy.save_file(tensors, path, metadata)
    return len(tensors)


def read_lesion_weights(path: Path, name: str) -> LesionModel:
    """Reads the file of `write_lesion_weights`.

    Raises:
      UserError: the file is missing or unreadable, or holds another model.
    """
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, the file is no dict
        facts = {key: json.loads(metadata[key]) for key in ('image_size', 'threshold', 'mirror', 'data')}
    except FileNotFoundError as error:
        raise UserError(f'{path} does not exist: it holds the weights of the lesion model') from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path} is not a readable safetensors file: {error}') from error
    except (KeyError, ValueError) as error:
        raise UserError(f'{path} does not hold a lesion model: export a run of configs/lesions.py') from error
    model = LesionNet(mirror=facts['mirror'])
    variables = load_lesion_tensors(tensors, path)
    return LesionModel(
        name,
        model,
        variables,
        facts['image_size'],
        facts['threshold'],
        metadata.get('notice', ''),
        compute_digest(variables),
        facts['data'],
    )


@functools.cache
def load_box() -> LesionModel:
    """Returns the lesion model of this package."""
    return read_lesion_weights(BOX, 'box')


@functools.cache
def read_box_digest() -> str:
    """Returns the digest of the lesion model of this package, without building the model."""
    return _compute_digest(safetensors.numpy.load_file(BOX))


def holds_lesion_weights(path: Path) -> bool:
    """Returns whether a safetensors file holds a whole lesion model and not a backbone only."""
    try:
        with safetensors.safe_open(path, 'numpy') as file:
            return _MARK in file.keys()  # noqa: SIM118, the file is no dict
    except (OSError, safetensors.SafetensorError):
        return False


def load_lesion_tensors(tensors: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """Returns the variables float32 of `LesionNet` from the tensors of a file.

    Raises:
      UserError: names or shapes differ from the model's (all differences are listed).
    """
    shapes = jax.eval_shape(
        lambda key: LesionNet().init(key, jnp.zeros((1, 32, 32, 1)), train=False), jax.random.key(0)
    )
    faults = compare_shapes({name: tensor.shape for name, tensor in tensors.items()}, list_shapes(shapes))
    if faults:
        raise UserError(f'{path} does not fit the lesion model: {join_faults(faults)}')
    return from_torch(tensors, shapes)
