import pickle
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.models.pretrained import LITE0, find_weights
from covidjax.models.torch_files import load_torch_file
from tests import torch_archives
from tests.torch_archives import SIX_FLOATS, assert_refused, encode, load, name_global


def encode_storage(kind='FloatStorage', key='0', num_elements=6, view=None):
    return torch_archives.encode_storage(kind, key, num_elements, (view,))


def encode_tensor(storage=None, **view):
    return torch_archives.encode_tensor(encode_storage() if storage is None else storage, **view)


def build(
    state=None,
    data=SIX_FLOATS,
    num_elements=6,
    magic=0x1950A86A20F9469CFC6C,
    facts=None,
    keys=('0',),
    **tensor,
):
    """Returns a file in the format of torch.save, with one tensor 'w'."""
    if state is None:
        state = name_global('collections.OrderedDict') + b')R(' + encode('w') + encode_tensor(**tensor) + b'u'
    facts = {'protocol_version': 1001, 'little_endian': True} if facts is None else facts
    head = b''.join(pickle.dumps(value, 2) for value in (magic, 1001, facts))
    body = b'\x80\x02' + state + b'.' + pickle.dumps(list(keys), 2)
    return head + body + struct.pack('<q', num_elements) + data


def test_a_tensor(tmp_path):
    np.testing.assert_array_equal(load(tmp_path, build())['w'], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ('offset', 'shape', 'strides', 'expected'),
    [
        (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),
        (2, (2,), (3,), [2, 5]),
        (5, (), (), 5),
        (0, (0, 3), (3, 1), np.zeros((0, 3))),
        (0, (2, 2), (0, 1), [[0, 1], [0, 1]]),
    ],
)
def test_views(tmp_path, offset, shape, strides, expected):
    np.testing.assert_array_equal(
        load(tmp_path, build(offset=offset, shape=shape, strides=strides))['w'], expected, strict=False
    )


@pytest.mark.parametrize(
    ('kind', 'dtype'),
    [
        ('DoubleStorage', np.float64),
        ('HalfStorage', np.float16),
        ('BFloat16Storage', jnp.bfloat16),
        ('LongStorage', np.int64),
        ('IntStorage', np.int32),
        ('ShortStorage', np.int16),
        ('CharStorage', np.int8),
        ('ByteStorage', np.uint8),
    ],
)
def test_dtypes(tmp_path, kind, dtype):
    content = build(storage=encode_storage(kind), data=np.arange(6).astype(dtype).tobytes())
    tensor = load(tmp_path, content)['w']
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor.astype(int), [[0, 1, 2], [3, 4, 5]])


def test_attributes_of_the_dict_are_ignored(tmp_path):
    entries = name_global('collections.OrderedDict') + b')R(' + encode('w') + encode_tensor() + b'u'
    state = entries + encode({'_metadata': {'': {'version': 1}}, '__class__': 1}) + b'b'
    assert list(load(tmp_path, build(state=state))) == ['w']


def test_the_file_of_the_wheel():
    tensors = load_torch_file(find_weights(LITE0))
    assert len(tensors) == 296
    assert tensors['_conv_stem.weight'].shape == (32, 3, 3, 3)
    assert tensors['_bn0.num_batches_tracked'].dtype == np.int64
    # 4,652,008 parameters, plus mean and variance of 21,008 normalised channels.
    floats = [tensor for tensor in tensors.values() if tensor.dtype == np.float32]
    assert sum(tensor.size for tensor in floats) == 4_652_008 + 2 * 21_008
    assert all(np.isfinite(tensor).all() for tensor in floats)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def deepen(levels):
    """Returns a tuple with 2 ** levels leaves, whose pickle has a few bytes per level."""
    value = ()
    for _ in range(levels):
        value = (value, value)
    return value


