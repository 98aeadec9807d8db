"""Plain operations in forms that a CPU runs fast, equal to the plain ones up to rounding.

All that is written for a platform stands here. What XLA does badly on a CPU (jaxlib 0.10), and what is done about it:

- It computes an activation anew inside every operation that uses it, for residual blocks back to the start of their
  stage, and transposes gradients element by element on the way: `materialise` keeps them from being fused.
- It drops what `materialise` asks for before it decides about fusions: `compile_fast` keeps it.
- Max-pooling compares windows one element at a time, and its gradient scatters: `max_pool`.
- A 1x1 convolution is slower than the equal matrix product: `models.resnet.Conv1x1`.
- A bfloat16 matrix product is fast if its result is float32, and slow if it is bfloat16: `dot_general`.
- A 3x3 convolution in bfloat16 is slower than the nine such products that it is the sum of, and one of a map that is
  smaller than its kernel many times slower: `conv3x3`.

Batch normalisation with a gradient by hand is in `models.batch_norm`; memory between steps in `training.memory`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_KEEP_BARRIERS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}


def compile_fast(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `jax.jit(function, **options)`, in which `materialise` has its effect on a CPU.

    Which platform there is, is asked at the first call: modules compile their functions at import.
    """

    @functools.cache
    def compile_for_platform() -> Callable[..., Any]:
        compiler_options = _KEEP_BARRIERS if jax.default_backend() == 'cpu' else None
        return jax.jit(function, compiler_options=compiler_options, **options)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compile_for_platform()(*args)

    call.lower = lambda *args: compile_for_platform().lower(*args)
    return call


@jax.custom_vjp
def materialise(x: jax.Array) -> jax.Array:
    """Returns x; on a CPU it and its gradient are computed once and kept in memory. Reverse-mode gradients only."""
    return _keep(x)


def _keep(x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


materialise.defvjp(lambda x: (_keep(x), None), lambda _, g: (_keep(g),))


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """Returns the maxima of 3x3 windows, [B, ceil(H / 2), ceil(W / 2), C]: stride 2, one pixel of padding.

    The gradient goes to the first maximum of a window, as in PyTorch. Reverse-mode gradients only.
    """
    _, h, w, _ = x_BxHxWxC.shape
    x = x_BxHxWxC.astype(jnp.promote_types(x_BxHxWxC.dtype, jnp.float32))  # in bfloat16 it takes eight times as long
    if h % 2 or w % 2:
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf)
    return _max_pool_even(x).astype(x_BxHxWxC.dtype)


@jax.custom_vjp
def _max_pool_even(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _list_windows(x))


def _list_windows(x: jax.Array) -> list[jax.Array]:
    """Returns the nine members of all windows, each [B, H/2, W/2, C], row by row."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    return [
        jax.lax.slice(padded, (0, i, j, 0), (b, i + h - 1, j + w - 1, c), (1, 2, 2, 1))
        for i in range(3)
        for j in range(3)
    ]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, *others = _list_windows(x)
    maximum, place = first, jnp.zeros(first.shape, jnp.uint8)
    for i, member in enumerate(others, start=1):
        place = jnp.where(member > maximum, jnp.uint8(i), place)
        maximum = jnp.maximum(maximum, member)
    return maximum, place


def _max_pool_backward(place: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    b, h, w, c = g.shape

    # Window o covers the pixels 2o - 1, 2o and 2o + 1: an even pixel lies in one window, an odd one in two.
    def merge(first: jax.Array, middle: jax.Array, last: jax.Array, axis: int) -> jax.Array:
        following = jax.lax.slice_in_dim(first, 1, None, axis=axis)
        padding = [(0, int(a == axis)) for a in range(first.ndim)]
        return jnp.stack([middle, last + jnp.pad(following, padding)], axis + 1)

    rows = [merge(*(jnp.where(place == 3 * i + j, g, 0) for i in range(3)), axis=1) for j in range(3)]
    rows = [row.reshape(b, 2 * h, w, c) for row in rows]
    return (merge(*rows, axis=2).reshape(b, 2 * h, 2 * w, c),)


_max_pool_even.defvjp(_max_pool_forward, _max_pool_backward)


def dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: jax.lax.DotDimensionNumbers, precision: Any = None
) -> jax.Array:
    """Returns [..., F] of x [..., C] and a kernel [C, F], in their dtype; the `dot_general` of `flax.linen.Dense`.

    Sums of bfloat16 products are float32, in the gradients too. Reverse-mode gradients only in bfloat16.
    """
    if x.dtype != jnp.bfloat16:
        return jax.lax.dot_general(x, kernel, dimension_numbers, precision)
    return _multiply(x, kernel)


def _sum_products(x: jax.Array, y: jax.Array, axes_x: tuple[int, ...], axes_y: tuple[int, ...]) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, ((axes_x, axes_y), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _sum_products(x, kernel, (x.ndim - 1,), (0,)).astype(x.dtype)


def _multiply_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    axes = tuple(range(x.ndim - 1))
    return _multiply(g, kernel.T), _sum_products(x, g, axes, axes).astype(kernel.dtype)


_multiply.defvjp(lambda x, kernel: (_multiply(x, kernel), (x, kernel)), _multiply_backward)


def conv3x3(x_BxHxWxC: jax.Array, kernel_3x3xCxF: jax.Array, stride: int) -> jax.Array:
    """Returns the 3x3 convolution [B, ceil(H / stride), ceil(W / stride), F], one pixel of zeros around x.

    Reverse-mode gradients only in bfloat16 and where H or W is below 3.
    """
    if x_BxHxWxC.dtype == jnp.bfloat16 or min(x_BxHxWxC.shape[1:3]) < 3:
        return _conv3x3_by_products(x_BxHxWxC, kernel_3x3xCxF, stride)
    return _convolve(x_BxHxWxC, kernel_3x3xCxF, stride)


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padding, strides = ((1, 1), (1, 1)), (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _shift(x: jax.Array, stride: int) -> dict[tuple[int, int], jax.Array]:
    """Returns what each of the nine places of the kernel meets, each [B, ceil(H / stride), ceil(W / stride), C]."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return {
        (i, j): jax.lax.slice(padded, (0, i, j, 0), (b, i + h, j + w, c), (1, stride, stride, 1))
        for i in range(3)
        for j in range(3)
    }


def _sum_shifted(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    products = [_sum_products(shifted, kernel[place], (3,), (0,)) for place, shifted in _shift(x, stride).items()]
    return sum(products).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3_by_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_sum_shifted, stride=stride),
        default=functools.partial(_convolve, stride=stride),
    )


def _conv3x3_backward(stride: int, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    def pull(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(functools.partial(_convolve, stride=stride), x, kernel)[1](g)

    def pull_shifted(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        d_x = _sum_shifted(g, kernel[::-1, ::-1].swapaxes(2, 3), 1) if stride == 1 else pull(x, kernel, g)[0]
        d_kernel = [_sum_products(shifted, g, (0, 1, 2), (0, 1, 2)) for shifted in _shift(x, stride).values()]
        return d_x, jnp.stack(d_kernel).reshape(kernel.shape).astype(kernel.dtype)

    return jax.lax.platform_dependent(*kept, g, cpu=pull_shifted, default=pull)


_conv3x3_by_products.defvjp(
    lambda x, kernel, stride: (_conv3x3_by_products(x, kernel, stride), (x, kernel)), _conv3x3_backward
)
