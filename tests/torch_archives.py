"""Files in the zip format of `torch.save`, written without torch, and how a file of either format is tried."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.models.torch_files import load_torch_file

SIX_FLOATS = struct.pack('<6f', *range(6))

STORAGES = {
    'float32': 'FloatStorage',
    'float64': 'DoubleStorage',
    'float16': 'HalfStorage',
    'bfloat16': 'BFloat16Storage',
    'int64': 'LongStorage',
    'int32': 'IntStorage',
    'int16': 'ShortStorage',
    'int8': 'CharStorage',
    'uint8': 'ByteStorage',
}


def load(tmp_path, content):
    """Returns the tensors of a file with this content."""
    path = tmp_path / 'weights.pt'
    path.write_bytes(content)
    return load_torch_file(path)


def assert_refused(tmp_path, content, message):
    """Asserts that the file is refused in one line, which names it and matches the message."""
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, content)
    text = str(caught.value)
    assert str(tmp_path / 'weights.pt') in text
    assert '\n' not in text
    assert len(text) < 500


def encode(value):
    """Returns the instructions that push a value, without header and STOP."""
    return pickle.dumps(value, 2)[2:-1]


def name_global(name):
    module, _, attribute = name.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def encode_storage(kind='FloatStorage', key='0', num_elements=6, last=()):
    """Returns the instructions that push a storage; a legacy file has (None,) in the `last` place."""
    identity = encode('storage') + name_global(f'torch.{kind}') + encode(key) + encode('cpu')
    return b'(' + identity + encode(num_elements) + b''.join(map(encode, last)) + b'tQ'


def encode_tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1), function='torch._utils._rebuild_tensor_v2'):
    hooks = encode(False) + name_global('collections.OrderedDict') + b')R'
    storage = encode_storage() if storage is None else storage
    view = b''.join(map(encode, (offset, shape, strides)))
    return name_global(function) + b'(' + storage + view + hooks + b'tR'


def encode_dict(entries):
    """Returns the instructions that push a dict with these keys and encoded values."""
    return b'}(' + b''.join(encode(key) + value for key, value in entries.items()) + b'u'


def zip_members(members, *, compression=zipfile.ZIP_STORED):
    """Returns an archive with these names and bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def build_archive(tensors, *, key=None, compression=zipfile.ZIP_STORED):
    """Returns a file with named arrays, as the dict itself or under `key` beside a text."""
    entries, storages = {}, {}
    for number, (name, array) in enumerate(tensors.items()):
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        storage = encode_storage(STORAGES[array.dtype.name], str(number), array.size)
        entries[name] = encode_tensor(storage, shape=array.shape, strides=strides)
        storages[f'weights/data/{number}'] = np.ascontiguousarray(array).tobytes()
    state = encode_dict(entries)
    if key is not None:
        state = encode_dict({key: state, 'made by': encode('a test')})
    pickled = b'\x80\x02' + state + b'.'
    members = {'weights/data.pkl': pickled, 'weights/byteorder': b'little', **storages, 'weights/version': b'3\n'}
    return zip_members(members, compression=compression)
