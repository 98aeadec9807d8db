"""Random augmentation of slices on the device (the paper's section IV-B), in torchvision's parametrisation.

Every function maps one float image [H, W, C] to an image of the same shape and range. All channels share one random
draw. C is 1 for a slice and T for a scan of T slices.
"""

import dataclasses
import functools

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
    source_x = inverse[0, 0] * x + inverse[0, 1] * y + (width - 1) / 2
    source_y = inverse[1, 0] * x + inverse[1, 1] * y + (height - 1) / 2
    sample = functools.partial(map_coordinates, coordinates=[source_y, source_x], order=1, mode='constant', cval=0.0)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image_HxWxC)


def jitter(key: jax.Array, image_HxWxC: jax.Array, *, brightness: float, contrast: float) -> jax.Array:
    """Multiplies the grey values of an image in [0, 1] and then their distances from the mean; clipped to [0, 1]."""
    keys = jax.random.split(key)
    image = image_HxWxC * (1 + brightness * jax.random.uniform(keys[0], minval=-1, maxval=1))
    mean = image.mean()
    return jnp.clip(mean + (image - mean) * (1 + contrast * jax.random.uniform(keys[1], minval=-1, maxval=1)), 0, 1)


def augment(key: jax.Array, image_HxWxC: jax.Array, *, options: AugmentOptions) -> jax.Array:
    """Applies one random flip, blur and affine map to all channels of an image in [0, 1]."""
    keys = jax.random.split(key, 7)
    image = image_HxWxC
    image = jnp.where(jax.random.bernoulli(keys[0], options.flip_probability), image[:, ::-1], image)
    image = jnp.where(jax.random.bernoulli(keys[1], options.flip_probability), image[::-1], image)
    low, high = options.blur_sigma
    image = gaussian_blur(image, jax.random.uniform(keys[2], minval=low, maxval=high))
    if options.brightness or options.contrast:
        other = jax.random.fold_in(key, len(keys))
        image = jitter(other, image, brightness=options.brightness, contrast=options.contrast)
    height, width, _ = image.shape
    limit_xy = options.translation * jnp.array([width, height])
    return affine(
        image,
        rotation_degrees=options.rotation_degrees * jax.random.uniform(keys[3], minval=-1, maxval=1),
        # torchvision shifts by whole pixels.
        translation_xy=jnp.round(limit_xy * jax.random.uniform(keys[4], (2,), minval=-1, maxval=1)),
        scale=jax.random.uniform(keys[5], minval=options.scale[0], maxval=options.scale[1]),
        shear_degrees=options.shear_degrees * jax.random.uniform(keys[6], minval=-1, maxval=1),
    )
