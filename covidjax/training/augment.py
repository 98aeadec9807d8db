"""Random augmentation of slices on the device: the paper's (section IV-B), and a randomised scanner.

Every function maps one float image [H, W, C] to an image of the same shape and range. All channels share one random
draw. C is 1 for a slice and T for a scan of T slices. Outlines [h, w, M] may have a lower resolution; they take part in
flips and affine maps only.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from covidjax.models.fast import materialise


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """Ranges of the augmentation; the defaults are the paper's.

    Attributes:
      flip_probability: probability of each of the two flips.
      blur_sigma: range of the Gaussian's standard deviation, pixels.
      rotation_degrees, shear_degrees: half-widths of the symmetric ranges of the rotation and of the x-shear.
      scale: range of the zoom; above 1 enlarges.
      translation: largest shift as a fraction of each side.
      brightness, contrast: half-widths of the ranges about 1 of the factors of the grey values, and of their distances
        from the mean. 0, as in the paper, changes nothing.
    """

    flip_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.05, 2.0)
    rotation_degrees: float = 30.0
    scale: tuple[float, float] = (0.9, 1.1)
    translation: float = 0.1
    shear_degrees: float = 20.0
    brightness: float = 0.0
    contrast: float = 0.0


@dataclasses.dataclass(frozen=True)
class ScannerOptions:
    """Ranges of a randomised scanner: what differs between hospitals and must not change a finding.

    Attributes:
      zoom: range of the zoom; drawn evenly in its logarithm.
      aspect: range of the width over the height, relative to the slice's; likewise.
      rotation_degrees: half-width of the range.
      translation: largest shift as a fraction of each side.
      gamma: the grey values in [0, 1] are raised to a power from exp(-gamma) to exp(gamma): another window, with the
        same ends.
      gain, offset: then they are multiplied by a number from the range `gain`, and one from the range `offset` is
        added. From the COVIDx CT window, -1350 to 150 HU, gain 1.07 and offset -0.25 lead to -1000 to 400 HU. Values
        that were 0 stay 0: the black around cut slices.
      sharpness: largest share of the difference to the blurred slice that is added (a sharp kernel) or removed.
      blur_sigma: range of the Gaussian's standard deviation, pixels.
      half_resolution: probability that the slice had half as many rows and columns.
      noise: largest standard deviation of the noise.
    """

    zoom: tuple[float, float] = (0.65, 1.35)
    aspect: tuple[float, float] = (0.85, 1.18)
    rotation_degrees: float = 15.0
    translation: float = 0.1
    gamma: float = 0.6
    gain: tuple[float, float] = (0.6, 1.4)
    offset: tuple[float, float] = (-0.3, 0.15)
    sharpness: float = 1.0
    blur_sigma: tuple[float, float] = (0.3, 1.5)
    half_resolution: float = 0.2
    noise: float = 0.06


Augmentation = AugmentOptions | ScannerOptions
AUGMENTATIONS = ('none', 'paper', 'scanner')


def gaussian_blur(image_HxWxC: jax.Array, sigma: jax.Array, *, kernel_size: int = 7) -> jax.Array:
    """Blurs with a sampled, normalised Gaussian of `sigma` pixels; borders are reflected without the edge pixel."""
    radius = kernel_size // 2
    weights = jax.nn.softmax(-0.5 * (jnp.arange(-radius, radius + 1) / sigma) ** 2)
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = jnp.pad(image_HxWxC, pad, mode='reflect')
        size = image_HxWxC.shape[axis]
        terms = [weights[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(kernel_size)]
        image_HxWxC = materialise(sum(terms))  # keeps XLA from repeating the first pass for each pixel of the second
    return image_HxWxC


def affine(
    image_HxWxC: jax.Array,
    *,
    rotation_degrees: jax.Array,
    translation_xy: jax.Array,
    scale: jax.Array,
    shear_degrees: jax.Array,
    aspect: jax.Array | float = 1.0,
) -> jax.Array:
    """Rotates, zooms, x-shears and shifts about the image centre; bilinear, black (0) outside.

    The forward map is translation * rotation * shear * scale as in `torchvision.transforms.functional.affine`; each
    output pixel is sampled at its source position under the inverse map.

    Args:
      image_HxWxC: floats; 0 is black.
      rotation_degrees: positive turns clockwise on the screen.
      translation_xy: [2] shift in pixels, right and down.
      scale: zoom, above 0.
      shear_degrees: angle between the y axis and its image.
      aspect: before all else, widths are multiplied by its square root and heights divided by it.
    """
    height, width, _ = image_HxWxC.shape
    angle, shear = jnp.deg2rad(rotation_degrees), jnp.deg2rad(shear_degrees)
    cos, sin, tan = jnp.cos(angle), jnp.sin(angle), jnp.tan(shear)
    # Inverse of [[cos, -cos tan - sin], [sin, cos - sin tan]], whose determinant is 1.
    inverse = jnp.array([[cos - sin * tan, cos * tan + sin], [-sin, cos]]) / scale
    y, x = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2 - translation_xy[1],
        jnp.arange(width) - (width - 1) / 2 - translation_xy[0],
        indexing='ij',
    )
    stretch = jnp.sqrt(aspect)
    source_x = (inverse[0, 0] * x + inverse[0, 1] * y) / stretch + (width - 1) / 2
    source_y = (inverse[1, 0] * x + inverse[1, 1] * y) * stretch + (height - 1) / 2
    sample = functools.partial(map_coordinates, coordinates=[source_y, source_x], order=1, mode='constant', cval=0.0)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image_HxWxC)


def jitter(key: jax.Array, image_HxWxC: jax.Array, *, brightness: float, contrast: float) -> jax.Array:
    """Multiplies the grey values of an image in [0, 1] and then their distances from the mean; clipped to [0, 1]."""
    keys = jax.random.split(key)
    image = image_HxWxC * (1 + brightness * jax.random.uniform(keys[0], minval=-1, maxval=1))
    mean = image.mean()
    return jnp.clip(mean + (image - mean) * (1 + contrast * jax.random.uniform(keys[1], minval=-1, maxval=1)), 0, 1)


def augment(
    key: jax.Array, image_HxWxC: jax.Array, outlines_hxwxM: jax.Array | None = None, *, options: Augmentation
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Applies one random draw to all channels of an image in [0, 1].

    Args:
      key: of the draw.
      image_HxWxC: the slice, or the slices of a scan.
      outlines_hxwxM: in [0, 1], moved with the image; h / H = w / W.
      options: 'AugmentOptions' flips, blurs, jitters and maps as the paper does; see `ScannerOptions` for the other.

    Returns:
      The image, and the outlines if there are any.
    """
    apply = _scan_again if isinstance(options, ScannerOptions) else _augment_as_paper
    images = apply(key, [image_HxWxC] if outlines_hxwxM is None else [image_HxWxC, outlines_hxwxM], options)
    return images[0] if outlines_hxwxM is None else tuple(images)


