"""The JAX worker of the benchmarks: rounds of this project's functions, in a process set up like `main.py`."""

import functools
import itertools
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import covidjax
from benchmarks import workers
from covidjax.data import covidx_ct, lists
from covidjax.data.loader import load_train_batches
from covidjax.evaluation.outlines import outline_slices
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import load_box
from covidjax.models.lesions import LesionNet
from covidjax.training import runtime
from covidjax.training.augment import AugmentOptions, augment
from covidjax.training.devices import compile_step, place_batch, place_state
from covidjax.training.losses import create_cross_entropy, create_mask_objective
from covidjax.training.optimizer import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step

CLASS_WEIGHTS = (1.0, 1.0, 1.0)


def create_model(options):
    return LesionNet() if options.model == 'lesions' else Att2(backbone=options.model)


def create_variables(model, image_size):
    full = {} if isinstance(model, LesionNet) else {'full': True}
    initialise = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, image_size, image_size, 1)), train=False, **full),
        compiler_options={'xla_backend_optimization_level': 0},
    )
    return initialise(jax.random.key(0))


def draw_images(batch_size, image_size):
    return np.random.default_rng(0).integers(0, 256, (batch_size, image_size, image_size, 1), dtype=np.uint8)


def draw_batch(batch_size, image_size, model='resnet'):
    rng = np.random.default_rng(1)
    if model == 'lesions':
        masks = rng.integers(0, 8, (batch_size, image_size, image_size, 1), dtype=np.uint8)
        targets = {'masks': masks, 'known': np.full(batch_size, 7, np.uint8)}
    else:
        targets = {'label': rng.integers(0, 3, batch_size).astype(np.int32)}
    images = draw_images(batch_size, image_size)
    return place_batch({'image': images, 'mask': np.ones(batch_size, np.float32), **targets})


