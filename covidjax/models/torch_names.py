"""The model's variables under PyTorch's names and in its layouts: one mapping, used in both directions.

A Flax path becomes the name that the same part has in a `torchvision.models.ResNet` with a tail, attention and
classifier added to it; the tree of modules is the same on both sides. Arrays turn their axes, never their values:

  convolution  [h, w, in, out] or, of 1x1, [in, out]   ->  [out, in, h, w]
  linear       [in, out]                               ->  [out, in]
  LSTM         four kernels [in, hidden], one per gate ->  [4 * hidden, in], gates in the order i, f, g, o

An LSTM has one bias per gate here and two in PyTorch, of which only the sum matters: `to_torch` writes the bias as
`bias_hh` and zeros as `bias_ih`, `from_torch` adds them.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

_LEAVES = {
    ('params', 'kernel'): 'weight',
    ('params', 'scale'): 'weight',
    ('params', 'bias'): 'bias',
    ('params', 'W_p'): 'W_p.weight',
    ('params', 'u'): 'u.weight',
    ('batch_stats', 'mean'): 'running_mean',
    ('batch_stats', 'var'): 'running_var',
}
_GATES = 'ifgo'


class Place(NamedTuple):
    """Where a variable lies in PyTorch's tensors.

    Attributes:
      name: of the tensor, e.g. 'layer1.0.downsample.0.weight'.
      gate: which quarter of the tensor it is, 0 to 3, for variables of an LSTM; else None.
    """

    name: str
    gate: int | None = None


def find_place(path: str) -> Place:
    """Returns where the variable at a path lies.

    Args:
      path: collection and path, e.g. 'params/backbone/layer1_0/downsample_conv/dense/kernel'. Parts of 'backbone' have
        torchvision's names without a prefix.
    """
    cell = re.fullmatch(r'params/(.*)(forward|backward)/([ih])([ifgo])/(kernel|bias)', path)
    if cell:
        prefix, direction, side, gate, leaf = cell.groups()
        kind = 'weight' if leaf == 'kernel' else 'bias'
        suffix = '_reverse' if direction == 'backward' else ''
        name = f'{prefix.replace("/", ".")}lstm.{kind}_{side}h_l0{suffix}'
        return Place(name, _GATES.index(gate))
    collection, *modules, leaf = path.replace('/backbone/', '/').replace('/dense/', '/').split('/')
    name = '.'.join([*modules, _LEAVES[collection, leaf]])
    name = re.sub(r'(^|\.)(layer\d|tail|_blocks)_(\d+)', r'\1\2.\3', name)
    return Place(name.replace('downsample_conv', 'downsample.0').replace('downsample_bn', 'downsample.1'))


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of {'params': ..., 'batch_stats': ...} by PyTorch's names and in its layouts, dtypes kept."""
    tensors, gates = {}, {}
    for path, array in flax.traverse_util.flatten_dict(variables, sep='/').items():
        name, gate = find_place(path)
        if gate is None:
            tensors[name] = _turn_to_torch(path, np.asarray(array))
        else:
            gates.setdefault(name, {})[gate] = np.asarray(array).T
    for name, quarters in gates.items():
        tensors[name] = np.concatenate([quarters[gate] for gate in range(len(_GATES))])
        if 'bias_hh' in name:
            tensors[name.replace('bias_hh', 'bias_ih')] = np.zeros_like(tensors[name])
    return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}


def from_torch(tensors: Mapping[str, np.ndarray], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `variables` with every array replaced by the tensor of its place, dtypes those of `variables`.

    Args:
      tensors: at least those that `to_torch(variables)` has, in the same shapes; what else there is plays no part.
      variables: arrays, or shapes and dtypes.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    for path, leaf in flat.items():
        name, gate = find_place(path)
        tensor = tensors[name]
        if gate is None:
            array = _turn_from_torch(path, tensor)
        else:
            if 'bias_hh' in name:
                tensor = tensor + tensors[name.replace('bias_hh', 'bias_ih')]
            array = np.split(tensor, len(_GATES))[gate].T
        flat[path] = np.array(array, leaf.dtype, order='C')
    return flax.traverse_util.unflatten_dict(flat, sep='/')


def list_shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of what `to_torch` makes of variables, of which only the shapes are read."""
    flat = flax.traverse_util.flatten_dict(variables, sep='/')
    empty = {path: np.broadcast_to(np.int8(0), leaf.shape) for path, leaf in flat.items()}
    return {name: array.shape for name, array in to_torch(flax.traverse_util.unflatten_dict(empty, sep='/')).items()}


def _turn_to_torch(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T[..., None, None] if path.endswith('/dense/kernel') else array.T


def _turn_from_torch(path: str, tensor: np.ndarray) -> np.ndarray:
    if path.endswith('/dense/kernel'):
        return tensor[..., 0, 0].T
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
