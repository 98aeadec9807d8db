r"""Checks and times this project on one accelerator; ends by itself within 8 minutes.

  python benchmarks/gpu.py --output=<folder>          writes gpu.json and gpu.md, and prints the table
  python benchmarks/gpu.py --output=<folder> --tiny   the same in seconds on a CPU, to see that it runs

It needs jax, flax, optax and numpy only. Correctness comes first, then speed, then PyTorch where it is installed with
torchvision and efficientnet_lite_pytorch. What the time budget does not allow is skipped, and the table says so.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leaves memory to PyTorch; measures the peak
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from covidjax.models import fast
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.folding import fold_batch_norm
from covidjax.training.augment import AugmentOptions, augment
from covidjax.training.losses import create_cross_entropy
from covidjax.training.optimizer import create_optimizer
from covidjax.training.state import TrainState, create_train_state
from covidjax.training.step import cast, train_step

# Dense peak in TFLOP/s by precision, from the data sheets; the first name that the device's name holds counts.
PEAKS = {
    'H200': {'float32': 67, 'tf32': 495, 'bfloat16': 989},
    'H100': {'float32': 67, 'tf32': 495, 'bfloat16': 989},
    'A100': {'float32': 19.5, 'tf32': 156, 'bfloat16': 312},
    'L40S': {'float32': 91.6, 'tf32': 183, 'bfloat16': 362},
    'L4': {'float32': 30.3, 'tf32': 60, 'bfloat16': 121},
    'T4': {'float32': 8.1},
}
# Precision -> (dtype of activations, precision of float32 products).
PRECISIONS = {'float32': ('float32', 'highest'), 'tf32': ('float32', 'default'), 'bfloat16': ('bfloat16', 'default')}
# Largest difference from the CPU's float32, as a share of the largest value.
TOLERANCES = {'float32': 1e-3, 'tf32': 2e-2, 'bfloat16': 1e-1}
LOSS_TOLERANCES = {'float32': 1e-3, 'tf32': 1e-2, 'bfloat16': 5e-2}  # of the loss of a step, relative
FORM_TOLERANCE = 1e-4  # of the forms of `models.fast` against the plain ones, float32
AUGMENTATION_TOLERANCE = 1e-3  # mean difference of grey values in [0, 1]


class Settings(NamedTuple):
    """What is run.

    Attributes:
      models: options of `Att2` by name.
      image_size: side of a slice in pixels.
      batch_sizes: for speed.
      check_batch: batch size for correctness; the CPU computes it too.
      precisions: of `PRECISIONS`.
      repeats: timed calls.
      seconds: time budget.
      compiler_options: of every program.
    """

    models: dict[str, dict[str, Any]]
    image_size: int
    batch_sizes: tuple[int, ...]
    check_batch: int
    precisions: tuple[str, ...]
    repeats: int
    seconds: float
    compiler_options: dict[str, Any] = MappingProxyType({})


WHOLE = Settings(
    {'ResNet50-ATT2': {}, 'light': {'backbone': 'efficientnet_lite0'}}, 224, (64, 256), 4, tuple(PRECISIONS), 10, 450
)
TINY = Settings(
    {'ResNet-ATT2, tiny': {'stage_sizes': (1, 1, 1, 1), 'width': 8, 'tail_blocks': 1}},
    32,
    (2,),
    2,
    ('float32', 'bfloat16'),
    1,
    240,
    {'xla_backend_optimization_level': 0},  # compiling is most of the time
)


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      what: 'inference', 'training step' or 'augmentation'.
      model: name of the model; '' for augmentation.
      precision: of `PRECISIONS`.
      batch_size: images per call.
      function: pure.
      create_inputs: () -> its arguments.
    """

    what: str
    model: str
    precision: str
    batch_size: int
    function: Callable[..., Any]
    create_inputs: Callable[[], tuple[Any, ...]]


def draw_batch(batch_size: int, image_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, image_size, image_size, 1), dtype=np.uint8)
    labels = rng.integers(0, 3, batch_size).astype(np.int32)
    return {'image': images, 'label': labels, 'mask': np.ones(batch_size, np.float32)}


@functools.cache
def _create_variables(options: tuple, image_size: int) -> dict[str, Any]:
    model = Att2(**dict(options))
    create = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, image_size, image_size, 1)), train=False, full=True),
        compiler_options={'xla_backend_optimization_level': 0},
    )
    return jax.device_get(create(jax.random.key(0)))


