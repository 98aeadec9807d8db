"""Synthetic axial chest CT with exact lesion masks, written in the raw COVIDx-CT layout.

Each patient has one scan of 8 to 40 slices, from the apex of the lungs towards the base. The label only selects the
lesion. Anatomy, pose, intensity, noise, slice count and distractors come from random streams that do not depend on the
label. Lesions are 3-D bodies cut by the slices:

- normal: none.
- pneumonia: one dense, fairly sharp consolidation in one lung, with air bronchograms.
- COVID-19: several hazy, semi-transparent subpleural patches in both lungs.

As in COVIDx-CT, some slices of a sick scan show no lesion but have the label of the scan. They lie beyond both ends of
the lesion and, for COVID-19, also between two groups of patches.

Letters: T slices, H rows and W columns of pixels. Canonical coordinates: the body outline is about the unit circle, x
points to the right of the image, y to the patient's back, z from 0 (apex) to 1 (base). Lung coordinates (u, v) are
canonical coordinates relative to the centre and half-axes of one lung: the lung is about the unit disc at every z.

This module imports neither jax nor TFDS because every worker process imports it.
"""

import contextlib
import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import numpy as np
import scipy
from PIL import Image

from covidjax.data.lists import SPLITS, get_list_name
from covidjax.errors import WORKER_KILLED, UserError
from covidjax.progress import track

FINDINGS = ('Normal', 'Pneumonia', 'COVID-19')
NORMAL, PNEUMONIA, COVID19 = range(3)
VERSION = '2A'  # the COVIDx CT version whose layout is written
IMAGE_FOLDER = f'{VERSION}_images'
MASK_FOLDER = 'lesion_masks'
LUNGS_FOLDER = 'lung_masks'
OPTIONS_FILE = 'phantoms.json'
METADATA_COLUMNS = (
    'patient id',
    'source',
    'country',
    'sex',
    'age',
    'finding',
    'verified finding',
    'slice selection',
    'view',
    'modality',
)

# Raise this when the same options give other pixels. It is part of every file name, which prevents reuse of older
# phantoms and of slices prepared from them.
GENERATOR_VERSION = 1

# Mean share of lesion-free slices in a sick scan. If all of them are classified as normal, slice accuracy is about
# 1 - 2/3 * 0.12 = 0.92.
LESION_FREE_SHARE = 0.12

# Difficulty, tuned once on validation patients of seed 0 (never on a test split) and then frozen. The table shows slice
# accuracy on the 48 validation patients of the default options after fitting on the 240 training patients; in brackets,
# on 144 validation patients (`num_val=144`). Thumbnails are hard because lesions shift their grey less than pose, lung
# density and display gain do.
#   32x32 thumbnails of the box, ridge regression, best of alpha 1..1000         0.60 (0.65)
#   the same, pixels standardised, alpha 1000                                    0.62 (0.64)
#   the same, logistic regression, better of C 0.01 and 0.1                      0.62 (0.64)
#   64x64 crops, plain six-layer CNN with flips, 900 steps of batch 32           0.90 (0.89)
#   ideal reader, who calls lesion-free slices normal                            0.92 (0.92)

# Hounsfield units of the tissues, and the lung window (width 1500, level -600) that maps them to 8-bit grey.
AIR_HU, FAT_HU, TISSUE_HU, BONE_HU = -1000.0, -90.0, 45.0, 450.0
WINDOW_LOW_HU, WINDOW_HIGH_HU = -1350.0, 150.0

_LUNG_SIDES = (-1.0, 1.0)  # the left side of the image is the patient's right lung


@dataclasses.dataclass(frozen=True)
class PhantomOptions:
    """Phantom generator options. Equal options give the same bytes.

    Attributes:
      seed: non-negative; part of every file name and every random stream.
      num_train: patients in train, at least 3; classes are balanced (the first classes get the remainder).
      num_val: patients in val, at least 3.
      num_test: patients in test, at least 3.
      image_size: side of the square slices in pixels before any crop, at least 32.
      min_slices: minimum number of slices in a scan, at least 4.
      max_slices: maximum number of slices in a scan, at least `min_slices`.

    Raises:
      UserError: a value is out of range, or there are more than 10,000 patients in all.
    """

    seed: int = 0
    num_train: int = 240
    num_val: int = 48
    num_test: int = 60
    image_size: int = 96
    min_slices: int = 8
    max_slices: int = 40

    def __post_init__(self):
        lowest = {
            'seed': 0,
            'num_train': 3,
            'num_val': 3,
            'num_test': 3,
            'image_size': 32,
            'min_slices': 4,
            'max_slices': self.min_slices,
        }
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserError(f'phantoms: {name} must be at least {low}, got {getattr(self, name)}')
        if self.num_train + self.num_val + self.num_test > 10_000:
            raise UserError('phantoms: at most 10000 patients in the three splits, because file names have four digits')


