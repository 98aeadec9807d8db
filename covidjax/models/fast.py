"""Standard operations in forms that are fast on a CPU; results are equal up to rounding.

All platform-specific code of the models is here. XLA is slow on a CPU (jaxlib 0.10) in these cases; the workaround
follows each:

- XLA recomputes an activation inside every operation that uses it, in residual blocks back to the start of the stage,
  and transposes gradients element by element on the way. `materialise` prevents this fusion.
- XLA removes the barriers of `materialise` before it decides on fusions. `compile_fast` keeps them.
- Max-pooling compares windows element by element, and its gradient is a scatter: `max_pool`.
- A 1x1 convolution is slower than the equivalent matrix product: `models.resnet.Conv1x1`. The gradient of its kernel
  copies large maps first: `dot_general_of_maps`.
- A bfloat16 matrix product is fast with a float32 result and slow with a bfloat16 result: `dot_general`.
- A 3x3 convolution of 32 channels or more takes up to three times as long as Winograd's products of tiles: `conv3x3`.
- A 3x3 convolution in bfloat16 is slower than the sum of nine such products. In any dtype it is many times slower if
  the map is smaller than the kernel: `conv3x3`.
- A depthwise convolution is up to forty times slower than the equivalent sum of shifted products, and so is the
  automatic gradient of that sum: `depthwise_conv`.

Batch normalisation with a hand-written gradient is in `models.batch_norm`; settings for memory between steps are in
`training.runtime`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_KEEP_BARRIERS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}


def compile_fast(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `jax.jit(function, **options)` that keeps the barriers of `materialise` on a CPU.

    Looks up the backend at the first call, not at import: functions are compiled when their module loads.
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
    """Returns x; on a CPU, x and its gradient are computed once and stored. Reverse-mode gradients only."""
    return _keep(x)


def _keep(x: Any) -> Any:
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


materialise.defvjp(lambda x: (_keep(x), None), lambda _, g: (_keep(g),))


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """Returns the maxima of 3x3 windows, [B, ceil(H / 2), ceil(W / 2), C], with stride 2 and padding 1.

    The gradient goes to the first maximum of a window, as in PyTorch. Reverse-mode gradients only.
    """
    _, h, w, _ = x_BxHxWxC.shape
    x = x_BxHxWxC.astype(jnp.promote_types(x_BxHxWxC.dtype, jnp.float32))  # bfloat16 takes eight times as long
    if h % 2 or w % 2:
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf)
    return _max_pool_even(x).astype(x_BxHxWxC.dtype)


@jax.custom_vjp
def _max_pool_even(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _list_windows(x))


def _list_windows(x: jax.Array) -> list[jax.Array]:
    """Returns the nine pixels of every 3x3 window, row by row, each [B, H/2, W/2, C]."""
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
    g = _keep(g)  # else XLA computes in bfloat16, thirty times slower

    # Window o covers the pixels 2o - 1, 2o and 2o + 1: an even pixel lies in one window, an odd one in two.
    def merge(first: jax.Array, middle: jax.Array, last: jax.Array, axis: int) -> jax.Array:
        following = jax.lax.slice_in_dim(first, 1, None, axis=axis)
        padding = [(0, int(a == axis)) for a in range(first.ndim)]
        return jnp.stack([middle, last + jnp.pad(following, padding)], axis + 1)

    rows = [merge(*(jnp.where(place == 3 * i + j, g, 0) for i in range(3)), axis=1) for j in range(3)]
    rows = [row.reshape(b, 2 * h, w, c) for row in rows]
    return (_keep(merge(*rows, axis=2).reshape(b, 2 * h, 2 * w, c)),)


_max_pool_even.defvjp(_max_pool_forward, _max_pool_backward)


def dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: jax.lax.DotDimensionNumbers, precision: Any = None
) -> jax.Array:
    """Returns the product [..., F] of x [..., C] and a kernel [C, F], in their dtype; for `flax.linen.Dense`.

    Products of bfloat16 are summed in float32, also in the gradients. In bfloat16, reverse-mode gradients only.
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


def dot_general_of_maps(
    x: jax.Array, kernel: jax.Array, dimension_numbers: jax.lax.DotDimensionNumbers, precision: Any = None
) -> jax.Array:
    """Equals `dot_general`, with a hand-written gradient in every dtype. Reverse-mode gradients only.

    A product over all positions of two maps starts with a transposed copy of the first map. The automatic gradient of
    the kernel puts the gradient of the output first; for large maps, this copy takes several times as long as the
    product. Here the map with fewer channels comes first.
    """
    return _multiply_maps(x, kernel)