def create_inference(
    options: dict[str, Any], settings: Settings, precision: str, batch_size: int, name: str
) -> Program:
    model = Att2(**options)
    dtype, products = PRECISIONS[precision]

    def infer(variables, images):
        with jax.default_matmul_precision(products):
            return model.apply(variables, normalise(images).astype(dtype), train=False).logits.astype(jnp.float32)

    def create_inputs():
        variables = fold_batch_norm(_create_variables(tuple(options.items()), settings.image_size))
        return cast(variables, dtype), draw_batch(batch_size, settings.image_size)['image']

    return Program('inference', name, precision, batch_size, infer, create_inputs)


def create_training(options: dict[str, Any], settings: Settings, precision: str, batch_size: int, name: str) -> Program:
    model = Att2(**options)
    dtype, products = PRECISIONS[precision]
    optimizer = create_optimizer(
        optax.constant_schedule(5e-4),
        weight_decay=0.0,
        decay='decoupled',
        is_frozen=functools.partial(is_dead, compatibility=model.compatibility),
    )

    def forward(variables, images, _):
        outputs, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    def step(state, batch):  # returns the new state, so that the update is computed
        with jax.default_matmul_precision(products):
            return train_step(
                state,
                batch,
                forward=forward,
                optimizer=optimizer,
                objective=create_cross_entropy((1.0, 1.0, 1.0)),
                augmentation=None,
                dtype=dtype,
            )

    def create_inputs():
        variables = _create_variables(tuple(options.items()), settings.image_size)
        state = create_train_state(jax.tree.map(jnp.asarray, variables), optimizer, jax.random.key(0))
        return state, draw_batch(batch_size, settings.image_size)

    return Program('training step', name, precision, batch_size, step, create_inputs)


def create_augmentation(settings: Settings, batch_size: int) -> Program:
    def augment_batch(keys, images):
        unit = images.astype(jnp.float32) / 255
        return jax.vmap(functools.partial(augment, options=AugmentOptions()))(keys, unit)

    def create_inputs():
        keys = jax.random.split(jax.random.key(0), batch_size)
        return keys, draw_batch(batch_size, settings.image_size)['image']

    return Program('augmentation', '', 'float32', batch_size, augment_batch, create_inputs)


def list_programs(settings: Settings, batch_sizes: tuple[int, ...]) -> Iterator[Program]:
    """Yields every program in the order in which it is worth having; all use one batch of one size."""
    for batch_size in batch_sizes:
        yield create_augmentation(settings, batch_size)
        for create in (create_inference, create_training):
            for name, options in settings.models.items():
                for precision in settings.precisions:
                    yield create(options, settings, precision, batch_size, name)


def list_forms() -> dict[str, tuple[Callable, Callable, tuple[tuple[int, ...], ...]]]:
    """Returns every custom form of `models.fast`: (form, plain form, shapes of the arguments)."""
    products = (((3,), (0,)), ((), ()))

    def pool(x):
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)

    def convolve(x, kernel, stride, groups=1, padding=((1, 1), (1, 1))):
        layout = ('NHWC', 'HWIO', 'NHWC')
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=layout, feature_group_count=groups
        )

    forms = {
        'max_pool': (fast.max_pool, pool, ((2, 8, 8, 4),)),
        'materialise': (fast.materialise, lambda x: x, ((2, 8, 8, 4),)),
    }
    for name, form in (('dot_general', fast.dot_general), ('dot_general_of_maps', fast.dot_general_of_maps)):
        forms[name] = (lambda x, k, form=form: form(x, k, products), jnp.dot, ((2, 8, 8, 16), (16, 8)))
    for size, channels, stride in ((8, 4, 1), (8, 4, 2), (2, 4, 1), (8, 64, 1), (28, 64, 1)):
        forms[f'conv3x3, {size} pixels, {channels} channels, stride {stride}'] = (
            functools.partial(fast.conv3x3, stride=stride),
            functools.partial(convolve, stride=stride),
            ((2, size, size, channels), (3, 3, channels, channels)),
        )
    for stride in (1, 2):
        forms[f'depthwise_conv, stride {stride}'] = (
            functools.partial(fast.depthwise_conv, stride=stride),
            lambda x, k, stride=stride: convolve(x, k[:, :, None], stride, x.shape[-1], 'SAME'),
            ((2, 9, 8, 4), (5, 5, 4)),
        )
    return forms


def compile_program(
    function: Callable, inputs: tuple, device: jax.Device, options: Any
) -> tuple[Any, tuple, float, float]:
    """Returns the compiled function, its arguments on the device, the FLOPs of a call and the seconds of compiling."""
    placed = jax.device_put(inputs, device)
    start = time.perf_counter()
    lowered = jax.jit(function, compiler_options=dict(options)).lower(*placed)
    flops = (lowered.cost_analysis() or {}).get('flops', math.nan)
    compiled = lowered.compile()
    return compiled, placed, flops, time.perf_counter() - start


