import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from covidjax.configs import att2
from covidjax.data import covidx_ct
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError
from covidjax.experiment import common, slices
from covidjax.models.torch_names import to_torch
from covidjax.training.checkpoints import open_checkpoints
from covidjax.training.devices import compile_step
from covidjax.training.loop import read_history
from tests.variables import draw_variables


def create_config(raw_dir, weights):
    config = att2.get_config(str(raw_dir)).unlock()
    config.data.image_size = 32
    config.model.update(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1)
    config.model.pretrained = str(weights)
    config.train.update(
        batch_size=4, steps_per_epoch=4, num_epochs=1, checkpoint_steps=2, learning_rate=1e-5, augment='none'
    )
    return config.lock()


def fit(config, data, workdir):
    """Trains; returns the losses per epoch and the model's variables."""
    with open_checkpoints(workdir) as checkpoints:
        common.fit(slices.create_experiment(config, data), checkpoints, workdir)
        variables = slices.restore_best(config, checkpoints)
    return [(entry['train_loss'], entry['val_loss']) for entry in read_history(workdir)], variables


def test_a_mistyped_directory_is_told_before_weights_are_looked_for(tmp_path):
    config = create_config(tmp_path / 'nowhere', tmp_path / 'no.safetensors')
    with pytest.raises(UserError, match='there is no directory'):
        slices.train(config, tmp_path / 'run')


def test_pretrained_run_that_dies_in_its_first_epoch_ends_as_if_it_had_not(tmp_path, monkeypatch):
    write_phantoms(tmp_path / 'raw', PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=64, max_slices=20))
    weights = tmp_path / 'weights.safetensors'
    config = create_config(tmp_path / 'raw', weights)
    data = covidx_ct.prepare(config.data.raw_dir, image_size=32, prepared_dir=str(tmp_path / 'prepared'))
    model = slices.create_model(config.model)
    tensors = to_torch(draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True))
    safetensors.numpy.save_file(tensors, weights)
    load_batches = slices.load_train_batches

    def die_at(step):
        def load(source, *, first_step, **options):
            batches = load_batches(source, first_step=first_step, **options)
            yield from itertools.islice(batches, step - first_step)
            raise MemoryError  # simulates a killed process: the loop does not handle it

        monkeypatch.setattr(slices, 'load_train_batches', load)

    shared = []  # all runs share one step, compiled once

    def compile_once(*arguments):
        if not shared:
            shared.append(compile_step(*arguments))
        return shared[0]

    monkeypatch.setattr(common, 'compile_step', compile_once)
    die_at(1)  # before the first checkpoint: the weights are loaded again
    with pytest.raises(MemoryError):
        fit(config, data, tmp_path / 'killed')
    die_at(3)  # after the checkpoint of step 2, which holds the weights
    with pytest.raises(MemoryError):
        fit(config, data, tmp_path / 'killed')
    monkeypatch.setattr(slices, 'load_train_batches', load_batches)
    whole = fit(config, data, tmp_path / 'whole')
    weights.unlink()
    killed = fit(config, data, tmp_path / 'killed')

    assert killed[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, killed[1], whole[1])
    # Four Adam steps move a weight by at most about four learning rates.
    kernel = killed[1]['params']['backbone']['conv1']['kernel']
    np.testing.assert_allclose(kernel, tensors['conv1.weight'].transpose(2, 3, 1, 0), atol=1e-4)
