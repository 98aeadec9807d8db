"""Exports a run as one file: safetensors with torchvision's names for PyTorch, or a StableHLO program for jax alone.

Shapes: B slices or scans, T slices of a scan, N slices, S side of a slice, E embedding, K classes.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.data.sequences import NUM_SLICES
from covidjax.errors import UserError
from covidjax.experiment.common import load_output
from covidjax.experiment.config import load_config
from covidjax.experiment.lesions import load_lesions
from covidjax.experiment.preprocessing import describe_preprocessing, describe_scaling
from covidjax.experiment.runs import Member, Run, load_run
from covidjax.explain.evidence import combine_evidence
from covidjax.files import replace_file, write_json
from covidjax.models.att2 import normalise
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import LesionModel, write_lesion_weights
from covidjax.models.lesions import PLANES
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
    config = load_config(workdir)
    if config.name == 'lesions':
        model, results = load_lesions(str(workdir)), load_output(workdir, 'results.json')
        write = {
            '.safetensors': lambda path: write_lesion_safetensors(path, model, results),
            '.stablehlo': lambda path: write_lesion_stablehlo(path, model),
        }[output.suffix]
    else:
        run = _describe_without_lesions(load_run(workdir))
        results, write = run.results, functools.partial(WRITERS[output.suffix], run=run)
    try:
        with replace_file(output) as temporary:
            what = write(temporary)
            size, digest = temporary.stat().st_size, hashlib.sha256(temporary.read_bytes()).hexdigest()
        contract = describe_preprocessing(config, results['dataset']['fingerprint'])
        contract['exported'] = {'file': output.name, 'sha256': digest, 'scales': output.suffix == '.stablehlo'}
        write_json(output.with_suffix('.preprocessing.json'), contract)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'cannot write --output={output} ({error}): choose another file') from error
    print(f'{output}: {results["model"]}, {what}, {size / 1e6:.1f} MB')
    if results['notice']:
        print(f'Trained on {results["notice"]}.')
    for warning in results.get('warnings', ()):
        print(f'Warning: {warning}.')


def _describe_without_lesions(run: Run) -> Run:
    """Returns the run with a warning if its lesion model, which neither format holds, decides on sick or not."""
    if run.lesions is None:
        return run
    warning = (
        'this file holds the classifier alone, so its probabilities are not the verdict of the run: the lesions, '
        'which decide on sick or not, are not in it'
    )
    return run._replace(results={**run.results, 'warnings': [*run.results.get('warnings', ()), warning]})


def write_lesion_safetensors(path: Path, lesions: LesionModel, results: dict[str, Any]) -> str:
    """Writes the weights of a lesion model in half precision (see `lesion_weights`); returns their number as text."""
    facts = {'model': results['model'], 'sources': results['dataset']['sources']}
    return f'{write_lesion_weights(path, lesions, facts)} arrays in half precision'


def write_lesion_stablehlo(path: Path, lesions: LesionModel) -> str:
    """Writes a lesion model as a program for all of `PLATFORMS`; returns its signature as text.

    The input is uint8 [B, S, S], whole grey slices. The outputs are 'lungs', 'lesion' and 'consolidation' [B, S / 4,
    S / 4], probabilities; the last is given that the position is lesion.
    """

    variables = jax.device_get(fold_batch_norm(lesions.variables))

    def outline(images_BxSxS: jax.Array) -> dict[str, jax.Array]:
        logits = lesions.model.apply(variables, normalise(images_BxSxS)[..., None], train=False)
        return dict(zip(PLANES, jnp.moveaxis(jax.nn.sigmoid(logits), -1, 0), strict=True))

    outline.__name__ = '_'.join(['lesions', *(['trained_on_phantoms'] if lesions.notice else [])])
    shape = jax.export.symbolic_shape(f'b, {lesions.image_size}, {lesions.image_size}')
    return _write_program(path, outline, jax.ShapeDtypeStruct(shape, jnp.uint8))


def _write_program(path: Path, function: Callable[..., dict], *inputs: jax.ShapeDtypeStruct) -> str:
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*inputs)
    path.write_bytes(exported.serialize())
    shown = ', '.join(aval.str_short() for aval in exported.in_avals)
    return f'{exported.fun_name}({shown}) for {", ".join(exported.platforms)}'


def write_safetensors(path: Path, run: Run) -> str:
    """Writes all variables under PyTorch's names; returns their number as text.

    The file's metadata are strings. These are JSON:
      classes: names of the outputs.
      normalisation: maps a grey slice to an input: (x - mean) / std in `channels` equal channels, or what 'rule' says.
      temperature: divisor of the logits for calibrated probabilities; of the classifier alone, if the run has lesions.
      warnings: warnings about the training data.
      config: config of the run.
      members: for an ensemble, the temperature of every member; empty for a single model.
    'notice' is not empty for a run on phantoms. Arrays of an ensemble start with 'member1.' and so on: divide the
    logits of every member by its temperature, average them, and divide the average by 'temperature'.
    """
    is_ensemble = len(run.members) > 1
    tensors = {
        f'member{number}.{name}' if is_ensemble else name: array
        for number, member in enumerate(run.members, start=1)
        for name, array in to_torch(member.variables).items()
    }
    metadata = {
        'format': 'pt',
        'covidjax': covidjax.__version__,
        'model': run.results['model'],
        'data': run.results['data'],
        'notice': run.results['notice'],
        'warnings': json.dumps(run.results.get('warnings', [])),
        'classes': json.dumps(CLASSES),
        'normalisation': json.dumps(describe_scaling(run.config)),
        'temperature': json.dumps(run.classifier_temperature),
        'members': json.dumps([member.temperature for member in run.members] if is_ensemble else []),
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
    (see `seq.HeadOutputs`). Of an ensemble all these are means over the members, logits and evidence after division by
    the member's temperature, and 'disagreement' [B] is that of the members (see `evaluation.disagreement`). The name of
    the program holds the model, for an ensemble 'ensemble_of_5', the classes in order, 'without_lesions' for a run with
    a lesion model, and 'trained_on_phantoms' for a run on phantoms.
    """
    size, count = run.config.data.image_size, len(run.members)
    if not run.is_scan_run:
        parts = [create_slice_function(member) for member in run.members]
        images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f'b, {size}, {size}'), jnp.uint8)
        inputs = (images,)
    else:
        parts = [create_scan_function(run.config, member) for member in run.members]
        length = NUM_SLICES if run.min_slices == NUM_SLICES else 't'  # see `scans.thin_scans`
        shape = jax.export.symbolic_shape(f'b, {length}, {size}, {size}')
        inputs = jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct(shape[:2], jnp.bool)
    function = average_functions(parts, run.classifier_temperature)
    words = [
        run.results['model'].split()[0],
        *([f'ensemble_of_{count}'] if count > 1 else []),
        *CLASSES,
        *(['without_lesions'] if run.lesions else []),
        *(['trained_on_phantoms'] if run.results['notice'] else []),
    ]
    function.__name__ = '_'.join(words).replace('-', '_')
    return _write_program(path, function, *inputs)