def compute(function: Callable, inputs: tuple, device: jax.Device, options: Any) -> Any:
    compiled, placed, *_ = compile_program(function, inputs, device, options)
    outputs = compiled(*placed)
    return jax.device_get(outputs[-1] if isinstance(outputs[0], TrainState) else outputs)  # of a step, its sums


def compare(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference as a share of the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))


def check_forms(settings: Settings, device: jax.Device) -> Iterator[dict[str, Any]]:
    """Compares every custom form and its gradients with the plain one on the same device."""
    rng = np.random.default_rng(0)
    for name, (form, plain, shapes) in list_forms().items():
        inputs = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)

        def differentiate(function, inputs=inputs):
            def run(*inputs):
                with jax.default_matmul_precision('highest'):
                    value, pull = jax.vjp(function, *inputs)
                    return value, *pull(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))

            return compute(run, inputs, device, settings.compiler_options)

        error = max(map(compare, differentiate(form), differentiate(plain)))
        yield {'what': f'{name}, with gradients', 'error': error, 'tolerance': FORM_TOLERANCE}


def check_programs(settings: Settings, device: jax.Device, cpu: jax.Device) -> Iterator[dict[str, Any]]:
    """Compares every program with the CPU's float32."""
    expected, options = {}, settings.compiler_options
    for program in list_programs(settings, (settings.check_batch,)):
        key = program.what, program.model
        inputs = program.create_inputs()
        actual = compute(program.function, inputs, device, options)
        if program.precision == 'float32':
            expected[key] = actual if device == cpu else compute(program.function, inputs, cpu, options)
        what = ', '.join(part for part in (*key, program.precision) if part)
        if program.what == 'inference':
            yield {
                'what': what,
                'error': compare(actual, expected[key]),
                'tolerance': TOLERANCES[program.precision],
            }
        elif program.what == 'augmentation':
            error = float(np.abs(actual - expected[key]).mean())
            yield {'what': what, 'error': error, 'tolerance': AUGMENTATION_TOLERANCE}
        else:
            error = compare(actual['loss'], expected[key]['loss'])
            if not np.isfinite(actual['gradient_norm']):
                error = math.inf
            yield {'what': f'{what}, loss', 'error': error, 'tolerance': LOSS_TOLERANCES[program.precision]}


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Returns the median seconds of a call, after two that are not counted."""
    seconds = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        wait(call())
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def find_peak(device: jax.Device, precision: str) -> float | None:
    """Returns the peak FLOP/s of a device, None if it is not known."""
    found = next((peaks for name, peaks in PEAKS.items() if name in device.device_kind), {})
    return found[precision] * 1e12 if precision in found else None


def measure_program(program: Program, settings: Settings, device: jax.Device) -> dict[str, Any]:
    compiled, placed, flops, seconds = compile_program(
        program.function, program.create_inputs(), device, settings.compiler_options
    )
    median = time_calls(lambda: compiled(*placed), jax.block_until_ready, settings.repeats)
    peak = find_peak(device, program.precision)
    memory = compiled.memory_analysis()
    used = getattr(memory, 'temp_size_in_bytes', 0) + getattr(memory, 'argument_size_in_bytes', 0)
    return {
        'side': 'covidjax',
        **{name: getattr(program, name) for name in ('what', 'model', 'precision', 'batch_size')},
        'images_per_s': program.batch_size / median,
        'share_of_peak': flops / median / peak if peak else None,
        'memory_mb': used / 1e6,
        'compile_s': seconds,
    }


def list_torch_measurements(settings: Settings) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yields functions that measure PyTorch on the same device; none where it is not installed or is tiny."""
    try:
        import torch

        from tests.goldens.torch_models import Lite0Att2, ResNet50Att2
    except ImportError:
        return
    if settings is not WHOLE or not torch.cuda.is_available():
        return
    classes = {'ResNet50-ATT2': ResNet50Att2, 'light': Lite0Att2}
    forms = {'eager': (False, False), 'channels_last': (True, False), 'compile': (True, True)}
    for batch_size in settings.batch_sizes:
        for what in ('inference', 'training step'):
            for model in settings.models:
                for precision in settings.precisions:
                    for form in forms:
                        chosen = classes[model], forms[form]
                        key = {'what': what, 'model': model, 'precision': precision, 'batch_size': batch_size}
                        yield functools.partial(measure_torch, torch, *chosen, {'side': f'PyTorch {form}', **key})


