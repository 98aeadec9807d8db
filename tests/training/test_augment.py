import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from covidjax.training import augment as augmentation
from covidjax.training.augment import AugmentOptions, ScannerOptions, gaussian_blur

# Compiled as a whole instead of operation by operation.
affine = jax.jit(augmentation.affine)
augment = jax.jit(augmentation.augment, static_argnames='options')

STILL = AugmentOptions(
    flip_probability=0.0, blur_sigma=(0.01, 0.01), rotation_degrees=0, scale=(1, 1), translation=0, shear_degrees=0
)


@pytest.fixture(scope='module')
def image():
    return np.random.default_rng(0).uniform(size=(20, 28, 1)).astype(np.float32)


def call_affine(image, *, rotation=0.0, translation=(0.0, 0.0), scale=1.0, shear=0.0):
    return np.asarray(
        affine(
            jnp.asarray(image),
            rotation_degrees=rotation,
            translation_xy=jnp.array(translation),
            scale=scale,
            shear_degrees=shear,
        )
    )


@pytest.mark.parametrize('sigma', [0.3, 1.0, 2.0])
def test_blur_equals_scipy(image, sigma):
    expected = scipy.ndimage.gaussian_filter(image[..., 0].astype(np.float64), sigma, mode='mirror', radius=3)
    np.testing.assert_allclose(gaussian_blur(image, sigma)[..., 0], expected, atol=1e-5)


def test_blur_by_hand():
    # Away from the borders an impulse becomes the outer product of the normalised kernel.
    impulse = np.zeros((15, 15, 1), np.float32)
    impulse[7, 7] = 1
    kernel = np.exp(-0.5 * np.arange(-3, 4) ** 2 / 1.5**2)
    kernel /= kernel.sum()
    blurred = np.asarray(gaussian_blur(impulse, 1.5))[..., 0]
    np.testing.assert_allclose(blurred[4:11, 4:11], np.outer(kernel, kernel), atol=1e-6)
    assert blurred[3].max() == 0


def test_tiny_sigma_does_not_blur(image):
    np.testing.assert_allclose(gaussian_blur(image, 0.05), image, atol=1e-6)


def test_translation_moves_right_and_down(image):
    moved = call_affine(image, translation=(3, 2))
    np.testing.assert_allclose(moved[2:, 3:], image[:-2, :-3], atol=1e-5)
    assert (moved[:2] == 0).all()
    assert (moved[:, :3] == 0).all()


def test_positive_rotation_is_clockwise():
    square = np.zeros((9, 9, 1), np.float32)
    square[4, 8] = 1  # right of the centre
    turned = call_affine(square, rotation=90.0)
    assert turned[8, 4, 0] == pytest.approx(1, abs=1e-4)  # now below it
    np.testing.assert_allclose(turned, np.rot90(square, k=-1), atol=1e-4)


def test_scale_enlarges_about_the_centre():
    line = np.zeros((9, 9, 1), np.float32)
    line[4, 6] = 1  # two pixels right of the centre
    assert call_affine(line, scale=2.0)[4, 8, 0] == pytest.approx(1, abs=1e-5)


def test_shear_moves_rows_by_their_height():
    # tan(45 degrees) = 1: the row below the centre moves one pixel to the left, the row above one to the right.
    column = np.zeros((9, 9, 1), np.float32)
    column[:, 4] = 1
    sheared = call_affine(column, shear=45.0)[..., 0]
    np.testing.assert_allclose(sheared, np.fliplr(np.eye(9)), atol=1e-5)


@pytest.mark.parametrize('angles', [(30.0, 20.0), (-17.0, 5.0), (12.5, -20.0)])
def test_affine_equals_scipy(image, angles):
    rotation, shear = angles
    translation, scale = np.array([2.0, -1.0]), 1.1
    angle, tan = np.deg2rad(rotation), np.tan(np.deg2rad(shear))
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = scale * rotate @ np.array([[1, -tan], [0, 1]])  # rotation * shear * scale, on (x, y)
    backward = np.linalg.inv(forward)[::-1, ::-1]  # on (row, column)
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - backward @ (centre + translation[::-1])
    # scipy's 'constant' drops taps beyond the border; 'grid-constant' interpolates with black, as torchvision does.
    expected = scipy.ndimage.affine_transform(
        image[..., 0].astype(np.float64), backward, offset, order=1, mode='grid-constant'
    )
    actual = call_affine(image, rotation=rotation, translation=translation, scale=scale, shear=shear)
    np.testing.assert_allclose(actual[..., 0], expected, atol=1e-4)


def test_nothing_drawn_changes_nothing(image):
    np.testing.assert_allclose(augment(jax.random.key(0), image, options=STILL), image, atol=1e-5)


@pytest.mark.parametrize('seed', range(4))
def test_flips_are_flips(image, seed):
    options = dataclasses.replace(STILL, flip_probability=1.0)
    flipped = augment(jax.random.key(seed), image, options=options)
    np.testing.assert_allclose(flipped, image[::-1, ::-1], atol=1e-5)


def test_flips_happen_half_of_the_time(image):
    options = dataclasses.replace(STILL, flip_probability=0.5)
    keys = jax.random.split(jax.random.key(0), 400)
    flipped = np.asarray(jax.jit(jax.vmap(lambda key: augment(key, image, options=options)))(keys))
    variants = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
    counts = [int((np.abs(flipped - v).max((1, 2, 3)) < 1e-4).sum()) for v in variants]
    assert sum(counts) == 400
    assert min(counts) > 70  # 100 expected, standard deviation 9


def test_channels_share_the_draw(image):
    scan = np.repeat(image, 3, axis=-1)
    augmented = np.asarray(augment(jax.random.key(5), scan, options=AugmentOptions()))
    np.testing.assert_array_equal(augmented[..., 0], augmented[..., 2])