def create_training(model, variables, *, full=False, **options):
    """Returns the initial state and the uncompiled Adam step (state, batch, axis_name)."""
    outlines = isinstance(model, LesionNet)
    is_dead_here = functools.partial(is_dead, compatibility=getattr(model, 'compatibility', None))
    is_frozen = (lambda path: False) if full or outlines else is_dead_here
    objective = create_mask_objective() if outlines else create_cross_entropy(CLASS_WEIGHTS)
    optimizer = create_optimizer(
        optax.constant_schedule(5e-4), weight_decay=0.0, decay='decoupled', is_frozen=is_frozen
    )

    def forward(variables, images, _):
        if outlines:
            logits, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
            return logits, updates['batch_stats']
        outputs, updates = model.apply(variables, images, train=True, full=full, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    step = functools.partial(train_step, forward=forward, optimizer=optimizer, objective=objective, **options)
    # Copies, because the step donates the state.
    state = create_train_state(jax.tree.map(jnp.copy, variables), optimizer, jax.random.key(0))
    return place_state(state), step


def create_inference(model, *, dtype='float32', full=False):
    """Returns the compiled function (variables, images uint8) -> logits, in evaluation mode."""

    def apply(variables, images):
        return model.apply(variables, normalise(images).astype(dtype), train=False, full=full).logits

    return compile_fast(apply)


def create_train_round(options, augmentation=None):
    """Returns a function that makes one step per batch and waits for the last one; and the worker's facts."""
    model = create_model(options)
    state, step = create_training(
        model, create_variables(model, options.image_size), augmentation=augmentation, dtype=options.dtype
    )
    compiled = compile_step(step, 'jit')

    def train(batches):
        nonlocal state
        count = 0
        for batch in batches:
            state, sums = compiled(state, batch)
            count += len(batch['image'])
        jax.block_until_ready(sums)
        return count

    shapes = jax.eval_shape(lambda: state)
    batch = jax.eval_shape(lambda: draw_batch(options.batch_size, options.image_size, options.model))
    return train, {**describe(), 'flops': compiled.lower(shapes, batch).cost_analysis()['flops']}


def start_training(options):
    train, facts = create_train_round(options)
    batch = draw_batch(options.batch_size, options.image_size, options.model)
    return lambda: train(itertools.repeat(batch, options.steps)), facts


def start_compilation(options):
    """Compiles a training step or loads it from the cache; the facts hold the seconds, rounds do nothing."""
    model = Att2(backbone=options.model)
    state, step = create_training(
        model, create_variables(model, options.image_size), augmentation=None, dtype=options.dtype
    )
    batch = draw_batch(options.batch_size, options.image_size)
    start = time.perf_counter()
    lowered = compile_step(step, 'jit').lower(state, batch)
    middle = time.perf_counter()
    lowered.compile()
    return lambda: 0, {**describe(), 'tracing': middle - start, 'compiling': time.perf_counter() - middle}


def start_inference(options):
    model = Att2(backbone=options.model)
    folded = fold_batch_norm(create_variables(model, options.image_size))  # as `runs.Member.folded`
    variables = jax.tree.map(lambda x: x.astype(options.dtype), folded)
    images = jnp.asarray(draw_images(options.batch_size, options.image_size))
    apply = create_inference(model, dtype=options.dtype)

    def infer():
        for _ in range(options.steps):
            logits = apply(variables, images)
        jax.block_until_ready(logits)
        return options.batch_size * options.steps

    return infer, {**describe(), 'flops': apply.lower(variables, images).cost_analysis()['flops']}


def start_outlines(options):
    """A round outlines `steps` batches of slices with the model of this package, as a prediction does."""
    box = load_box()
    images = draw_images(options.batch_size * options.steps, box.image_size)[..., 0]
    return lambda: len(outline_slices(box, images)), describe()


def start_augmentation(options):
    images = draw_images(options.batch_size, options.image_size)

    def augment_batch(key, images):
        keys = jax.random.split(key, len(images))
        unit = images.astype(jnp.float32) / 255
        return jax.vmap(lambda key, image: augment(key, image, options=AugmentOptions()))(keys, unit)

    compiled = compile_fast(augment_batch)
    numbers = itertools.count()

    def augment_batches():
        for _ in range(options.steps):
            done = compiled(jax.random.key(next(numbers)), images)
        jax.block_until_ready(done)
        return options.batch_size * options.steps

    return augment_batches, describe()


def open_data(options):
    return covidx_ct.prepare(options.folder, image_size=options.image_size, prepared_dir=options.prepared_dir)


def load_batches(data, options, first_step):
    # A new stream for each round: a shared one would read ahead while the other worker is measured.
    batches = load_train_batches(data.sources['train'], batch_size=options.batch_size, seed=0, first_step=first_step)
    return itertools.islice(batches, options.steps)


def start_epoch(options):
    """A round makes `steps` steps with augmentation; batches are read, decoded and placed in parallel."""
    data = open_data(options)
    train, facts = create_train_round(options, AugmentOptions())
    first_steps = itertools.count(step=options.steps)
    return lambda: train(map(place_batch, load_batches(data, options, next(first_steps)))), facts


def start_loading(options):
    data = open_data(options)
    first_steps = itertools.count(step=options.steps)
    return lambda: sum(len(batch['label']) for batch in load_batches(data, options, next(first_steps))), describe()


def start_preparation(options):
    """Each round prepares the raw folder into a new folder, <prepared_dir>/<number of the round>."""
    numbers = itertools.count()

    def prepare():
        prepared_dir = os.path.join(options.prepared_dir, str(next(numbers)))
        data = covidx_ct.prepare(options.folder, image_size=options.image_size, prepared_dir=prepared_dir)
        return sum(map(len, data.rows.values()))

    return prepare, describe()


def start_pillow_loop(options):
    """A round runs the baseline, a ten-line script: the same pixels, one PNG file after the other."""
    rows = [row for split in lists.read_lists(options.folder).values() for row in split]
    images = lists.find_images(options.folder, lists.find_version(options.folder))
    size = (options.image_size, options.image_size)

    def prepare():
        folder = tempfile.mkdtemp(dir=options.prepared_dir)
        for row in rows:
            with Image.open(os.path.join(images, row.file)) as image:
                grey = image.crop(row.box).convert('L').resize(size, Image.Resampling.BICUBIC)
            grey.save(os.path.join(folder, row.file), compress_level=3)  # as in `preprocess.encode_png`
        return len(rows)

    return prepare, describe()


def start_matrix_product(options):
    """A round computes `steps` products of 4096 x 4096 matrices."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 4096)), jnp.float32)
    multiply = jax.jit(jnp.dot)

    def multiply_matrices():
        for _ in range(options.steps):
            product = multiply(x, x)
        jax.block_until_ready(product)
        return options.steps

    return multiply_matrices, {**describe(), 'flops': 2 * 4096**3}


def describe():
    return {'covidjax': covidjax.__version__, 'jax': jax.__version__, 'devices': len(jax.devices())}


if __name__ == '__main__':
    runtime.use_compilation_cache()
    runtime.keep_freed_memory()
    workers.serve(
        {
            'train': start_training,
            'compile': start_compilation,
            'inference': start_inference,
            'outline': start_outlines,
            'augment': start_augmentation,
            'epoch': start_epoch,
            'load': start_loading,
            'prepare': start_preparation,
            'pillow': start_pillow_loop,
            'matrix': start_matrix_product,
        }
    )