@jax.custom_vjp
def _multiply_maps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _multiply(x, kernel)


def _multiply_maps_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = _keep(x)  # else XLA fuses the copy with the computation of x, element by element
    return _multiply(x, kernel), (x, kernel)


def _multiply_maps_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    g, axes = _keep(g), tuple(range(x.ndim - 1))
    if x.shape[-1] <= g.shape[-1]:
        d_kernel = _sum_products(x, g, axes, axes)
    else:
        d_kernel = _keep(_sum_products(g, x, axes, axes)).T
    return _multiply(g, kernel.T), d_kernel.astype(kernel.dtype)


_multiply_maps.defvjp(_multiply_maps_forward, _multiply_maps_backward)


def conv3x3(x_BxHxWxC: jax.Array, kernel_3x3xCxF: jax.Array, stride: int) -> jax.Array:
    """Returns the 3x3 convolution [B, ceil(H / stride), ceil(W / stride), F], with one pixel of zero padding.

    Reverse-mode gradients only, but for small convolutions in float32.
    """
    tile = _choose_tile(x_BxHxWxC, kernel_3x3xCxF, stride)
    if tile:
        return _conv3x3_by_tiles(x_BxHxWxC, kernel_3x3xCxF, tile)
    if x_BxHxWxC.dtype == jnp.bfloat16 or min(x_BxHxWxC.shape[1:3]) < 3:
        return _conv3x3_by_products(x_BxHxWxC, kernel_3x3xCxF, stride)
    return _convolve(x_BxHxWxC, kernel_3x3xCxF, stride)