def measure_torch(torch: Any, create: Callable, form: tuple[bool, bool], row: dict[str, Any]) -> dict[str, Any]:
    channels_last, is_compiled = form
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = row['precision'] != 'float32'
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = create().cuda().to(memory_format=layout)
    images = torch.rand(row['batch_size'], 3, 224, 224, device='cuda').mul(2).sub(1).contiguous(memory_format=layout)
    labels = torch.randint(0, 3, (row['batch_size'],), device='cuda')
    run = torch.compile(model) if is_compiled else model
    optimizer, loss_function = torch.optim.Adam(model.parameters(), lr=5e-4), torch.nn.CrossEntropyLoss()
    autocast = functools.partial(torch.autocast, 'cuda', torch.bfloat16, enabled=row['precision'] == 'bfloat16')

    def infer():
        with torch.inference_mode(), autocast():
            return run(images)[0]

    def train():
        optimizer.zero_grad()
        with autocast():
            loss = loss_function(run(images)[0].float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    is_training = row['what'] == 'training step'
    model.train(is_training)
    call = train if is_training else infer
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    median = time_calls(call, lambda _: torch.cuda.synchronize(), WHOLE.repeats)
    used = torch.cuda.max_memory_allocated() / 1e6
    return {**row, 'images_per_s': row['batch_size'] / median, 'memory_mb': used, 'compile_s': first}


def format_tables(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [f'{results["device"]}, jax {results["jax"]}; {results["end"]}.', '']
    lines += ['| check | difference | tolerance | |', '|---|---|---|---|']
    lines += [
        f'| {row["what"]} | {row["error"]:.1e} | {row["tolerance"]:g} | {"ok" if row["ok"] else "**too large**"} |'
        for row in results['checks']
    ]
    lines += ['', '| side | what | precision | batch | images/s | share of peak | memory, MB | compiling, s |']
    lines += ['|---|---|---|---|---|---|---|---|']
    for row in results['speed']:
        what = ', '.join(part for part in (row['what'], row['model']) if part)
        if 'failed' in row:
            lines.append(
                f'| {row["side"]} | {what} | {row["precision"]} | {row["batch_size"]} | {row["failed"]} | | | |'
            )
            continue
        share = '' if row.get('share_of_peak') is None else f'{row["share_of_peak"]:.2f}'
        numbers = f'{row["images_per_s"]:,.0f} | {share} | {row["memory_mb"]:,.0f} | {row["compile_s"]:.1f}'
        lines.append(f'| {row["side"]} | {what} | {row["precision"]} | {row["batch_size"]} | {numbers} |')
    return '\n'.join(lines)


def write_results(results: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / 'gpu.json').write_text(json.dumps(results, indent=1))
    (output / 'gpu.md').write_text(format_tables(results) + '\n')


def run(settings: Settings, output: Path) -> dict[str, Any]:
    """Runs everything and writes the results; a timer ends the process if a single call outlasts the budget."""
    device, cpu = jax.devices()[0], jax.devices('cpu')[0]
    start = time.monotonic()
    results = {
        'device': f'{device.device_kind} ({device.platform})',
        'jax': jax.__version__,
        'checks': [],
        'speed': [],
        'end': 'cut off by the time budget in the middle of a program',
    }

    def stop():
        write_results(results, output)
        print(format_tables(results), flush=True)
        os._exit(3)

    timer = threading.Timer(settings.seconds, stop)
    timer.daemon = True
    timer.start()
    skipped = 0
    for check in (check_forms(settings, device), check_programs(settings, device, cpu)):
        for row in check:
            results['checks'].append({**row, 'ok': bool(row['error'] <= row['tolerance'])})
    measurements = [
        functools.partial(measure_program, program, settings, device)
        for program in list_programs(settings, settings.batch_sizes)
    ]
    for measure in (*measurements, *list_torch_measurements(settings)):
        if time.monotonic() - start > 0.8 * settings.seconds:
            skipped += 1
            continue
        try:
            results['speed'].append(measure())
        except Exception as error:  # one that does not fit into memory must not end the others
            row = next(arg for arg in measure.args if isinstance(arg, Program | dict))
            row = row._asdict() | {'side': 'covidjax'} if isinstance(row, Program) else row
            kept = {name: row[name] for name in ('side', 'what', 'model', 'precision', 'batch_size')}
            results['speed'].append({**kept, 'failed': f'{type(error).__name__}'})
    timer.cancel()
    results['end'] = f'{time.monotonic() - start:.0f} s' + (f', {skipped} programs skipped for time' if skipped else '')
    write_results(results, output)
    print(format_tables(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('runs/gpu'), help='folder for gpu.json and gpu.md')
    parser.add_argument('--tiny', action='store_true', help='tiny models and images')
    options = parser.parse_args()
    results = run(TINY if options.tiny else WHOLE, options.output)
    if not all(row['ok'] for row in results['checks']):
        sys.exit('error: a check is above its tolerance')


if __name__ == '__main__':
    main()
