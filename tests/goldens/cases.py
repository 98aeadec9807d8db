"""Inputs of both sides of the comparison with PyTorch, and the values that are kept of each array.

All inputs are drawn by numpy from fixed seeds, so the script and the tests get the same bits.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from covidjax.models.att2 import Att2
from covidjax.models.lesions import LesionNet
from covidjax.models.seq import SequenceClassifier
from covidjax.models.torch_names import to_torch
from tests.variables import draw_variables

GOLDENS = Path(__file__).with_name('torch_goldens.npz')
CLASS_WEIGHTS = (1.0, 0.7, 0.3)
NUM_STEPS = 10  # of the optimizers
LEARNING_RATE = 0.01
# name -> (weight decay, decay) as in `config.train`
OPTIMIZERS = {'adam': (0.0, 'decoupled'), 'adamw': (0.05, 'decoupled'), 'adam_l2': (0.05, 'l2')}
# name -> (rotation, (right, down), scale, x-shear), degrees and pixels
AFFINES = {
    'rotation': (30.0, (0, 0), 1.0, 0.0),
    'shear': (0.0, (0, 0), 1.0, -20.0),
    'all': (-17.0, (5, -3), 1.1, 12.0),
}
BLUR_SIGMAS = (0.05, 0.7, 2.0)


def condense(array, num_values: int = 64) -> np.ndarray:
    """Returns the values that are kept of an array in PyTorch's layout.

    Returns:
      float64 [3 + n]: the largest magnitude, the mean, the root mean square, and the values at n positions spread
      evenly over the flattened array, including the first and the last. n is `num_values`, or less in smaller arrays.
    """
    flat = np.asarray(array, np.float64).ravel()
    positions = np.linspace(0, flat.size - 1, min(num_values, flat.size)).round().astype(int)
    return np.concatenate([[np.abs(flat).max(), flat.mean(), np.sqrt((flat**2).mean())], flat[positions]])


def measure_error(array, golden: np.ndarray) -> float:
    """Returns the largest error of an array against the result of `condense`, relative to its largest magnitude."""
    return float(np.abs(condense(array, len(golden) - 3) - golden).max() / golden[0])


def _draw_float32(model, *inputs, **options):
    # With float64 enabled, parameters without an explicit dtype are drawn in float64.
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), draw_variables(model, *inputs, **options))


def draw_att2(compatibility: str = 'additive'):
    """Returns the paper's model and its variables, float32."""
    model = Att2(compatibility=compatibility)
    variables = _draw_float32(model, jnp.zeros((1, 64, 64, 1)), train=False, full=True)
    for name in ('attention1', 'attention2'):
        variables['params'][name]['u'] *= 0.1  # else nearly all attention would lie on one position
    return model, variables


def draw_lesions():
    """Returns the lesion model, without the mirror image, and its variables, float32."""
    model = LesionNet(mirror=False)
    return model, _draw_float32(model, jnp.zeros((1, 64, 64, 1)), train=False)


def draw_images(num_images: int, size: int) -> np.ndarray:
    """Returns float64 [B, S, S, 1] in [-1, 1], exact in float32."""
    images = np.random.default_rng(1).uniform(-1, 1, (num_images, size, size, 1))
    return images.astype(np.float32).astype(np.float64)


def draw_sequence_tensors() -> dict[str, np.ndarray]:
    """Returns the paper's sequence classifier as PyTorch tensors, float32, with both biases of each LSTM."""
    tensors = to_torch(_draw_float32(SequenceClassifier(), jnp.zeros((1, 2, 3072)), jnp.array([2])))
    rng = np.random.default_rng(2)
    return {
        name: rng.normal(size=tensor.shape).astype(np.float32) / 5 if 'bias_ih' in name else tensor
        for name, tensor in tensors.items()
    }


def draw_embeddings() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns embeddings float64 [B, T, 3072], lengths [B], one of them short, and labels [B]."""
    return np.random.default_rng(3).normal(size=(3, 16, 3072)), np.array([16, 9, 16]), np.array([2, 0, 1])


def draw_attention(compatibility: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns local features [B, h, w, C] and global feature [B, D] in float64, and a module's float32 tensors."""
    rng = np.random.default_rng(4)
    x, g = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 7))
    tensors = {'W_p.weight': rng.normal(size=(7, 5)), 'u.weight': rng.normal(size=(1, 7))}
    names = {'additive': ('W_p.weight', 'u.weight'), 'dot': ('W_p.weight',), 'tanh': ('W_p.weight', 'u.weight')}
    return x, g, {name: tensors[name].astype(np.float32) for name in names.get(compatibility, ())}


def draw_loss() -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [B, 3], one row of them extreme, and labels [B]."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(9, 3)) * 3
    logits[0] = (60, -50, 0)
    return logits, np.array([1, 0, 2, 1, 0, 2, 0, 1, 2])


def draw_descent() -> tuple[np.ndarray, np.ndarray]:
    """Returns a parameter [4, 3] and its gradients [NUM_STEPS, 4, 3], whose magnitudes differ widely."""
    rng = np.random.default_rng(6)
    return rng.normal(size=(4, 3)), rng.normal(size=(NUM_STEPS, 4, 3)) * np.logspace(-6, 1, 12).reshape(4, 3)


def draw_slice() -> np.ndarray:
    """Returns a smooth image with edges, float32 [40, 56, 1] in [0, 1]."""
    y, x = np.mgrid[:40, :56]
    image = 0.5 + 0.3 * np.sin(x / 3) * np.cos(y / 4)
    image[10:25, 20:30] = 1.0
    return np.clip(image + np.random.default_rng(7).normal(size=image.shape) * 0.05, 0, 1)[..., None].astype(np.float32)
