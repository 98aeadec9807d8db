"""Exports a run as one file: safetensors with torchvision's names for PyTorch, or a StableHLO program for jax alone.

Shapes: B slices or scans, T slices of a scan, N slices, S side of a slice, E embedding, K classes.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import safetensors
import safetensors.numpy

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.data.sequences import NUM_SLICES
from covidjax.errors import UserError
from covidjax.experiment.preprocessing import NORMALISATION, describe_preprocessing
from covidjax.experiment.runs import Run, load_run
from covidjax.explain.evidence import combine_evidence
from covidjax.files import replace_file, write_json
from covidjax.models.att2 import Att2, normalise
from covidjax.models.seq import HEADS
from covidjax.models.torch_names import to_torch

PLATFORMS = ('cpu', 'cuda', 'tpu')
_AT_ONCE = 16  # slices per call of the extractor: bounds the memory for scans of any length


def export_run(workdir: Path, output: Path) -> None:
    """Writes the best model of a finished run to one file, atomically, and prints what was written.

    `<name>.preprocessing.json` beside it says how its inputs are prepared (see `preprocessing`), which of these steps
    the file takes itself, and which file it belongs to.

    Args:
      workdir: workdir of the run.
      output: path of the file; its suffix, one of `WRITERS`, sets the format. An existing file is replaced.

    Raises:
      UserError: unknown suffix; the folder is not the workdir of a finished run; the file can't be written.
    """
    if output.suffix not in WRITERS:
        raise UserError(f'--output={output} must end in {" or ".join(WRITERS)}')
    run = load_run(workdir)
    try:
        with replace_file(output) as temporary:
            what = WRITERS[output.suffix](temporary, run)
            size, digest = temporary.stat().st_size, hashlib.sha256(temporary.read_bytes()).hexdigest()
        contract = describe_preprocessing(run.config, run.results['dataset']['fingerprint'])
        contract['exported'] = {'file': output.name, 'sha256': digest, 'scales': output.suffix == '.stablehlo'}
        write_json(output.with_suffix('.preprocessing.json'), contract)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'cannot write --output={output} ({error}): choose another file') from error
    print(f'{output}: {run.results["model"]}, {what}, {size / 1e6:.1f} MB')
    if run.results['notice']:
        print(f'Trained on {run.results["notice"]}.')
    for warning in run.results.get('warnings', ()):
        print(f'Warning: {warning}.')


def write_safetensors(path: Path, run: Run) -> str:
    """Writes all variables under PyTorch's names; returns their number as text.

    The file's metadata are strings. These are JSON:
      classes: names of the outputs.
      normalisation: maps a grey slice to an input, (x - mean) / std in `channels` equal channels.
      temperature: divisor of the logits for calibrated probabilities.
      warnings: warnings about the training data.
      config: config of the run.
    'notice' is not empty for a run on phantoms.
    """
    tensors = to_torch(run.variables)
    metadata = {
        'format': 'pt',
        'covidjax': covidjax.__version__,
        'model': run.results['model'],
        'data': run.results['data'],
        'notice': run.results['notice'],
        'warnings': json.dumps(run.results.get('warnings', [])),
        'classes': json.dumps(CLASSES),
        'normalisation': json.dumps(NORMALISATION),
        'temperature': json.dumps(run.rules['temperature']),
        'config': json.dumps(run.config.to_dict()),
    }
    safetensors.numpy.save_file(tensors, path, metadata)
    return f'{len(tensors)} arrays'


def write_stablehlo(path: Path, run: Run) -> str:
    """Writes the model with its weights as a program for all of `PLATFORMS`; returns its signature as text.

    Inputs of a slice run are uint8 [B, S, S], grey slices cropped to the body and resized. Inputs of a scan run are
    uint8 [B, T, S, S], slices from head to feet, and a bool mask [B, T] of the slices that exist, at least one per row.
    B is free. T is free if the run uses whole scans, else 16.

    Outputs are 'logits' [B, K], whose softmax is in the run's predictions.csv, and 'probabilities' [B, K], calibrated:
    softmax(logits / temperature). Slices also have 'evidence' [B, S, S, K], the share of each pixel in the logits (see
    `evidence.combine_evidence`). Scans also have 'attention' [B, T] and 'evidence' [B, T, K], the share of each slice
    (see `seq.HeadOutputs`). The name of the program holds the model, the
    classes in order and, for a run on phantoms, 'trained_on_phantoms'.
    """
    size, temperature = run.config.data.image_size, run.rules['temperature']
    if run.sequence is None:
        function = create_slice_function(run.slice_model, run.slice_variables, temperature)
        images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f'b, {size}, {size}'), jnp.uint8)
        inputs = (images,)
    else:
        function = create_scan_function(run)
        length = NUM_SLICES if run.min_slices == NUM_SLICES else 't'  # see `scans.thin_scans`
        shape = jax.export.symbolic_shape(f'b, {length}, {size}, {size}')
        inputs = jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape[:2], jnp.bool)
    words = [run.results['model'].split()[0], *CLASSES, *(['trained_on_phantoms'] if run.results['notice'] else [])]
    function.__name__ = '_'.join(words).replace('-', '_')
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*inputs)
    path.write_bytes(exported.serialize())
    shown = ', '.join(aval.str_short() for aval in exported.in_avals)
    return f'{exported.fun_name}({shown}) for {", ".join(exported.platforms)}'


def create_slice_function(model: Att2, variables: dict[str, Any], temperature: float) -> Callable[..., dict]:
    """Returns a function uint8 [B, S, S] -> 'logits', 'probabilities' [B, K] and 'evidence' [B, S, S, K]."""

    def predict(images_BxSxS: jax.Array) -> dict[str, jax.Array]:
        outputs = model.apply(variables, normalise(images_BxSxS)[..., None], train=False)
        return {
            'logits': outputs.logits,
            'probabilities': jax.nn.softmax(outputs.logits / temperature),
            'evidence': combine_evidence(outputs.evidence, images_BxSxS.shape[-1], model.combination),
        }

    return predict


def create_scan_function(run: Run) -> Callable[..., dict]:
    """Returns a function (uint8 [B, T, S, S], mask [B, T]) -> a dict of arrays, see `write_stablehlo`.

    B and T may be symbolic. `models.seq.Seq` does not support that, because it divides the slices into batches.
    """

    def embed(images_NxSxS: jax.Array) -> jax.Array:
        n, s = images_NxSxS.shape[:2]
        parts = -(-n // _AT_ONCE)
        filled = images_NxSxS[jnp.arange(parts * _AT_ONCE).clip(max=n - 1)].reshape(parts, _AT_ONCE, s, s, 1)

        def apply(images: jax.Array) -> jax.Array:
            return run.slice_model.apply(run.slice_variables, normalise(images), train=False).embedding

        embeddings = jax.lax.map(apply, filled)
        return embeddings.reshape(parts * _AT_ONCE, -1)[jnp.arange(n)]

    def predict(images_BxTxSxS: jax.Array, mask_BxT: jax.Array) -> dict[str, jax.Array]:
        b, t, s, _ = images_BxTxSxS.shape
        embeddings = embed(images_BxTxSxS.reshape(b * t, s, s)).reshape(b, t, -1)
        # The sequence model needs padding after the slices; the mask may have it anywhere.
        order_BxT = jnp.argsort(~mask_BxT, axis=1, stable=True)
        ordered = jnp.take_along_axis(embeddings, order_BxT[..., None], axis=1)
        model = HEADS[run.config.model.head](run.config.model.hidden, len(CLASSES))
        outputs = model.apply({'params': run.sequence}, ordered, mask_BxT.sum(1, dtype=jnp.int32))
        places_BxT = jnp.argsort(order_BxT, axis=1)
        return {
            'logits': outputs.logits,
            'probabilities': jax.nn.softmax(outputs.logits / run.rules['temperature']),
            'attention': jnp.take_along_axis(outputs.attention, places_BxT, axis=1),
            'evidence': jnp.take_along_axis(outputs.evidence, places_BxT[..., None], axis=1),
        }

    return predict


WRITERS = {'.safetensors': write_safetensors, '.stablehlo': write_stablehlo}
