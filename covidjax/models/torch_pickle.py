"""Interprets the pickles of PyTorch files without running code.

A pickle is a program. This reader executes only the few instructions that a file of plain tensors needs, accepts two
function names and the types of storages, and rejects everything else. Nothing that a file names is imported or called.
"""

import math
import pickletools
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_MAX_INSTRUCTIONS = 200_000  # per pickle; a tensor takes about 35
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
    'torch ShortStorage': np.dtype('<i2'),
    'torch CharStorage': np.dtype('i1'),
    'torch ByteStorage': np.dtype('u1'),
}
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, *_DTYPES}


class Fault(Exception):
    """The reason why a file is rejected."""


class _Global(NamedTuple):
    name: str


class Storage(NamedTuple):
    """A block of numbers that tensors are views of."""

    key: str
    dtype: np.dtype
    num_elements: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def check_tensors(value: Any, num_bytes: int) -> dict[str, Tensor]:
    """Returns `value` if it is a dict of tensors that take at most `num_bytes` and agree on their storages.

    Raises:
      Fault: it is not.
    """
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise Fault('it does not hold just one dict of tensors')
    if sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in value.values()) > num_bytes:
        raise Fault('its tensors are larger than the file')
    storages: dict[str, Storage] = {}
    for name, tensor in value.items():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise Fault(f'{name!r:.80} contradicts an earlier tensor on the same storage')
    return value


def create_array(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Returns a tensor as a contiguous array; `storage` has all elements of its storage, flat."""
    strides = [stride * storage.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)


def interpret(file: BinaryIO) -> Any:
    """Returns the value of the next pickle: numbers, strings, tuples, lists, dicts and `Tensor`s.

    Raises:
      Fault: it is damaged or holds anything else.
    """
    machine = _Machine()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
            if count == _MAX_INSTRUCTIONS:
                raise Fault(f'it has more than {_MAX_INSTRUCTIONS} instructions')
            if instruction.name == 'STOP':
                break
            machine.execute(instruction.name, argument)
        return machine.pop()
    except (ValueError, OverflowError, MemoryError) as error:  # from genops, if the bytes are not a pickle
        raise Fault(f'it is damaged or truncated ({error!s:.200})') from error


class _Machine:
    """The state of a pickle's program: its stack and its memo."""

    def __init__(self):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        """Executes one instruction of `pickletools`."""
        if name == 'PROTO':
            if argument != 2:
                raise Fault(f'it has pickle protocol {argument}, not 2')
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
                raise Fault('a key is not a string')
            self._peek(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ('BINPUT', 'LONG_BINPUT'):
            self._memo[argument] = self._peek(object)
        elif name in ('BINGET', 'LONG_BINGET'):
            if argument not in self._memo:
                raise Fault(f'it reads entry {argument} of its memo, which is not set')
            self._stack.append(self._memo[argument])
        elif name == 'GLOBAL':
            if argument not in _GLOBALS:
                raise Fault(f'it asks for {argument.replace(" ", ".")!r:.80}, which plain tensors do not need')
            self._stack.append(_Global(argument))
        elif name == 'BINPERSID':
            self._stack.append(_describe_storage(self.pop()))
        elif name == 'REDUCE':
            arguments, function = self.pop(), self.pop()
            self._stack.append(_reduce(function, arguments))
        elif name == 'BUILD':  # sets attributes; a `state_dict` has one, the versions of its modules
            self.pop()
            self._peek(dict)
        else:
            raise Fault(f'it has the instruction {name}, which plain tensors do not need')

    def pop(self) -> Any:
        """Removes and returns the last value, which must be above the last mark."""
        self._peek(object)
        return self._stack.pop()

    def _peek(self, kind: type) -> Any:
        bottom = self._marks[-1] if self._marks else 0
        if len(self._stack) <= bottom or not isinstance(self._stack[-1], kind):
            raise Fault('its instructions do not fit together')
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise Fault('its instructions do not fit together')
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _describe_storage(identity: Any) -> Storage:
    match identity:
        case ('storage', _Global(kind), str(key), str(), num_elements, *view) if kind in _DTYPES:
            # A legacy file names a view of the storage in the last place, or None; a zip has no such place.
            if view in ([], [None]) and _is_size(num_elements):
                return Storage(key, _DTYPES[kind], num_elements)
    raise Fault('a storage is not described as torch.save describes it')


def _reduce(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global('collections OrderedDict'), ():
            return {}
        case _Global('torch._utils _rebuild_tensor_v2'), (Storage() as storage, offset, shape, strides, bool(), {}):
            return _describe_tensor(storage, offset, shape, strides)
    raise Fault('it calls something with arguments that plain tensors do not need')


def _describe_tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= _MAX_DIMENSIONS:
        raise Fault('a tensor has no valid shape and strides')
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise Fault('a tensor has a negative or absurd shape, stride or offset')
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > 0 and last >= storage.num_elements:
        raise Fault('a tensor reaches beyond its storage')
    return Tensor(storage, offset, shape, strides)
