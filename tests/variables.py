"""Random variables for models under test, drawn by numpy: compiling a model's own initialisers takes seconds."""

import flax.linen as nn
import jax
import numpy as np


def draw_variables(model: nn.Module, *inputs, seed: int = 0, **options):
    """Returns variables of the shapes that `model.init(key, *inputs, **options)` makes, batch statistics included."""
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **options), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ('scale', 'var'):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = max(int(np.prod(leaf.shape[:-1])), 1) if name != 'bias' else 25
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