@dataclasses.dataclass(frozen=True)
class _Pose:
    """Affine map from canonical to image coordinates; both range over about -1..1."""

    matrix: np.ndarray  # [2, 2]
    shift: np.ndarray  # [2]

    def to_pixels(self, x: np.ndarray, y: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Maps canonical coordinates to (column, row); pixel centres are whole numbers."""
        column = self.matrix[0, 0] * x + self.matrix[0, 1] * y + self.shift[0]
        row = self.matrix[1, 0] * x + self.matrix[1, 1] * y + self.shift[1]
        return (column + 1) * (image_size / 2) - 0.5, (row + 1) * (image_size / 2) - 0.5

    def pixel_grid(self, image_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns canonical x and y of every pixel centre, float32 [H, W] each."""
        axis = (np.arange(image_size) + 0.5) * (2 / image_size) - 1
        column, row = axis[None, :] - self.shift[0], axis[:, None] - self.shift[1]
        inverse = np.linalg.inv(self.matrix)
        x = inverse[0, 0] * column + inverse[0, 1] * row
        y = inverse[1, 0] * column + inverse[1, 1] * row
        return x.astype(np.float32), y.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Lung:
    """One lung: centre and half-axes per slice, lung coordinates and coverage per pixel."""

    side: float  # -1 left of the image, +1 right
    centre_x: np.ndarray  # [T], canonical
    centre_y: np.ndarray
    half_width: np.ndarray
    half_height: np.ndarray
    u: np.ndarray  # [T, H, W] float32
    v: np.ndarray
    cover: np.ndarray  # [T, H, W] float32 in 0..1


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks


def _inside(radius: np.ndarray, softness: float) -> np.ndarray:
    """Returns 1 inside radius 1, 0 outside, and a linear ramp of width `softness` between."""
    return np.clip((1 - radius) * np.float32(1 / softness) + np.float32(0.5), 0, 1)


def _ellipse(x, y, centre_x, centre_y, half_width, half_height, softness=0.15) -> np.ndarray:
    """Returns the coverage of an ellipse, float32. All arguments but `softness` broadcast."""
    return _inside(np.sqrt(((x - centre_x) / half_width) ** 2 + ((y - centre_y) / half_height) ** 2), softness)


def _per_slice(values) -> np.ndarray:
    """Reshapes [T] to float32 [T, 1, 1] to broadcast over pixels."""
    return np.asarray(values, np.float32)[:, None, None]


def _interpolation(num_points: int, num_knots: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Raised-cosine weights [points, knots], sum 1 over knots; knots span 0..1, points span low..high."""
    position = np.linspace(low, high, num_points)[:, None] * (num_knots - 1)
    distance = np.minimum(np.abs(position - np.arange(num_knots)), 1)
    return (0.5 + 0.5 * np.cos(np.pi * distance)).astype(np.float32)


def _smooth_field(rng: np.random.Generator, z: np.ndarray, image_size: int, knots: tuple[int, int]) -> np.ndarray:
    """Returns spatially smooth noise, float32 [T, H, W], of about unit variance.

    `knots` is (number along z over 0..1, number along each image axis). The noise depends on z, not on the slice
    number: a scan of 40 slices shows the same body as one of 8.
    """
    num_z, num_xy = knots
    values = rng.standard_normal((num_z, num_xy, num_xy), np.float32) * 1.5
    along_z = _interpolation(len(z), num_z, z[0], z[-1])
    along_xy = _interpolation(image_size, num_xy)
    return along_xy @ (np.tensordot(along_z, values, 1) @ along_xy.T)


def _stamp(shape: tuple[int, int, int], slices, columns, rows, radii, heights) -> np.ndarray:
    """Returns round Gaussian spots, float32 [T, H, W]; overlapping spots take the maximum.

    Args:
      shape: (T, H, W).
      slices: [P] slice number of each spot.
      columns: [P] centre in pixels.
      rows: [P] centre in pixels.
      radii: [P] in pixels, at most about 2.5 (the stamp is 7 pixels wide).
      heights: [P] value at the centre.
    """
    _, height, width = shape
    offset = np.arange(-3, 4)
    spot_rows = (np.rint(rows)[:, None] + offset).astype(np.int64)  # [P, 7]
    spot_columns = (np.rint(columns)[:, None] + offset).astype(np.int64)
    profile_rows = np.exp(-(((spot_rows - rows[:, None]) / radii[:, None]) ** 2)) * heights[:, None]
    profile_columns = np.exp(-(((spot_columns - columns[:, None]) / radii[:, None]) ** 2))
    profile_rows *= (spot_rows >= 0) & (spot_rows < height)
    profile_columns *= (spot_columns >= 0) & (spot_columns < width)
    spots = (profile_rows[:, :, None] * profile_columns[:, None, :]).astype(np.float32)
    index = np.clip(spot_rows, 0, height - 1)[:, :, None] * width + np.clip(spot_columns, 0, width - 1)[:, None, :]
    index += np.asarray(slices, np.int64)[:, None, None] * (height * width)
    volume = np.zeros(shape, np.float32)
    np.maximum.at(volume.reshape(-1), index.reshape(-1), spots.reshape(-1))
    return volume


# ---------------------------------------------------------------------------------------------------------------------
# Anatomy


def _draw_pose(rng: np.random.Generator) -> _Pose:
    """Draws size, aspect ratio, rotation and position of a body inside the image. One scan in five is upside down."""
    angle = np.deg2rad(rng.uniform(-12, 12) + 180 * (rng.uniform() < 0.2))
    half_width = rng.uniform(0.74, 0.87)
    half_height = half_width * rng.uniform(0.62, 0.82)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return _Pose(matrix=turn @ np.diag([half_width, half_height]), shift=rng.uniform(-0.05, 0.05, 2))


def _draw_lung(rng, side, z, x, y, wobble, softness) -> _Lung:
    """Draws one lung, narrow at the apex and indented by the diaphragm. Heart and mediastinum are not cut out yet."""
    growth = 0.6 + 0.4 * np.sin(np.pi / 2 * np.clip(z / rng.uniform(0.42, 0.6), 0, 1))
    half_width = growth * rng.uniform(0.3, 0.38)
    half_height = growth * rng.uniform(0.54, 0.72)
    centre_x = side * rng.uniform(0.42, 0.47) * (0.8 + 0.2 * growth)
    centre_y = np.full_like(z, rng.uniform(-0.06, 0.04))
    u = (x - _per_slice(centre_x)) / _per_slice(half_width)
    v = (y - _per_slice(centre_y)) / _per_slice(half_height)
    cover = _inside(np.sqrt(u * u + v * v) + wobble, softness)
    # Towards the base, the dome of the diaphragm, above liver or spleen, rises into the middle of the lung.
    dome = np.clip((z - rng.uniform(0.8, 0.88)) / 0.3, 0, 1) ** 0.4 * rng.uniform(0.75, 0.95)
    dome_radius = np.sqrt((u + side * 0.15) ** 2 + (v + 0.2) ** 2) / _per_slice(np.maximum(dome, 0.02))
    cover *= 1 - _inside(dome_radius + wobble, softness)
    return _Lung(side, centre_x, centre_y, half_width, half_height, u, v, cover)


def _render_chest_wall(rng, z, x, y, body_radius) -> np.ndarray:
    """Renders fat, muscle, ribs, sternum, shoulder blades and spine in HU, float32 [T, H, W]; air outside the body."""
    fat_depth = rng.uniform(0.03, 0.11)
    hounsfield = FAT_HU + (TISSUE_HU - FAT_HU) * _inside(body_radius + fat_depth, 0.03)
    # Oblique ribs rotate around the body along z: cos(angle + walk), factored into [H, W] and [T] terms.
    angle = np.abs(np.arctan2(x, y)) * rng.uniform(4, 6)
    walk = _per_slice(z * rng.uniform(25, 35) + rng.uniform(0, 6))
    ribs = np.clip(2.5 * (np.cos(angle) * np.cos(walk) - np.sin(angle) * np.sin(walk)) - 0.9, 0, 1)
    bone = ribs * _inside(np.abs(body_radius - (0.86 - fat_depth / 2)) * 20, 0.8)
    spine_y = rng.uniform(0.52, 0.6)
    fixed = 0.9 * _ellipse(x, y, 0, spine_y, 0.15, 0.15)
    fixed = np.maximum(fixed, 0.8 * _ellipse(x, y, 0, spine_y + 0.27, 0.05, 0.1))
    fixed = np.maximum(fixed, 0.7 * _ellipse(np.abs(x), y, 0.16, spine_y + 0.12, 0.12, 0.05))
    fixed = np.maximum(fixed, 0.8 * _ellipse(x, y, 0, -0.84, 0.17, 0.045))
    bone = np.maximum(bone, fixed)
    blade = _per_slice(np.clip((0.5 - z) / 0.15, 0, 1) * 0.8)
    bone = np.maximum(bone, blade * _ellipse(np.abs(x), y + 0.9 * (np.abs(x) - 0.6), 0.6, 0.62, 0.2, 0.035, 0.3))
    hounsfield += (BONE_HU - TISSUE_HU) * bone
    hounsfield -= 450 * _ellipse(x, y, 0, spine_y + 0.185, 0.045, 0.045, 0.4) * bone  # the spinal canal
    cover = _inside(body_radius, 0.03)
    return AIR_HU + (hounsfield - AIR_HU) * cover


def _render_mediastinum(rng, z, x, y, wobble) -> tuple[np.ndarray, np.ndarray]:
    """Renders coverage in 0..1 and HU of mediastinum, heart, aorta and trachea, each float32 [T, H, W]."""
    width = 0.13 + 0.09 * np.clip(z / 0.4, 0, 1)
    cover = _inside(
        np.sqrt((x / _per_slice(width * rng.uniform(0.9, 1.2))) ** 2 + ((y + 0.1) / 0.62) ** 2) + wobble, 0.12
    )
    heart = np.clip(np.sin(np.pi * np.clip((z - rng.uniform(0.32, 0.42)) / 0.62, 0, 1)), 0, 1) ** 0.5
    heart_x, heart_y = rng.uniform(0.08, 0.17), rng.uniform(-0.3, -0.2)
    half_width = _per_slice(np.maximum(heart * rng.uniform(0.33, 0.46), 0.02))
    half_height = _per_slice(np.maximum(heart * rng.uniform(0.36, 0.48), 0.02))
    turned_x, turned_y = x - heart_x + 0.35 * (y - heart_y), y - heart_y - 0.35 * (x - heart_x)
    cover = np.maximum(
        cover, _inside(np.sqrt((turned_x / half_width) ** 2 + (turned_y / half_height) ** 2) + wobble, 0.12)
    )
    aorta = _ellipse(x, y, rng.uniform(0.1, 0.16), rng.uniform(0.28, 0.36), 0.085, 0.1, 0.3)
    cover = np.maximum(cover, aorta)
    # Near the apex, fat between the vessels makes the mediastinum less uniform than the heart.
    hounsfield = TISSUE_HU - 40 * _per_slice(1 - heart) + 20 * wobble
    branches = _per_slice(np.clip((0.5 - z) / 0.08, 0, 1))  # the trachea divides at z of about 0.45
    offset = _per_slice(np.clip((z - 0.4) / 0.15, 0, 1) * 0.17)
    open_airway = np.maximum(branches, _per_slice(np.clip((0.62 - z) / 0.08, 0, 1)) * 0.8)
    airway = open_airway * _ellipse(np.abs(x), y, offset, -0.02, 0.06, 0.07, 0.3)
    return cover, hounsfield + (AIR_HU - hounsfield) * airway


def _draw_vessel_points(rng, lung: _Lung, z: np.ndarray, num_branches: int = 70, num_steps: int = 28) -> np.ndarray:
    """Draws the vessel tree of one lung as points [P, 4]: slice, canonical x and y, relative radius in 0..1.

    Each branch is a quadratic Bezier curve from the hilum to its own end. The branches of a group share the middle
    control point, so that their first parts coincide and form a tree.
    """
    hilum = np.array([-0.75 * lung.side, 0.05, rng.uniform(0.4, 0.5)])
    num_groups = 9
    direction = rng.uniform(-0.95, 0.95, (num_groups, 2))
    middle = np.concatenate([direction * 0.5, rng.uniform(0.0, 1.0, (num_groups, 1))], 1)
    group = rng.integers(0, num_groups, num_branches)
    end_angle, end_radius = rng.uniform(0, 2 * np.pi, num_branches), np.sqrt(rng.uniform(0.1, 0.85, num_branches))
    end = np.stack([end_radius * np.cos(end_angle), end_radius * np.sin(end_angle)], 1)
    end = np.concatenate([end, middle[group, 2:] + rng.normal(0, 0.18, (num_branches, 1))], 1)
    step = np.linspace(0.03, 1, num_steps)[None, :, None]
    curve = (1 - step) ** 2 * hilum + 2 * step * (1 - step) * middle[group][:, None] + step**2 * end[:, None]
    points = curve.reshape(-1, 3)
    thickness = np.broadcast_to(1 - 0.8 * step[..., 0], curve.shape[:2]).reshape(-1)
    # A slice shows only points within its thickness. In short scans, points in the gaps between slices are not shown.
    spacing = z[1] - z[0]
    slices = np.rint((points[:, 2] - z[0]) / spacing).astype(int)
    near = (slices >= 0) & (slices < len(z))
    near &= np.abs(z[np.clip(slices, 0, len(z) - 1)] - points[:, 2]) < 0.014
    points, thickness, slices = points[near], thickness[near], slices[near]
    x = lung.centre_x[slices] + points[:, 0] * lung.half_width[slices]
    y = lung.centre_y[slices] + points[:, 1] * lung.half_height[slices]
    return np.stack([slices, x, y, thickness], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Lesions


def _draw_lesion_runs(rng: np.random.Generator, num_slices: int, label: int) -> list[tuple[int, int]]:
    """Draws half-open runs of slices that show a lesion. On average, LESION_FREE_SHARE of the slices show none."""
    share = LESION_FREE_SHARE * rng.uniform(0.4, 1.6)
    num_free = int(share * num_slices + rng.uniform())
    gap = 0
    if label == COVID19 and num_slices >= 10 and num_free and rng.uniform() < 0.7:
        gap = int(rng.integers(1, min(num_free, 3) + 1))
    num_before = int(rng.integers(0, num_free - gap + 1))
    start, stop = num_before, num_slices - (num_free - gap - num_before)
    if not gap:
        return [(start, stop)]
    middle = int(rng.integers(start + 3, stop - gap - 2))
    return [(start, middle), (middle + gap, stop)]


def _blob(lung: _Lung, run, centre, drift, radii, roughness, sharpness) -> np.ndarray:
    """Returns the coverage of one lesion, float32 [slices of the run, H, W].

    Args:
      lung: lung that contains the lesion.
      run: half-open range of slices; the cross-section shrinks towards both ends.
      centre: (u, v) at the middle of the run.
      drift: change of (u, v) from the middle to the end of the run.
      radii: (along u, along v), lung coordinates.
      roughness: [T, H, W] added to the radius to make the outline irregular.
      sharpness: width of the soft edge in units of the radius.
    """
    start, stop = run
    middle, half_length = (start + stop - 1) / 2, (stop - start) / 2
    along = (np.arange(start, stop) - middle) / half_length
    size = _per_slice(np.sqrt(1 - 0.4 * along**2))
    u = lung.u[start:stop] - _per_slice(centre[0] + drift[0] * along)
    v = lung.v[start:stop] - _per_slice(centre[1] + drift[1] * along)
    radius = np.sqrt((u / (radii[0] * size)) ** 2 + (v / (radii[1] * size)) ** 2)
    return _inside(radius + roughness[start:stop], sharpness) * lung.cover[start:stop]


def _paint_consolidation(rng, lungs, runs, roughness, cover) -> None:
    """Writes one lobar consolidation in one lung into `cover` [T, H, W]."""
    lung = lungs[rng.integers(2)]
    angle = rng.uniform(-2.2, 2.2)  # from the side wall; a lesion beside the heart would look like part of it
    centre = np.array([lung.side * np.cos(angle), np.sin(angle)]) * rng.uniform(0.3, 0.65)
    drift = rng.uniform(-0.2, 0.2, 2)
    radii = rng.uniform(0.42, 0.62, 2)
    (run,) = runs
    cover[slice(*run)] = _blob(lung, run, centre, drift, radii, roughness, 0.2)


def _paint_ground_glass(rng, lungs, runs, roughness, cover) -> None:
    """Writes several subpleural patches in both lungs into `cover` [T, H, W]."""
    for start, stop in runs:
        patches = []  # (lung, run): one over the whole run, one in the other lung over most of it, some shorter
        first = int(rng.integers(2))
        patches.append((lungs[first], (start, stop)))
        trim = int(rng.integers(0, (stop - start) // 4 + 1))
        lead = int(rng.integers(0, trim + 1))
        patches.append((lungs[1 - first], (start + lead, stop - (trim - lead))))
        for _ in range(rng.integers(1, 4)):
            length = max(2, int((stop - start) * rng.uniform(0.3, 0.8)))
            length = min(length, stop - start)
            begin = start + int(rng.integers(0, stop - start - length + 1))
            patches.append((lungs[rng.integers(2)], (begin, begin + length)))
        for lung, run in patches:
            angle = rng.uniform(-1.3, 1.5)  # from the side wall; positive towards the back
            centre = np.array([lung.side * np.cos(angle), np.sin(angle)]) * rng.uniform(0.8, 0.92)
            radii = rng.uniform(0.3, 0.5, 2)
            patch = _blob(lung, run, centre, rng.uniform(-0.12, 0.12, 2), radii, roughness, 0.45)
            cover[slice(*run)] = np.maximum(cover[slice(*run)], patch)


# ---------------------------------------------------------------------------------------------------------------------
# Distractors: equally likely in all classes and never in the mask


def _distractor_haze(rng, lungs, z) -> np.ndarray:
    """Returns extra HU in the lungs from breathing and from blood pooling at the back, float32 [T, H, W]."""
    extra = np.zeros_like(lungs[0].u)
    haze = rng.uniform(0, 120) if rng.uniform() < 0.4 else 0.0
    if haze:
        centre, width = rng.uniform(0.1, 0.9), rng.uniform(0.15, 0.5)
        extra += _per_slice(haze * np.exp(-(((z - centre) / width) ** 2)))
    slope = rng.uniform(0, 45)
    band = rng.uniform(60, 180) if rng.uniform() < 0.4 else 0.0
    level, growth = rng.uniform(0.78, 0.9), rng.uniform(-0.1, 0.1)
    for lung in lungs:
        back = slope * lung.v
        if band:
            back += band * np.clip((lung.v - _per_slice(level + growth * z)) * 8, 0, 1)
        extra += back * lung.cover
    return extra


def _draw_spots(rng, lungs, z, image_size, pose) -> tuple[np.ndarray, np.ndarray]:
    """Draws small nodules and calcifications: two coverage fields, float32 [T, H, W]."""
    fields = []
    for most, radii_px in ((3, (1.1, 2.0)), (3, (0.6, 0.9))):
        rows = []
        for _ in range(rng.integers(0, most + 1)):
            lung = lungs[rng.integers(2)]
            angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.8))
            slices = np.flatnonzero(np.abs(z - rng.uniform(z[0], z[-1])) < 0.03)
            size = rng.uniform(*radii_px) * image_size / 96
            x = lung.centre_x[slices] + radius * np.cos(angle) * lung.half_width[slices]
            y = lung.centre_y[slices] + radius * np.sin(angle) * lung.half_height[slices]
            rows.append(np.stack([slices, *pose.to_pixels(x, y, image_size), np.full(len(slices), size)], 1))
        spots = np.concatenate(rows) if rows else np.zeros((0, 4))
        shape = (len(z), image_size, image_size)
        fields.append(_stamp(shape, *spots.T, np.ones(len(spots))))
    return fields[0], fields[1]


def _shake(rng, hounsfield: np.ndarray) -> np.ndarray:
    """Doubles the outlines in a random run of slices, like a motion artefact of breathing or heartbeat."""
    num_slices, height, _ = hounsfield.shape
    if rng.uniform() < 0.35:
        length = max(1, int(num_slices * rng.uniform(0.15, 0.5)))
        start = int(rng.integers(0, num_slices - length + 1))
        shift = max(1, round(height / 96 * rng.uniform(1, 2.5)))
        run = hounsfield[start : start + length]
        hounsfield[start : start + length] = 0.65 * run + 0.35 * np.roll(run, shift, 1)
    return hounsfield


# ---------------------------------------------------------------------------------------------------------------------
# One scan


def render_scan(
    options: PhantomOptions, split: str, patient: int, label: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Renders the scan of one patient.

    The random streams depend only on (seed, split, patient): another `label` gives the same patient and slice count
    with another lesion.

    Args:
      options: seed, image size and slice counts.
      split: 'train', 'val' or 'test'.
      patient: patient number, 0..9999.
      label: 0 normal, 1 pneumonia, 2 COVID-19.

    Returns:
      images: uint8 [T, H, W], lung-window grey, slices from apex to base.
      masks: bool [T, H, W], pixels with more than half lesion coverage; all False in a normal scan.
      boxes: int32 [T, 4], bounding box of the body as xmin, ymin, xmax, ymax in pixels, half-open.
    """
    return render_outlined_scan(options, split, patient, label)[:3]


def render_outlined_scan(
    options: PhantomOptions, split: str, patient: int, label: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Renders the scan of one patient and its lungs: the results of `render_scan`, and bool [T, H, W].

    The lungs are the pixels with more than half lung coverage, and the lesion.
    """
    hounsfield, lesion, lungs, body, noise_rng = _render(options, split, patient, label, None)
    images = _to_grey(hounsfield, gamma=noise_rng.uniform(0.7, 1.4), gain=noise_rng.uniform(0.75, 1.0))
    return images, lesion > 0.5, _find_boxes(body), (lungs > 0.5) | (lesion > 0.5)


def render_volume(num_slices: int, image_size: int, label: int, *, seed: int = 0) -> np.ndarray:
    """Renders whole lungs as a scanner stores them.

    Args:
      num_slices: at least 4.
      image_size: side of a slice in pixels, at least 32.
      label: 0 normal, 1 pneumonia, 2 COVID-19.
      seed: of the patient.

    Returns:
      int16 [T, H, W] in Hounsfield units, from above the apex of the lungs to below their base.
    """
    options = PhantomOptions(seed=seed, image_size=image_size, min_slices=num_slices, max_slices=num_slices)
    hounsfield, *_ = _render(options, 'test', 0, label, (0.02, 0.98))
    return np.clip(np.round(hounsfield), -1024, 3071).astype(np.int16)


def _render(
    options: PhantomOptions, split: str, patient: int, label: int, extent: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    """Returns float32 Hounsfield units, cover of lesion and lungs, and body [T, H, W], and the stream of noise.

    `extent` is z of the first and of the last slice; None draws it.
    """
    sequence = np.random.SeedSequence([options.seed, SPLITS.index(split), patient])
    rng, lesion_rng, distractor_rng, noise_rng = (np.random.default_rng(child) for child in sequence.spawn(4))
    size = options.image_size

    num_slices = int(rng.integers(options.min_slices, options.max_slices + 1))
    drawn = rng.uniform(0.14, 0.32), rng.uniform(0.7, 0.86)
    z = np.linspace(*(extent or drawn), num_slices)
    pose = _draw_pose(rng)
    x, y = pose.pixel_grid(size)
    softness = 0.1

    # The same smooth wobble deforms all outlines, so that no organ is an exact ellipse.
    wobble = 0.05 * _smooth_field(rng, z, size, (4, 8))
    body_radius = np.sqrt(x * x + y * y - 0.4 * (x * y) ** 2) + 0.3 * wobble  # between circle and square
    hounsfield = _render_chest_wall(rng, z, x, y, body_radius)
    mediastinum, mediastinum_hu = _render_mediastinum(rng, z, x, y, wobble)
    spine = _ellipse(x, y, 0, 0.57, 0.19, 0.2)
    lungs = [_draw_lung(rng, side, z, x, y, wobble, softness) for side in _LUNG_SIDES]
    for lung in lungs:
        np.multiply(lung.cover, (1 - mediastinum) * (1 - spine), out=lung.cover)
    lung_cover = lungs[0].cover + lungs[1].cover

    shape = (num_slices, size, size)
    vessels = np.concatenate([_draw_vessel_points(rng, lung, z) for lung in lungs])
    columns, rows = pose.to_pixels(vessels[:, 1], vessels[:, 2], size)
    radii = (0.45 + 1.1 * vessels[:, 3] ** 2) * (size / 96)
    vessel_cover = _stamp(shape, vessels[:, 0], columns, rows, radii, 0.35 + 0.6 * vessels[:, 3])

    texture = _smooth_field(rng, z, size, (10, 24))
    lung_hu = rng.uniform(-900, -760) + 22 * texture + _distractor_haze(distractor_rng, lungs, z)
    nodules, calcifications = _draw_spots(distractor_rng, lungs, z, size, pose)

    lesion = np.zeros(shape, np.float32)
    roughness = 0.12 * _smooth_field(lesion_rng, z, size, (8, 16))
    if label == PNEUMONIA:
        _paint_consolidation(lesion_rng, lungs, _draw_lesion_runs(lesion_rng, num_slices, label), roughness, lesion)
        lesion_hu = lesion_rng.uniform(-170, -50) - 650 * vessel_cover * (vessel_cover > 0.5)  # air bronchograms
        lung_hu += lesion * (lesion_hu - lung_hu)
    elif label == COVID19:
        _paint_ground_glass(lesion_rng, lungs, _draw_lesion_runs(lesion_rng, num_slices, label), roughness, lesion)
        opacity = lesion_rng.uniform(0.45, 0.58) + 0.05 * texture
        lung_hu += lesion * opacity * (TISSUE_HU - lung_hu)
    seen_vessels = vessel_cover * (1 - lesion) if label == PNEUMONIA else vessel_cover
    lung_hu += np.maximum(seen_vessels, nodules) * np.maximum(TISSUE_HU - lung_hu, 0)
    lung_hu += calcifications * (BONE_HU - lung_hu)

    hounsfield += mediastinum * (mediastinum_hu - hounsfield)
    hounsfield += lung_cover * (lung_hu - hounsfield)

    body = body_radius < 1
    hounsfield = _shake(distractor_rng, hounsfield)
    hounsfield += noise_rng.uniform(20, 60) * noise_rng.standard_normal(shape, np.float32)
    hounsfield = scipy.ndimage.gaussian_filter(
        hounsfield, noise_rng.uniform(0.45, 0.85) * size / 96, axes=(1, 2), truncate=3.0
    )
    return hounsfield, lesion, lung_cover, body, noise_rng


def _to_grey(hounsfield: np.ndarray, gamma: float, gain: float) -> np.ndarray:
    """Maps HU to uint8 by the lung window and a gamma curve. A table is faster than a power per pixel."""
    table = (np.linspace(0, 1, 1024) ** gamma * (gain * 255) + 0.5).astype(np.uint8)
    level = (hounsfield - WINDOW_LOW_HU) * np.float32(1023 / (WINDOW_HIGH_HU - WINDOW_LOW_HU))
    return table[np.clip(level, 0, 1023).astype(np.int16)]


def _find_boxes(body: np.ndarray) -> np.ndarray:
    """Returns the bounding boxes (xmin, ymin, xmax, ymax) of bool [T, H, W], half-open, int32 [T, 4]."""
    _, height, width = body.shape
    over_rows, over_columns = body.any(1), body.any(2)
    xmin, ymin = over_rows.argmax(1), over_columns.argmax(1)
    xmax, ymax = width - over_rows[:, ::-1].argmax(1), height - over_columns[:, ::-1].argmax(1)
    return np.stack([xmin, ymin, xmax, ymax], 1).astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The raw folder


def _plan_patients(options: PhantomOptions) -> list[tuple[str, int, int]]:
    """Returns (split, patient number, label) of every patient. Numbers continue over the splits, labels cycle."""
    counts = (options.num_train, options.num_val, options.num_test)
    plan = [(split, i % len(FINDINGS)) for split, count in zip(SPLITS, counts, strict=True) for i in range(count)]
    return [(split, patient, label) for patient, (split, label) in enumerate(plan)]


def _name_patient(options: PhantomOptions, patient: int) -> str:
    return f'phantom{GENERATOR_VERSION}-{options.seed}-{patient:04d}'


def _write_patient(
    folder: Path, options: PhantomOptions, split: str, patient: int, label: int
) -> tuple[str, list[str]]:
    """Writes the PNGs of one scan under `folder`. Returns (split, list rows of the scan)."""
    scan = render_outlined_scan(options, split, patient, label)
    rows = []
    for index, (image, mask, box, lungs) in enumerate(zip(*scan, strict=True)):
        name = f'{_name_patient(options, patient)}-{index:04d}.png'
        Image.fromarray(image).save(folder / IMAGE_FOLDER / name, compress_level=1)
        if mask.any():
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / MASK_FOLDER / name, compress_level=1)
        Image.fromarray(lungs.astype(np.uint8) * 255).save(folder / LUNGS_FOLDER / name, compress_level=1)
        rows.append(f'{name} {label} {" ".join(map(str, box))}')
    return split, rows


def _write_metadata(path: Path, options: PhantomOptions) -> None:
    """Writes metadata.csv with one row per patient."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(METADATA_COLUMNS)
        for _, patient, label in _plan_patients(options):
            name = _name_patient(options, patient)
            writer.writerow([name, 'phantom', '', '', '', FINDINGS[label], 'Yes', 'Automatic', 'Axial', 'CT'])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _fresh_sibling(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` and deletes it on exit. Also deletes those left by killed processes."""
    prefix = f'.{target.name}.partial-'
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f'{prefix}*'):
        pid = stale.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(stale, ignore_errors=True)
    folder = target.parent / f'{prefix}{os.getpid()}'
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_written(raw_dir: Path, stamp: dict) -> bool:
    """Returns whether `raw_dir` already holds the phantoms of `stamp`.

    Raises:
      UserError: `raw_dir` exists with other contents.
    """
    if not raw_dir.exists():
        return False
    try:
        found = json.loads((raw_dir / OPTIONS_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        raise UserError(f'{raw_dir} exists and holds no phantoms: choose another folder or remove this one') from None
    if found != stamp:
        differing = sorted(key for key in {*found, *stamp} if found.get(key) != stamp.get(key))
        shown = ', '.join(f'{key} {found.get(key)} instead of {stamp.get(key)}' for key in differing)
        raise UserError(f'{raw_dir} holds other phantoms ({shown}): choose another folder or remove this one')
    return True


def write_phantoms(raw_dir: str | Path, options: PhantomOptions) -> None:
    """Writes a folder of phantoms in the raw COVIDx-CT layout, unless it already exists.

    The folder contains `2A_images/`, the lists `train|val|test_COVIDx_CT-2A.txt` (file, class, xmin, ymin, xmax, ymax),
    `metadata.csv`, `lesion_masks/` (0 or 255; only slices with a lesion, named as their image), `lung_masks/` (all
    slices, the lesion included) and `phantoms.json` (the options). It is renamed into place at the end, so an existing
    folder is complete.

    Args:
      raw_dir: folder to create, with its parents.
      options: generator options.

    Raises:
      UserError: `raw_dir` exists with other contents or cannot be created; a worker process was killed.
    """
    raw_dir = Path(raw_dir).absolute()
    stamp = {'generator_version': GENERATOR_VERSION, **dataclasses.asdict(options)}
    if _is_written(raw_dir, stamp):
        return
    try:
        with _fresh_sibling(raw_dir) as folder:
            _write_folder(folder, options, stamp)
            try:
                os.replace(folder, raw_dir)
            except OSError:
                # Another process may have written the same phantoms first.
                if not _is_written(raw_dir, stamp):
                    raise
    except BrokenProcessPool as error:
        raise UserError(f'cannot write phantoms to {raw_dir}: {WORKER_KILLED}') from error
    except OSError as error:
        raise UserError(f'cannot write phantoms to {raw_dir} ({error}): make room or fix its permissions') from error


def _write_folder(folder: Path, options: PhantomOptions, stamp: dict) -> None:
    """Writes the contents that `write_phantoms` describes to `folder`."""
    for name in (IMAGE_FOLDER, MASK_FOLDER, LUNGS_FOLDER):
        (folder / name).mkdir()
    plan = _plan_patients(options)
    rows = {split: [] for split in SPLITS}
    scans = joblib.Parallel(n_jobs=-1, return_as='generator')(
        joblib.delayed(_write_patient)(folder, options, *patient) for patient in plan
    )
    with contextlib.closing(scans):  # on an interrupt, stop the workers before the folder is deleted
        for split, scan_rows in track(scans, 'phantoms', len(plan), 'patient'):
            rows[split] += scan_rows
    for split, lines in rows.items():
        (folder / get_list_name(split, VERSION)).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    _write_metadata(folder / 'metadata.csv', options)
    (folder / OPTIONS_FILE).write_text(json.dumps(stamp, indent=2) + '\n', encoding='utf-8')