def _choose_tile(x: jax.Array, kernel: jax.Array, stride: int) -> int:
    """Returns the side of the tiles of `_multiply_tiles`, measured for ResNet50 and LesionNet; 0: it is not faster."""
    size, channels = min(x.shape[1:3]), min(kernel.shape[2:])
    if x.dtype not in (jnp.float32, jnp.bfloat16) or stride > 1 or size < 7:
        return 0
    # Tiles of 4 waste more of a small map, and round too much for bfloat16.
    tile = 4 if size >= 28 and x.dtype == jnp.float32 else 2
    return tile if channels >= 128 // tile else 0


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    padding, strides = ((1, 1), (1, 1)), (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _shift(x: jax.Array, stride: int) -> dict[tuple[int, int], jax.Array]:
    """Returns the pixels under each of the nine kernel entries, each [B, ceil(H / stride), ceil(W / stride), C]."""
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


def _turn(kernel: jax.Array) -> jax.Array:
    """Returns the kernel whose convolution is the input gradient of a convolution with stride 1."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _spread_shifted(g: jax.Array, kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the input gradient of a convolution with stride 2 of maps of the given shape.

    Output o covers the pixels 2o - 1, 2o and 2o + 1: an even pixel lies under one output, an odd one under two.
    """
    _, h, w, c = shape
    b, rows, columns, _ = g.shape
    padded = _keep(jnp.pad(g, ((0, 0), (0, 1), (0, 1), (0, 0))))
    places = (((1, 0),), ((2, 0), (0, 1)))  # of even and odd pixels: kernel entry, shift of the output

    def compute_phase(p: int, q: int) -> jax.Array:
        products = [
            _sum_products(padded[:, top : top + rows, left : left + columns], kernel[i, j], (3,), (1,))
            for (i, top), (j, left) in itertools.product(places[p], places[q])
        ]
        return sum(products).astype(g.dtype)

    phases = [_keep(jnp.stack([compute_phase(p, q) for q in (0, 1)], 3)) for p in (0, 1)]
    return jnp.stack(phases, 2).reshape(b, 2 * rows, 2 * columns, c)[:, :h, :w]


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
        d_x = _sum_shifted(g, _turn(kernel), 1) if stride == 1 else _spread_shifted(g, kernel, x.shape)
        d_kernel = [_sum_products(shifted, g, (0, 1, 2), (0, 1, 2)) for shifted in _shift(x, stride).values()]
        return d_x, jnp.stack(d_kernel).reshape(kernel.shape).astype(kernel.dtype)

    return jax.lax.platform_dependent(*kept, g, cpu=pull_shifted, default=pull)


_conv3x3_by_products.defvjp(
    lambda x, kernel, stride: (_conv3x3_by_products(x, kernel, stride), (x, kernel)), _conv3x3_backward
)


# The transformations of Lavin and Gray 2016 by side of a tile: of the input B^T, of the kernel G, of the output A^T.
_WINOGRAD = {
    2: (
        ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        ((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    4: (
        (
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        (
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}


def _combine(matrix: Sequence[Sequence[float]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the product of a constant matrix and a vector of arrays."""
    return [
        sum(array if factor == 1 else array * factor for factor, array in zip(row, arrays, strict=True) if factor)
        for row in matrix
    ]


@functools.partial(jax.jit, static_argnums=(2, 3))  # traced once a shape
def _multiply_tiles(x: jax.Array, kernel: jax.Array, tile: int, is_transposed: bool = False) -> jax.Array:
    """Returns the 3x3 convolution with stride 1 by Winograd's minimal filtering, or a convolution's input gradient.

    Every tile of t x t outputs takes (t + 2)^2 products per pair of channels instead of 9 t^2: 16 instead of 36 with
    t = 2, 36 instead of 144 with t = 4. The transformations only add. Rounding errors are those of a convolution with
    t = 2, ten times as large with t = 4.
    """
    of_input, of_kernel, of_output = _WINOGRAD[tile]
    b, h, w, c = x.shape
    f, n = kernel.shape[2 if is_transposed else 3], tile + 2
    rows, columns = -(-h // tile), -(-w // tile)
    padding = ((0, 0), (1, rows * tile + 1 - h), (1, columns * tile + 1 - w), (0, 0))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded, kernel = _keep(jnp.pad(x.astype(wide), padding)), kernel.astype(wide)
    if is_transposed:
        kernel = kernel[::-1, ::-1]  # the products exchange its channels: a copy with exchanged ones is slow
    shifted = [
        jax.lax.slice(padded, (0, i, 0, 0), (b, i + (rows - 1) * tile + 1, columns * tile + 2, c), (1, tile, 1, 1))
        for i in range(n)
    ]
    products = []
    for row, factors in zip(map(_keep, _combine(of_input, shifted)), of_kernel, strict=True):
        shifted = [
            jax.lax.slice(row, (0, 0, j, 0), (b, rows, j + (columns - 1) * tile + 1, c), (1, 1, tile, 1))
            for j in range(n)
        ]
        inputs = jnp.stack([part.reshape(-1, c) for part in _combine(of_input, shifted)])
        outer = [[p * q for p in factors for q in others] for others in of_kernel]
        kernels = jnp.stack(_combine(outer, [kernel[i, j] for i in range(3) for j in range(3)]))
        inputs, kernels = _keep((inputs.astype(x.dtype), kernels.astype(x.dtype)))
        contracted = ((2,), (2 if is_transposed else 1,))
        product = jax.lax.dot_general(inputs, kernels, (contracted, ((0,), (0,))), preferred_element_type=wide)
        products.append(_keep(jnp.stack(_combine(of_output, list(product))).reshape(tile, b, rows, columns, f)))
    tiles = jnp.stack(_combine(of_output, products))  # row and column in the tile, B, row and column of the tile, F
    y = tiles.astype(x.dtype).transpose(2, 3, 0, 4, 1, 5).reshape(b, rows * tile, columns * tile, f)
    return y[:, :h, :w]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3x3_by_tiles(x: jax.Array, kernel: jax.Array, tile: int) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_multiply_tiles, tile=tile),
        default=functools.partial(_convolve, stride=1),
    )


def _conv3x3_by_tiles_backward(
    tile: int, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    if x.dtype == jnp.bfloat16:
        d_kernel = _conv3x3_backward(1, kept, g)[1]
    else:
        d_kernel = jax.vjp(lambda kernel: _convolve(x, kernel, 1), kernel)[1](g)[0]
    d_x = jax.lax.platform_dependent(
        g,
        kernel,
        cpu=functools.partial(_multiply_tiles, tile=tile, is_transposed=True),
        default=lambda g, kernel: _convolve(g, _turn(kernel), 1),
    )
    return d_x, d_kernel


_conv3x3_by_tiles.defvjp(
    lambda x, kernel, tile: (_conv3x3_by_tiles(x, kernel, tile), (x, kernel)), _conv3x3_by_tiles_backward
)


def depthwise_conv(x_BxHxWxC: jax.Array, kernel_KxKxC: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution of every channel with its own kernel, [B, ceil(H / stride), ceil(W / stride), C].

    The padding is TensorFlow's 'SAME': if the number of zeros is odd, the end gets one more than the start. Sums are in
    float32 or wider. Reverse-mode gradients only.

    Args:
      x_BxHxWxC: any H and W.
      kernel_KxKxC: in the dtype of x.
      stride: 1 or 2.
    """

    def pad(size: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + len(kernel_KxKxC) - size, 0)
        return total // 2, total - total // 2

    _, h, w, _ = x_BxHxWxC.shape
    padded = jnp.pad(x_BxHxWxC, ((0, 0), pad(h), pad(w), (0, 0)))
    return _depthwise_conv(padded, kernel_KxKxC, stride)


def _convolve_groups(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _list_taps(x: jax.Array, kernel_size: int, stride: int) -> dict[tuple[int, int], jax.Array]:
    """Returns the pixels under each kernel entry (taps), each [B, h, w, C], in float32 or wider."""
    b, *sizes, c = x.shape
    h, w = ((size - kernel_size) // stride * stride + 1 for size in sizes)
    x = _widen(x)
    return {
        (i, j): jax.lax.slice(x, (0, i, j, 0), (b, i + h, j + w, c), (1, stride, stride, 1))
        for i in range(kernel_size)
        for j in range(kernel_size)
    }


def _sum_taps(taps: dict[tuple[int, int], jax.Array], kernel: jax.Array) -> jax.Array:
    """Returns the sum of taps, each times its kernel entry, in the kernel's dtype."""
    wide = _keep(_widen(kernel))  # else XLA converts the entries again for every pixel
    return sum(tap * wide[place][None, None, None] for place, tap in taps.items()).astype(kernel.dtype)


def _sum_maps(arrays: list[jax.Array]) -> list[jax.Array]:
    """Returns the sums [B, C] over H and W of equally shaped arrays [B, H, W, C], in one pass over all of them."""
    zeros = [jnp.zeros((), array.dtype) for array in arrays]
    return jax.lax.reduce(arrays, zeros, lambda xs, ys: [x + y for x, y in zip(xs, ys, strict=True)], (1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _depthwise_forward(x, kernel, stride)[0]


def _depthwise_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if len(kernel) > 3:  # every pixel is used 25 times: convert it once
            x = _keep(_widen(x))
        return _sum_taps(_list_taps(x, len(kernel), stride), kernel)

    x = _keep(x)
    default = functools.partial(_convolve_groups, stride=stride)
    return jax.lax.platform_dependent(x, kernel, cpu=convolve, default=default), (x, kernel)


def _depthwise_backward(stride: int, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    def pull(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vjp(functools.partial(_convolve_groups, stride=stride), x, kernel)[1](g)

    def pull_taps(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        products = [tap * g.astype(tap.dtype) for tap in _list_taps(x, len(kernel), stride).values()]
        d_kernel = jnp.stack(_sum_maps(products)).sum(1).reshape(kernel.shape)
        return _spread_taps(g, kernel, x.shape, stride), d_kernel.astype(kernel.dtype)

    # Without this barrier, XLA stores every tap of the forward pass in memory and reuses it here.
    return jax.lax.platform_dependent(*_keep((*kept, g)), cpu=pull_taps, default=pull)


def _spread_taps(g: jax.Array, kernel: jax.Array, shape: tuple[int, ...], stride: int) -> jax.Array:
    """Returns the gradient with respect to x, which has the given shape.

    Pixel stride * t + p of x contributes through tap i = p, p + stride, ... to output t, t - 1, .... For each phase p,
    the gradient is a convolution with every stride-th tap, last tap first.
    """
    b, h, w, c = shape
    before = (len(kernel) - 1) // stride
    rows, columns = -(-h // stride), -(-w // stride)
    behind_h, behind_w = rows - g.shape[1], columns - g.shape[2]
    padded = _keep(jnp.pad(g, ((0, 0), (before, behind_h), (before, behind_w), (0, 0))))
    padded = _widen(padded)

    def compute_phase(p: int, q: int) -> jax.Array:
        taps = {}
        for i, j in itertools.product(range(p, len(kernel), stride), range(q, len(kernel), stride)):
            top, left = before - i // stride, before - j // stride
            taps[i, j] = jax.lax.slice(padded, (0, top, left, 0), (b, top + rows, left + columns, c))
        return _sum_taps(taps, kernel)

    phases = [jnp.stack([compute_phase(p, q) for q in range(stride)], 3) for p in range(stride)]
    return jnp.stack(phases, 2).reshape(b, stride * rows, stride * columns, c)[:, :h, :w]


_depthwise_conv.defvjp(_depthwise_forward, _depthwise_backward)