def test_range_is_kept_and_draws_differ(image):
    keys = jax.random.split(jax.random.key(1), 16)
    augmented = np.asarray(jax.jit(jax.vmap(lambda key: augment(key, image, options=AugmentOptions())))(keys))
    assert augmented.min() >= 0
    assert augmented.max() <= image.max() + 1e-5
    assert len(np.unique(augmented.reshape(16, -1).sum(1))) == 16


def test_jitter_by_hand_and_within_its_ranges():
    image = jnp.array([[0.0, 0.2], [0.4, 0.6]])[..., None]
    key = jax.random.key(4)
    factors = [1 + 0.3 * jax.random.uniform(k, minval=-1, maxval=1) for k in jax.random.split(key)]
    bright = image * factors[0]
    expected = jnp.clip(bright.mean() + (bright - bright.mean()) * factors[1], 0, 1)
    np.testing.assert_allclose(augmentation.jitter(key, image, brightness=0.3, contrast=0.3), expected, atol=1e-6)
    np.testing.assert_allclose(augmentation.jitter(key, image, brightness=0.0, contrast=0.0), image, atol=1e-6)
    means = [
        float(augmentation.jitter(jax.random.key(i), image, brightness=0.3, contrast=0.0).mean()) for i in range(200)
    ]
    assert 0.3 * 0.7 <= min(means) < 0.3 * 0.75
    assert 0.3 * 1.25 < max(means) <= 0.3 * 1.3 + 1e-6


def make_scanner(**changes):
    """Returns options that change nothing but what is passed."""
    still = ScannerOptions(
        zoom=(1, 1),
        aspect=(1, 1),
        rotation_degrees=0,
        translation=0,
        gamma=0,
        gain=(1, 1),
        offset=(0, 0),
        sharpness=0,
        half_resolution=0.0,
        noise=0,
    )
    return dataclasses.replace(still, **changes)


def scan_many(image, options, count=64):
    keys = jax.random.split(jax.random.key(3), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: augment(key, image, options=options)))(keys))


def test_still_scanner_only_mirrors(image):
    seen = scan_many(image, make_scanner())
    is_plain = np.isclose(seen, image, atol=1e-5).all((1, 2, 3))
    is_mirrored = np.isclose(seen, image[:, ::-1], atol=1e-5).all((1, 2, 3))
    assert (is_plain | is_mirrored).all()
    assert 16 < is_plain.sum() < 48


def test_scanner_stays_in_range_and_keeps_black(image):
    cut = image.copy()
    cut[:6] = 0
    seen = scan_many(cut, make_scanner(gamma=0.6, gain=(0.6, 1.4), offset=(-0.15, 0.15), noise=0.06))
    assert seen.min() >= 0
    assert seen.max() <= 1
    assert (seen[:, :6] == 0).all()
    assert seen[:, 6:].mean((1, 2, 3)).std() > 0.03


def test_gamma_gain_and_offset_are_an_increasing_map(image):
    seen = scan_many(image, make_scanner(gamma=0.6, gain=(0.6, 1.4), offset=(-0.15, 0.15)))
    order = np.argsort(image.ravel())
    mirrored = np.argsort(image[:, ::-1].ravel())
    steps = np.minimum(
        -np.diff(seen.reshape(64, -1)[:, order], axis=1).min(1),
        -np.diff(seen.reshape(64, -1)[:, mirrored], axis=1).min(1),
    )
    assert (steps <= 1e-5).all()


def test_noise_has_the_stated_deviation():
    grey = np.full((64, 64, 1), 0.5, np.float32)
    seen = scan_many(grey, make_scanner(noise=0.1), count=200)
    deviations = seen.std((1, 2, 3))
    # Even between 0 and 0.1.
    np.testing.assert_allclose(np.quantile(deviations, [0.25, 0.5, 0.75]), [0.025, 0.05, 0.075], atol=0.015)
    np.testing.assert_allclose(seen.mean(), 0.5, atol=1e-3)


def test_aspect_widens_and_flattens():
    square = np.zeros((65, 65, 1), np.float32)
    square[16:49, 16:49] = 1
    wide = affine(
        jnp.asarray(square),
        rotation_degrees=0.0,
        translation_xy=jnp.zeros(2),
        scale=1.0,
        shear_degrees=0.0,
        aspect=4 / 3,
    )[..., 0]
    np.testing.assert_allclose(wide[32].sum(), 33 * np.sqrt(4 / 3), atol=1)
    np.testing.assert_allclose(wide[:, 32].sum(), 33 / np.sqrt(4 / 3), atol=1)


@pytest.mark.parametrize('options', [AugmentOptions(blur_sigma=(0.01, 0.01)), ScannerOptions()])
def test_outlines_move_with_the_image(options):
    """The outline of a disc, at a quarter of the resolution, stays on the disc."""
    y, x = np.mgrid[:64, :64]
    disc = (np.hypot(x - 24, y - 36) < 10).astype(np.float32)
    outline = disc.reshape(16, 4, 16, 4).mean((1, 3))[..., np.newaxis]
    keys = jax.random.split(jax.random.key(0), 16)
    move = jax.jit(jax.vmap(lambda key: augment(key, disc[..., np.newaxis], outline, options=options)))
    images, outlines = move(keys)
    pooled = np.asarray(images)[..., 0].reshape(16, 16, 4, 16, 4).mean((2, 4))
    for seen, moved in zip(pooled, np.asarray(outlines)[..., 0], strict=True):
        assert moved.sum() > 5
        np.testing.assert_array_less(np.abs(centre(seen) - centre(moved)), 0.35)


def centre(image):
    return np.array([(image * axis).sum() / image.sum() for axis in np.indices(image.shape)])
