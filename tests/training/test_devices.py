"""Compares small models on many devices; `compare_devices.py` compares the full ones."""

import jax
import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.training.devices import check_batch_size, compile_step, pad_batch_size
from tests.training import compare_devices


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('devices')


@pytest.fixture(scope='module')
def one_device():
    with jax.enable_x64(True):
        return compare_devices.train('small att2', 'jit')


@pytest.mark.parametrize(('parallelism', 'devices', 'processes'), [('jit', 8, 1), ('pmap', 8, 1), ('jit', 2, 2)])
def test_any_number_of_devices_trains_alike(folder, one_device, parallelism, devices, processes):
    other = compare_devices.run(folder, 'small att2', parallelism=parallelism, devices=devices, processes=processes)
    assert compare_devices.compare(one_device, other) <= 1e-9


def test_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    check_batch_size(32, 4)
    assert [pad_batch_size(n) for n in (1, 8, 12)] == [8, 8, 16]
    with pytest.raises(UserError, match=r'batch_size=12 does not divide over 8 devices: pass a multiple of 8$'):
        check_batch_size(12, 1)
    with pytest.raises(UserError, match='batch_size=32 does not divide over 8 devices in 8 parts'):
        check_batch_size(32, 8)


def test_unknown_parallelism():
    with pytest.raises(ValueError, match="'threads'"):
        compile_step(np.add, 'threads')
