import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.errors import UserError
from tests.torch_archives import (
    SIX_FLOATS,
    STORAGES,
    assert_refused,
    build_archive,
    encode,
    encode_dict,
    encode_storage,
    encode_tensor,
    load,
    name_global,
    zip_members,
)


def build(state=None, members=None, compression=zipfile.ZIP_STORED, **tensor):
    """Returns an archive with one tensor 'w', or with another pickle; `members` change others, None leaves one out."""
    state = encode_dict({'w': encode_tensor(**tensor)}) if state is None else state
    usual = {
        'archive/data.pkl': b'\x80\x02' + state + b'.',
        'archive/byteorder': b'little',
        'archive/data/0': SIX_FLOATS,
        'archive/version': b'3\n',
    }
    chosen = {name: data for name, data in (usual | (members or {})).items() if data is not None}
    return zip_members(chosen, compression=compression)


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_tensor(tmp_path, compression):
    tensors = load(tmp_path, build(compression=compression))
    assert list(tensors) == ['w']
    np.testing.assert_array_equal(tensors['w'], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize('key', [None, 'state_dict'])
def test_dtypes_and_shapes(tmp_path, key):
    kinds = {name: jnp.bfloat16 if name == 'bfloat16' else np.dtype(name) for name in STORAGES}
    arrays = {name: np.arange(24).reshape(2, 3, 4).astype(dtype) for name, dtype in kinds.items()}
    arrays |= {'scalar': np.array(7, np.int64), 'empty': np.zeros((0, 3), np.float32)}
    tensors = load(tmp_path, build_archive(arrays, key=key))
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_two_views_of_one_storage(tmp_path):
    state = encode_dict({'w': encode_tensor(), 'v': encode_tensor(offset=1, shape=(2,), strides=(3,))})
    np.testing.assert_array_equal(load(tmp_path, build(state))['v'], [1, 4])


def test_a_file_without_byte_order(tmp_path):
    assert list(load(tmp_path, build(members={'archive/byteorder': None}))) == ['w']


def test_other_entries_and_members_are_not_read(tmp_path):
    state = encode_dict({'state_dict': encode_dict({'w': encode_tensor()}), 'epoch': encode(3), 'by': encode('me')})
    assert list(load(tmp_path, build(state, {'archive/data/9': b'no storage', 'archive/code/f.py': b'raise'}))) == ['w']


def damage(content, find, put):
    assert content.count(find) >= 1
    return content.replace(find, put)


def overlap():
    """Returns an archive whose second entry of the directory points at the first member under its own name."""
    content = bytearray(build(members={'archive/data/1': SIX_FLOATS}))
    with_both = content.rindex(b'archive/data/1') - 46  # the entry of the directory
    first = content.index(b'archive/data/0') - 30
    content[with_both + 42 : with_both + 46] = struct.pack('<I', first)
    return bytes(content)


def reach(name, growth):
    """Returns an archive that says of a stored member, in its directory, that it is longer than it is."""
    content = bytearray(build())
    entry = content.rindex(name) - 46
    size = struct.unpack('<I', content[entry + 20 : entry + 24])[0] + growth
    content[entry + 20 : entry + 28] = struct.pack('<II', size, size)
    return bytes(content)


def deflate(data, members=None):
    return build(members={'archive/data/0': data, **(members or {})}, compression=zipfile.ZIP_DEFLATED)


w = encode('w')
HOSTILE = {
    'system': (build(name_global('os.system') + encode('true') + b'\x85R'), 'asks for .os.system'),
    'eval': (build(name_global('builtins.eval') + encode('1') + b'\x85R'), 'asks for .builtins.eval'),
    'getattr': (build(name_global('builtins.getattr')), 'asks for .builtins.getattr'),
    'typed storage': (build(storage=encode_storage('storage.UntypedStorage')), 'UntypedStorage'),
    'other function': (build(function='torch._utils._rebuild_sparse_tensor'), '_rebuild_sparse_tensor'),
    'complex numbers': (build(storage=encode_storage('ComplexFloatStorage')), 'ComplexFloatStorage'),
    'new object': (build(name_global('collections.OrderedDict') + b')\x81'), 'instruction NEWOBJ'),
    'global of protocol 4': (build(encode('os') + encode('system') + b'\x93'), 'instruction STACK_GLOBAL'),
    'storage as in a legacy view': (build(storage=encode_storage(last=(('0', 0, 6),))), 'not described'),
    'storage with two more places': (build(storage=encode_storage(last=(None, None))), 'not described'),
    'storage of 10**12': (build(storage=encode_storage(num_elements=10**12)), 'has 24 bytes where 1000000000000'),
    'storage of 10**100': (build(storage=encode_storage(num_elements=10**100)), 'not described'),
    'negative storage': (build(storage=encode_storage(num_elements=-1)), 'not described'),
    'other storage size': (build(storage=encode_storage(num_elements=7)), 'has 24 bytes where 7 elements of 4'),
    'wider dtype than bytes': (build(storage=encode_storage('DoubleStorage')), 'has 24 bytes where 6 elements of 8'),
    'narrower dtype than bytes': (build(storage=encode_storage('HalfStorage')), 'has 24 bytes where 6 elements of 2'),
    'two descriptions of a storage': (
        build(encode_dict({'w': encode_tensor(), 'v': encode_tensor(encode_storage('IntStorage'))})),
        "'v' contradicts",
    ),
    'huge shape': (build(shape=(10**9, 10**9), strides=(0, 0)), 'larger than the file'),
    'absurd shape': (build(shape=(2, 10**30)), 'absurd shape'),
    'absurd stride': (build(strides=(10**30, 1)), 'absurd shape'),
    'negative stride': (build(strides=(-3, 1)), 'negative'),
    'negative offset': (build(offset=-1), 'negative'),
    'beyond the storage': (build(offset=1), 'beyond its storage'),
    'many dimensions': (build(shape=(1,) * 40, strides=(1,) * 40), 'no valid shape'),
    'values that are no tensors': (build(encode({'epoch': 3})), 'one dict of tensors'),
    'a tensor beside tensors that are none': (build(encode_dict({'state_dict': encode({'a': 1})})), 'one dict of'),
    'a list': (build(encode([1, 2])), 'one dict of tensors'),
    'key that is a number': (build(b'}(' + encode(1) + encode_tensor() + b'u'), 'key is not a string'),
    'endless': (build(b')' + b'\x85' * 300_000, compression=zipfile.ZIP_DEFLATED), 'more than 200000 instructions'),
    'no pickle': (build(members={'archive/data.pkl': None}), 'has 0 members <folder>/data.pkl'),
    'two folders': (build(members={'other/data.pkl': b''}), 'has 2 members <folder>/data.pkl'),
    'pickle without a folder': (build(members={'archive/data.pkl': None, 'data.pkl': b''}), 'has 0 members'),
    'empty pickle': (build(members={'archive/data.pkl': b''}), 'damaged or truncated'),
    'big-endian': (build(members={'archive/byteorder': b'big'}), 'little-endian'),
    'lost storage': (build(members={'archive/data/0': None}), "lacks storage '0'"),
    'storage outside the folder': (
        build(members={'x': SIX_FLOATS}, storage=encode_storage(key='../../x')),
        "lacks storage '../../x'",
    ),
    'way out of the folder': (build(members={'archive/../../x': b''}), "the name 'archive/../../x'"),
    'absolute name': (build(members={'/etc/passwd': b''}), "the name '/etc/passwd'"),
    'backslashes': (build(members={'..\\x': b''}), 'the name'),
    'bomb': (deflate(b'\0' * 50_000_000), 'decompression bomb'),
    'bomb in a member that is not read': (deflate(SIX_FLOATS, {'archive/x': b'\0' * 50_000_000}), 'decompression bomb'),
    'overlapping members': (overlap(), 'no matching local header'),
    'member that reaches into the next': (reach(b'archive/data/0', 10), 'reaches into the next'),
    'member that reaches out of the file': (reach(b'archive/version', 2**31), 'bomb|reaches into'),
    'other name in the header': (
        build().replace(b'archive/data/0', b'archive/data/7', 1),
        'no matching local header',
    ),
    'damaged bytes': (damage(build(), SIX_FLOATS, SIX_FLOATS[:-1] + b'\x07'), 'damaged'),
    'other method': (build(compression=zipfile.ZIP_LZMA), 'another method'),
    'only the start': (b'PK\3\4', 'damaged or truncated'),
    'many members': (zip_members({f'a/{i}': b'' for i in range(20_001)}), 'more than 20000 members'),
    'numpy': (zip_members({'w.npy': pickle.dumps(1)}), 'has 0 members'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    assert_refused(tmp_path, *HOSTILE[name])


def test_two_members_of_one_name(tmp_path):
    content = build(members={'archive/data/1': SIX_FLOATS})
    with pytest.raises(UserError, match="two members 'archive/data/0'"):
        load(tmp_path, content.replace(b'archive/data/1', b'archive/data/0'))


def test_an_encrypted_member(tmp_path):
    content = bytearray(build())
    content[content.rindex(b'archive/data/0') - 46 + 8] |= 1  # flags in the directory
    with pytest.raises(UserError, match='encrypted'):
        load(tmp_path, bytes(content))


def test_a_wrong_size_of_a_deflated_member(tmp_path):
    content = bytearray(deflate(b'\0' * 60_000))
    entry = content.rindex(b'archive/data/0') - 46
    content[entry + 24 : entry + 28] = struct.pack('<I', 24)  # size in the directory; 60,000 bytes come out
    with pytest.raises(UserError, match='other bytes than its size'):
        load(tmp_path, bytes(content))


def test_every_cut_is_refused(tmp_path):
    content = build()
    for length in range(len(content)):
        with pytest.raises(UserError):
            load(tmp_path, content[:length])


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_damaged_byte_is_refused_or_harmless(tmp_path, compression):
    content, rng = build(compression=compression), np.random.default_rng(0)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        try:
            tensors = load(tmp_path, bytes(damaged))
        except UserError:
            continue
        np.testing.assert_array_equal(tensors['w'], [[0, 1, 2], [3, 4, 5]])  # checksums find damaged numbers
