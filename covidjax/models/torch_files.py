"""Loads weights from PyTorch files (`torch.save`) without PyTorch and without running code (see `torch_pickle`).

There are two formats. A file of version 1.6 or later is a zip archive (see `torch_zip`). A legacy file is a sequence of
pickles: magic number, format version, facts about the machine, tensors and keys of their storages. Then each storage
follows: its number of elements and its bytes.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from covidjax.errors import UserError
from covidjax.models.torch_pickle import Fault, Tensor, check_tensors, create_array, interpret
from covidjax.models.torch_zip import load_zip

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_FORMAT_VERSION = 1001


def load_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Loads the tensors of a file; returns them by name, in their dtypes.

    The file must hold one dict of tensors (a `state_dict`); a zip may hold it under the key 'state_dict'. Memory use is
    at most about twice the size of the file, of a compressed zip up to 16 times.

    Raises:
      UserError: the file has another format or is damaged; the message gives the reason.
    """
    try:
        with path.open('rb') as file:
            return _load(file, path.stat().st_size)
    except (OSError, Fault) as error:
        raise UserError(f'{path} is not a readable file of PyTorch tensors: {error}') from error


def _load(file: BinaryIO, num_bytes: int) -> dict[str, np.ndarray]:
    start = file.read(4)
    if start[:2] == b'PK':
        return load_zip(file, num_bytes)
    if start[:3] != b'\x80\x02\x8a':
        raise Fault('it does not start like a file of torch.save')
    file.seek(0)
    if interpret(file) != _MAGIC_NUMBER or interpret(file) != _FORMAT_VERSION:
        raise Fault('its magic number is not that of torch.save')
    facts = interpret(file)
    if not isinstance(facts, dict) or facts.get('little_endian') is not True:
        raise Fault('it was not written on a little-endian machine')
    tensors = check_tensors(interpret(file), num_bytes)
    storages = _read_storages(file, tensors, num_bytes)
    return {name: create_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_storages(file: BinaryIO, tensors: dict[str, Tensor], num_bytes: int) -> dict[str, np.ndarray]:
    wanted = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    keys = interpret(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(wanted):
        raise Fault('its list of storages does not match its tensors')
    storages = {}
    for key in keys:
        num_elements = int.from_bytes(file.read(8), 'little', signed=True)
        if num_elements != wanted[key].num_elements:
            raise Fault(
                f'storage {key!r:.80} has {num_elements} elements where {wanted[key].num_elements} are announced'
            )
        size = num_elements * wanted[key].dtype.itemsize
        if size > num_bytes - file.tell():
            raise Fault(f'it ends within storage {key!r:.80}')
        storages[key] = np.frombuffer(file.read(size), wanted[key].dtype)
    return storages