w = encode('w')
HOSTILE = {
    'system': (build(state=name_global('os.system') + encode('true') + b'\x85R'), 'asks for .os.system'),
    'eval': (build(state=name_global('builtins.eval') + encode('1') + b'\x85R'), 'asks for .builtins.eval'),
    'eval of Python 2': (build(state=encode(Call(eval, '1'))), 'asks for .__builtin__.eval'),
    'eval as facts': (build(facts=Call(eval, '1')), 'asks for'),
    'eval as magic number': (build(magic=Call(eval, '1')), 'does not start'),
    'long name': (build(state=name_global(f'os.{"x" * 10_000}')), 'asks for .os.xx'),
    'nested call': (build(state=encode_tensor() + encode(()) + b'R'), 'calls something'),
    'dict with arguments': (build(state=name_global('collections.OrderedDict') + encode(([],)) + b'R'), 'calls'),
    'storage that is called': (build(state=name_global('torch.FloatStorage') + encode((6,)) + b'R'), 'calls'),
    'attributes of a tensor': (build(state=b'}(' + w + encode_tensor() + encode({'shape': 1}) + b'bu'), 'fit together'),
    'new object': (build(state=name_global('collections.OrderedDict') + b')\x81'), 'instruction NEWOBJ'),
    'old persistent id': (build(state=b'P0\n'), 'instruction PERSID'),
    'other function': (build(function='torch._utils._rebuild_parameter'), '_rebuild_parameter'),
    'other storage': (build(storage=encode_storage('ComplexFloatStorage')), 'ComplexFloatStorage'),
    'view of a storage': (build(storage=encode_storage(view=('0', 0, 6))), 'storage is not described'),
    'no storage': (build(storage=encode('0')), 'calls something'),
    'storage of 10**12': (build(storage=encode_storage(num_elements=10**12), num_elements=10**12), 'ends within'),
    'storage of 10**100': (build(storage=encode_storage(num_elements=10**100)), 'not described'),
    'negative storage': (build(storage=encode_storage(num_elements=-1)), 'not described'),
    'boolean storage': (build(storage=encode_storage(num_elements=True)), 'not described'),
    'other storage size': (build(num_elements=5), 'has 5 elements where 6 are announced'),
    'negative count': (build(num_elements=-6), 'has -6 elements'),
    'huge shape': (build(shape=(10**9, 10**9), strides=(0, 0)), 'larger than the file'),
    'absurd shape': (build(shape=(2, 10**30)), 'absurd shape'),
    'absurd stride': (build(strides=(10**30, 1)), 'absurd shape'),
    'negative stride': (build(strides=(-3, 1)), 'negative'),
    'negative offset': (build(offset=-1), 'negative'),
    'beyond the storage': (build(offset=1), 'beyond its storage'),
    'shape without strides': (build(strides=(3,)), 'no valid shape'),
    'many dimensions': (build(shape=(1,) * 40, strides=(1,) * 40), 'no valid shape'),
    'shape of floats': (build(shape=(2.0, 3.0)), 'instruction BINFLOAT'),
    'keys of other storages': (build(keys=('1',)), 'list of storages'),
    'two descriptions of a storage': (
        build(state=b'}(' + w + encode_tensor() + encode('v') + encode_tensor(encode_storage(num_elements=9)) + b'u'),
        "'v' contradicts",
    ),
    'key that is a number': (build(state=b'}(' + encode(1) + encode_tensor() + b'u'), 'key is not a string'),
    'key that takes for ever to hash': (build(state=b'}(' + encode(deepen(90)) + encode_tensor() + b'u'), 'key is not'),
    'deep tuple': (build(state=b')' + b'\x85' * 150_000), 'one dict of tensors'),
    'endless': (build(state=b')' + b'\x85' * 300_000), 'more than 200000 instructions'),
    'values that are no tensors': (build(state=encode({'epoch': 3})), 'one dict of tensors'),
    'a tensor alone': (build(state=encode_tensor()), 'one dict of tensors'),
    'empty stack': (build(state=b'\x85'), 'fit together'),
    'stack below a mark': (build(state=b')(\x85'), 'fit together'),
    'unset memo': (build(state=b'h\x07'), 'memo'),
    'unknown instruction': (build(state=b'\xff'), 'damaged'),
    'protocol 4': (build(state=b'\x80\x04)'), 'protocol 4'),
    'big-endian': (build(facts={'little_endian': False}), 'little-endian'),
    'other magic number': (build(magic=0x1950A86A20F9469CFC6D), 'magic number'),
    'empty': (b'', 'does not start'),
    'text': (b'not weights', 'does not start'),
    'numpy': (pickle.dumps(np.arange(3), 2), 'does not start'),
    'safetensors': (struct.pack('<q', 2) + b'{}', 'does not start'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    assert_refused(tmp_path, *HOSTILE[name])


def test_a_place_far_out_in_the_memo_takes_no_memory(tmp_path):
    state = b'}r\xff\xff\xff\xff(' + encode('w') + encode_tensor() + b'u'
    assert list(load(tmp_path, build(state=state))) == ['w']


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        load_torch_file(tmp_path / 'weights.pt')
    with pytest.raises(UserError, match='directory'):
        load_torch_file(tmp_path)


def test_every_cut_is_refused(tmp_path):
    content = build()
    for length in range(len(content)):
        with pytest.raises(UserError):
            load(tmp_path, content[:length])


def test_every_damaged_byte_is_refused_or_harmless(tmp_path):
    content, rng = build(), np.random.default_rng(0)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        try:
            tensors = load(tmp_path, bytes(damaged))
        except UserError:
            continue
        assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())