def _augment_as_paper(key: jax.Array, images: Sequence[jax.Array], options: AugmentOptions) -> list[jax.Array]:
    keys = jax.random.split(key, 7)
    images = _flip(keys[0], images, options.flip_probability, axis=1)
    image, *outlines = _flip(keys[1], images, options.flip_probability, axis=0)
    low, high = options.blur_sigma
    image = gaussian_blur(image, jax.random.uniform(keys[2], minval=low, maxval=high))
    if options.brightness or options.contrast:
        other = jax.random.fold_in(key, len(keys))
        image = jitter(other, image, brightness=options.brightness, contrast=options.contrast)
    height, width, _ = image.shape
    limit_xy = options.translation * jnp.array([width, height])
    return _map(
        [image, *outlines],
        rotation_degrees=options.rotation_degrees * jax.random.uniform(keys[3], minval=-1, maxval=1),
        # torchvision shifts by whole pixels.
        translation_xy=jnp.round(limit_xy * jax.random.uniform(keys[4], (2,), minval=-1, maxval=1)),
        scale=jax.random.uniform(keys[5], minval=options.scale[0], maxval=options.scale[1]),
        shear_degrees=options.shear_degrees * jax.random.uniform(keys[6], minval=-1, maxval=1),
    )


def _scan_again(key: jax.Array, images: Sequence[jax.Array], options: ScannerOptions) -> list[jax.Array]:
    keys = iter(jax.random.split(key, 13))

    def draw(low: float, high: float, shape: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def draw_factor(low: float, high: float) -> jax.Array:
        return jnp.exp(draw(math.log(low), math.log(high)))

    height, width, _ = images[0].shape
    image, *outlines = _map(
        _flip(next(keys), images, 0.5, axis=1),
        rotation_degrees=draw(-options.rotation_degrees, options.rotation_degrees),
        translation_xy=options.translation * jnp.array([width, height]) * draw(-1, 1, (2,)),
        scale=draw_factor(*options.zoom),
        shear_degrees=jnp.float32(0),
        aspect=draw_factor(*options.aspect),
    )
    blurred = gaussian_blur(image, draw(*options.blur_sigma))
    image = jnp.clip(image + draw(-options.sharpness, options.sharpness) * (image - blurred), 0, 1)
    image = jnp.where(jax.random.bernoulli(next(keys), options.half_resolution), _halve(image), image)
    seen = image ** jnp.exp(draw(-options.gamma, options.gamma)) * draw(*options.gain)
    seen += draw(*options.offset)
    # A sum of four uniform numbers in one draw is nearly normal, and takes a fifth of the time of a normal one.
    bits = jax.random.bits(next(keys), image.shape, jnp.uint32)
    total = sum(((bits >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24))
    noise = (total - 4 * 127.5) / math.sqrt(4 * (256**2 - 1) / 12)
    seen += draw(0, options.noise) * noise
    return [materialise(jnp.where(image > 0, jnp.clip(seen, 0, 1), 0)), *outlines]


def _flip(key: jax.Array, images: Sequence[jax.Array], probability: float, axis: int) -> list[jax.Array]:
    is_flipped = jax.random.bernoulli(key, probability)
    return [jnp.where(is_flipped, jnp.flip(image, axis), image) for image in images]


def _map(images: Sequence[jax.Array], *, translation_xy: jax.Array, **options: jax.Array) -> list[jax.Array]:
    """Applies one affine map to images of the same proportions; the shift is in pixels of the first."""
    width = images[0].shape[1]
    return [affine(image, translation_xy=translation_xy * (image.shape[1] / width), **options) for image in images]


def _halve(image_HxWxC: jax.Array) -> jax.Array:
    """Averages blocks of 2 x 2 pixels and enlarges them again, between their centres linearly."""
    height, width, channels = image_HxWxC.shape
    rows, columns = height // 2, width // 2
    blocks = image_HxWxC[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2, channels).mean((1, 3))
    return jax.image.resize(blocks, image_HxWxC.shape, 'linear')
