"""Runs a model exported with `--mode=export --output=model.stablehlo`; needs only jax, flatbuffers and Pillow.

python run_exported.py model.stablehlo slice1.png slice2.png

Crop the slices to the body. For a scan model, pass the slices of one scan from head to feet.
"""

import sys
from pathlib import Path

import jax.export
import numpy as np
from PIL import Image

model = jax.export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
side = model.in_avals[0].shape[-1]
images = [Image.open(path).convert('L').resize((side, side), Image.Resampling.BICUBIC) for path in sys.argv[2:]]
slices = np.stack([np.asarray(image) for image in images])
is_of_scans = len(model.in_avals) == 2
outputs = model.call(slices[None], np.ones((1, len(slices)), bool)) if is_of_scans else model.call(slices)
print(model.fun_name)
for name, values in outputs.items():
    values = np.asarray(values, float)
    if name == 'evidence' and not is_of_scans:  # of each pixel
        name, values = 'evidence, summed over the pixels', values.sum((1, 2))
    print(name, values.round(6).tolist(), sep='\t')
