"""Weights from legacy PyTorch files (`torch.save` before version 1.6) without PyTorch, and without running their code.

A pickle is a program. This reader interprets the few instructions that a file of plain tensors needs, knows two
functions by name, and refuses everything else: nothing that a file names is ever imported or called.

A file is a row of pickles (magic number, format version, facts of the machine, the tensors, the keys of their
storages) and then, per storage, its number of elements and its bytes.
"""

import math
import pickletools
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from covidjax.errors import UserError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_FORMAT_VERSION = 1001
_MAX_INSTRUCTIONS = 200_000  # of one pickle; a tensor takes about 35
_MAX_DIMENSIONS = 8

_ORDERED_DICT = 'collections OrderedDict'
_REBUILD_TENSOR = 'torch._utils _rebuild_tensor_v2'
_DTYPES = {
    'torch FloatStorage': np.dtype('<f4'),
    'torch DoubleStorage': np.dtype('<f8'),
    'torch HalfStorage': np.dtype('<f2'),
    'torch BFloat16Storage': np.dtype(jnp.bfloat16),
    'torch LongStorage': np.dtype('<i8'),
    'torch IntStorage': np.dtype('<i4'),
}
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, *_DTYPES}


class _Fault(Exception):
    """Why a file is refused."""


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    num_elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name, in their dtypes.

    The file must hold one dict of tensors (a `state_dict`). Memory is at most about twice the size of the file.

    Raises:
      UserError: not such a file, or damaged; the message says why.
    """
    try:
        with path.open('rb') as file:
            return _load(file, path.stat().st_size)
    except (OSError, _Fault) as error:
        raise UserError(f'{path} is not a readable file of PyTorch tensors: {error}') from error


def _load(file: BinaryIO, num_bytes: int) -> dict[str, np.ndarray]:
    start = file.read(4)
    if start[:2] == b'PK':
        raise _Fault('it has the zip format; convert it with safetensors.torch.save_file')
    if start[:3] != b'\x80\x02\x8a':
        raise _Fault('it does not start as torch.save starts a file')
    file.seek(0)
    if _interpret(file) != _MAGIC_NUMBER or _interpret(file) != _FORMAT_VERSION:
        raise _Fault('its magic number is not that of torch.save')
    facts = _interpret(file)
    if not isinstance(facts, dict) or facts.get('little_endian') is not True:
        raise _Fault('it was not written on a little-endian machine')
    tensors = _interpret(file)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, _Tensor) for tensor in tensors.values()):
        raise _Fault('it holds more than one dict of tensors')
    if sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values()) > num_bytes:
        raise _Fault('its tensors are larger than the file')
    storages = _read_storages(file, tensors, num_bytes)
    return {name: _create_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_storages(file: BinaryIO, tensors: dict[str, _Tensor], num_bytes: int) -> dict[str, np.ndarray]:
    wanted = {}
    for name, tensor in tensors.items():
        if wanted.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise _Fault(f'{name!r:.80} contradicts an earlier tensor about their storage')
    keys = _interpret(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(wanted):
        raise _Fault('its list of storages is not that of its tensors')
    storages = {}
    for key in keys:
        num_elements = int.from_bytes(file.read(8), 'little', signed=True)
        if num_elements != wanted[key].num_elements:
            raise _Fault(
                f'storage {key!r:.80} has {num_elements} elements where {wanted[key].num_elements} are announced'
            )
        size = num_elements * wanted[key].dtype.itemsize
        if size > num_bytes - file.tell():
            raise _Fault(f'it ends within storage {key!r:.80}')
        storages[key] = np.frombuffer(file.read(size), wanted[key].dtype)
    return storages


def _create_array(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    strides = [stride * storage.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)


def _interpret(file: BinaryIO) -> Any:
    """Returns what the next pickle of the file describes: numbers, strings, tuples, lists, dicts and `_Tensor`s."""
    machine = _Machine()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if count == _MAX_INSTRUCTIONS:
                raise _Fault(f'it has more than {_MAX_INSTRUCTIONS} instructions')
            if instruction.name == 'STOP':
                break
            machine.execute(instruction.name, argument)
        return machine.pop()
    except (ValueError, OverflowError, MemoryError) as error:  # by genops, of bytes that are no pickle
        raise _Fault(f'damaged, or cut short ({error!s:.200})') from error


class _Machine:
    """The stack and the memo of a pickle's program."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """Executes one instruction of `pickletools`."""
        if name == 'PROTO':
            if argument != 2:
                raise _Fault(f'it has pickle protocol {argument}, not 2')
        elif name in ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINUNICODE', 'NONE', 'NEWTRUE', 'NEWFALSE'):
            self._stack.append({'NEWTRUE': True, 'NEWFALSE': False}.get(name, argument))
        elif name in ('EMPTY_TUPLE', 'EMPTY_LIST', 'EMPTY_DICT'):
            self._stack.append({'EMPTY_TUPLE': (), 'EMPTY_LIST': [], 'EMPTY_DICT': {}}[name])
        elif name == 'MARK':
            self._marks.append(len(self._stack))
        elif name == 'TUPLE':
            self._stack.append(tuple(self._pop_to_mark()))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            items = [self.pop() for _ in range(int(name[-1]))]
            self._stack.append(tuple(reversed(items)))
        elif name in ('APPEND', 'APPENDS'):
            items = [self.pop()] if name == 'APPEND' else self._pop_to_mark()
            self._peek(list).extend(items)
        elif name in ('SETITEM', 'SETITEMS'):
            items = [self.pop(), self.pop()][::-1] if name == 'SETITEM' else self._pop_to_mark()
            if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
                raise _Fault('a key is not a string')
            self._peek(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ('BINPUT', 'LONG_BINPUT'):
            self._memo[argument] = self._peek(object)
        elif name in ('BINGET', 'LONG_BINGET'):
            if argument not in self._memo:
                raise _Fault(f'it reads place {argument} of its memo, which is empty')
            self._stack.append(self._memo[argument])
        elif name == 'GLOBAL':
            if argument not in _GLOBALS:
                raise _Fault(f'it asks for {argument.replace(" ", ".")!r:.80}, which is no part of plain tensors')
            self._stack.append(_Global(argument))
        elif name == 'BINPERSID':
            self._stack.append(_describe_storage(self.pop()))
        elif name == 'REDUCE':
            arguments, function = self.pop(), self.pop()
            self._stack.append(_reduce(function, arguments))
        elif name == 'BUILD':  # sets attributes, of which a `state_dict` has one: the versions of its modules
            self.pop()
            self._peek(dict)
        else:
            raise _Fault(f'it has the instruction {name}, which plain tensors do not need')

    def pop(self) -> Any:
        """Removes the last value above the last mark and returns it."""
        self._peek(object)
        return self._stack.pop()

    def _peek(self, kind: type) -> Any:
        bottom = self._marks[-1] if self._marks else 0
        if len(self._stack) <= bottom or not isinstance(self._stack[-1], kind):
            raise _Fault('its instructions do not fit together')
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise _Fault('its instructions do not fit together')
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _describe_storage(identity: Any) -> _Storage:
    match identity:
        case ('storage', _Global(kind), str(key), str(), num_elements, None) if kind in _DTYPES:
            if _is_size(num_elements):
                return _Storage(key, _DTYPES[kind], num_elements)
    raise _Fault('a storage is not described as torch.save does')


def _reduce(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global('collections OrderedDict'), ():
            return {}
        case _Global('torch._utils _rebuild_tensor_v2'), (_Storage() as storage, offset, shape, strides, bool(), {}):
            return _describe_tensor(storage, offset, shape, strides)
    raise _Fault('it calls something with arguments that plain tensors do not need')


def _describe_tensor(storage: _Storage, offset: Any, shape: Any, strides: Any) -> _Tensor:
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MAX_DIMENSIONS:
        raise _Fault('a tensor has no valid shape and strides')
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise _Fault('a tensor has a negative or absurd shape, stride or offset')
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > 0 and last >= storage.num_elements:
        raise _Fault('a tensor reaches beyond its storage')
    return _Tensor(storage, offset, shape, strides)
