"""preprocessing.json: how a slice becomes an input of a model, in full, so that other programs can do the same."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from ml_collections import ConfigDict
from PIL import Image

import covidjax
from covidjax.data import lungs, preprocess, slice_lungs
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import WINDOW_LEVEL_HU, WINDOW_WIDTH_HU
from covidjax.data.scan import body
from covidjax.data.sequences import NUM_SLICES
from covidjax.models.ct_weights import ASTRA, GREY_HIGH_HU, GREY_LOW_HU, HIGH_HU, LOW_HU
from covidjax.models.lesion_weights import read_box_digest
from covidjax.models.lesions import PLANES

_NORMALISATION = {'channels': 3, 'mean': 127.5, 'std': 127.5}  # of grey values 0 to 255, see `models.att2.normalise`
_EXAMPLE_SHAPE, _EXAMPLE_BOX = (50, 60), (5, 4, 55, 47)
_CROPS = {
    'whole': {'rule': 'none: slices are taken whole', 'sources': (preprocess,)},
    'body': {
        'rule': 'cut out the box xmin, ymin, xmax, ymax: half-open, clipped to the image; pixels outside it are lost',
        'box_of_lists': 'the last four numbers of a line',
        'box_of_scans': 'covidjax/data/scan/body.py, find_body_box',
        'sources': (body, preprocess),
    },
    'lungs': {
        'rule': 'cut out the box as for the body, set every pixel outside the lungs to 0, then cut to the bounding box '
        'of the lungs; a slice without lungs is left out',
        'lungs_of_scans': 'from Hounsfield units in 3-D: covidjax/data/lungs.py, find_lungs_in_scan; slices with less '
        'than a tenth of the largest lungs are left out',
        'lungs_of_images': 'all that is not black in a slice that is already cut to the lungs; else by the model of '
        'lesions of the package: covidjax/data/slice_lungs.py, find_lungs_in_slice',
        'sources': (lungs, slice_lungs, preprocess),
    },
}


def describe_scaling(config: ConfigDict) -> dict[str, Any]:
    """Returns how grey values 0 to 255 become what the convolutions of a run's slice model take."""
    if (config.att2.model if 'att2' in config else config.model).get('pretrained') != ASTRA:
        rule = 'grey / std - mean / std, the same in every channel'
        return {**_NORMALISATION, 'dtype': 'float32', 'rule': rule}
    width, shift = GREY_HIGH_HU - GREY_LOW_HU, LOW_HU - GREY_LOW_HU
    return {
        'channels': 3,
        'dtype': 'float32',
        'rule': f'clip((grey / 255 * {width} - {shift}) / {HIGH_HU - LOW_HU}, 0, 1), the same in every channel: the '
        f'window {LOW_HU} to {HIGH_HU} HU as 0 to 1',
        'grey_in_hu': f'0 is {GREY_LOW_HU} HU and 255 is {GREY_HIGH_HU} HU, also in images, whose window is unknown',
        'axes': 'after scaling, rows and columns are reversed, then exchanged: rows go from the left of the patient to '
        'the right, columns from back to front; features are turned back',
    }


def describe_preprocessing(config: ConfigDict, fingerprint: str) -> dict[str, Any]:
    """Returns the content of preprocessing.json.

    Args:
      config: config of the run; a run of lesions takes whole slices, and its outputs are planes, not classes.
      fingerprint: of the prepared slices that the run was trained on.

    Returns:
      A JSON-able dict, whose fields docs/external.md explains. 'hashes' has the SHA-256 of the source files that define
      the rules, and of an example: a picture given by a formula, and the bytes that it must become.
    """
    size, region = config.data.image_size, config.data.get('region', 'whole')
    crop = dict(_CROPS[region])
    sources = crop.pop('sources')
    if region == 'lungs':
        crop['lesion_model'] = {'file': 'covidjax/weights/lesions.safetensors', 'digest': read_box_digest()}
    low = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2
    return {
        'format': 1,
        'covidjax': covidjax.__version__,
        'order': ['orientation', 'window', 'grey', 'crop', 'resize', 'scaling'],
        'orientation': 'axial; slices from head to feet, rows from front to back, columns from the right of the '
        'patient to the left',
        'window': {
            'applies_to': 'Hounsfield units; images are taken as they are',
            'width_hu': WINDOW_WIDTH_HU,
            'level_hu': WINDOW_LEVEL_HU,
            'low_hu': low,
            'high_hu': low + WINDOW_WIDTH_HU,
            'dtype': 'float32',  # float64 rounds some halves the other way
            'rule': 'round(clip(hu - low_hu, 0, width_hu) * (255 / width_hu)), halves to even, as uint8',
        },
        'grey': {
            '8-bit grey': 'as it is',
            '16-bit grey': 'round(value / 257), halves to even',
            'others': "Pillow's Image.convert('L')",
        },
        'region': region,
        'crop': crop,
        'resize': {
            'width': size,
            'height': size,
            'library': 'Pillow',
            'version': PIL.__version__,
            'filter': 'BICUBIC',
            'antialias': True,
            'keeps_aspect': False,
        },
        'scaling': describe_scaling(config),
        'classes': list(PLANES if config.name == 'lesions' else CLASSES),
        'slices_of_a_scan': _describe_slices(config),
        'hashes': {
            'prepared_data': fingerprint,
            'sources': {
                f'covidjax/{path.relative_to(Path(covidjax.__file__).parent).as_posix()}': _hash(path.read_bytes())
                for path in (Path(source.__file__) for source in sources)
            },
            'example': _create_example(size),
        },
    }


def _describe_slices(config: ConfigDict) -> str:
    if 'min_slices' not in config.data:
        return 'each on its own'
    if config.data.min_slices == NUM_SLICES:
        return f'{NUM_SLICES} of n: numbers round(linspace(0, n - 1, {NUM_SLICES})), halves to even, from 0'
    return f'all; scans have at least {config.data.min_slices}'


def _create_example(size: int) -> dict[str, Any]:
    """Returns a picture in Hounsfield units as a formula, and the SHA-256 of what `preprocess` makes of it."""
    y, x = np.mgrid[: _EXAMPLE_SHAPE[0], : _EXAMPLE_SHAPE[1]]
    grey = preprocess.apply_window((37 * y + 91 * x) % 2000 - 1500)
    prepared = preprocess.crop_grey_resize(Image.fromarray(grey), _EXAMPLE_BOX, size)
    return {
        'hu': '(37 * y + 91 * x) mod 2000 - 1500, y and x from 0',
        'height': _EXAMPLE_SHAPE[0],
        'width': _EXAMPLE_SHAPE[1],
        'box': list(_EXAMPLE_BOX),
        'cut_to_lungs': False,
        'sha256': _hash(prepared.tobytes()),
        'sha256_of': f'the prepared slice, {size} rows of {size} bytes, before scaling',
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