def average_functions(functions: Sequence[Callable[..., dict]], temperature: float) -> Callable[..., dict]:
    """Returns a function of the same inputs whose outputs are means, with 'probabilities' and 'disagreement'.

    Args:
      functions: one for each member; their outputs have 'logits' [B, K].
      temperature: of the average.
    """

    def predict(*inputs: jax.Array) -> dict[str, jax.Array]:
        every = [function(*inputs) for function in functions]
        outputs = every[0]
        if len(every) > 1:
            outputs = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *every)
        outputs['probabilities'] = jax.nn.softmax(outputs['logits'] / temperature)
        if len(every) > 1:
            shares = [jax.nn.softmax(one['logits'] / temperature) for one in every]
            pairs = [abs(a - b).sum(-1) / 2 for a, b in itertools.combinations(shares, 2)]
            outputs['disagreement'] = sum(pairs) / len(pairs)
        return outputs

    return predict


def create_slice_function(member: Member) -> Callable[..., dict]:
    """Returns a function uint8 [B, S, S] -> 'logits' [B, K] and 'evidence' [B, S, S, K], over the temperature."""
    # Arrays of numpy become constants of the program; those of jax would be hidden inputs of it.
    model, variables = member.slice_model, jax.device_get(member.folded)

    def predict(images_BxSxS: jax.Array) -> dict[str, jax.Array]:
        outputs = model.apply(variables, normalise(images_BxSxS)[..., None], train=False)
        evidence = combine_evidence(outputs.evidence, images_BxSxS.shape[-1], model.combination)
        return {'logits': outputs.logits / member.temperature, 'evidence': evidence / member.temperature}

    return predict


def create_scan_function(config: ConfigDict, member: Member) -> Callable[..., dict]:
    """Returns a function (uint8 [B, T, S, S], mask [B, T]) -> 'logits', 'attention' and 'evidence' of a member.

    B and T may be symbolic. `models.seq.Seq` does not support that, because it divides the slices into batches.
    """

    variables = jax.device_get(member.folded)  # see above

    def embed(images_NxSxS: jax.Array) -> jax.Array:
        n, s = images_NxSxS.shape[:2]
        parts = -(-n // _AT_ONCE)
        filled = images_NxSxS[jnp.arange(parts * _AT_ONCE).clip(max=n - 1)].reshape(parts, _AT_ONCE, s, s, 1)

        def apply(images: jax.Array) -> jax.Array:
            return member.slice_model.apply(variables, normalise(images), train=False).embedding

        embeddings = jax.lax.map(apply, filled)
        return embeddings.reshape(parts * _AT_ONCE, -1)[jnp.arange(n)]

    def predict(images_BxTxSxS: jax.Array, mask_BxT: jax.Array) -> dict[str, jax.Array]:
        b, t, s, _ = images_BxTxSxS.shape
        embeddings = embed(images_BxTxSxS.reshape(b * t, s, s)).reshape(b, t, -1)
        # The sequence model needs padding after the slices; the mask may have it anywhere.
        order_BxT = jnp.argsort(~mask_BxT, axis=1, stable=True)
        ordered = jnp.take_along_axis(embeddings, order_BxT[..., None], axis=1)
        model = HEADS[config.model.head](config.model.hidden, len(CLASSES))
        outputs = model.apply({'params': member.sequence}, ordered, mask_BxT.sum(1, dtype=jnp.int32))
        places_BxT = jnp.argsort(order_BxT, axis=1)
        evidence = jnp.take_along_axis(outputs.evidence, places_BxT[..., None], axis=1)
        return {
            'logits': outputs.logits / member.temperature,
            'attention': jnp.take_along_axis(outputs.attention, places_BxT, axis=1),
            'evidence': evidence / member.temperature,
        }

    return predict


WRITERS = {'.safetensors': write_safetensors, '.stablehlo': write_stablehlo}
