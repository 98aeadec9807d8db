"""Loads tensors from the zip format of PyTorch (`torch.save` since version 1.6) without running code.

An archive has one folder. Its `data.pkl` is a pickle that describes tensors and names their storages by key, and
`data/<key>` holds the bytes of a storage. Members are stored or deflated. They are read into memory by their exact name
and nothing is extracted, so a name can't lead out of the folder.
"""

import io
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from covidjax.models.torch_pickle import Fault, Tensor, check_tensors, create_array, interpret

_MAX_MEMBERS = 20_000
_MAX_RATIO, _MAX_SMALL = 8, 2**20  # an archive may grow to 8 times its size, or to 1 MB
_LOCAL_HEADER = struct.Struct('<4s22xHH')  # signature, length of the name, length of the extra field
_ENCRYPTED = 1  # bit of the flags


class _Member(NamedTuple):
    start: int
    num_packed: int
    is_deflated: bool
    num_bytes: int
    crc: int


def load_zip(file: BinaryIO, num_bytes: int) -> dict[str, np.ndarray]:
    """Loads the tensors of an archive; returns them by name, in their dtypes.

    Args:
      file: the archive, seekable.
      num_bytes: its size.

    Raises:
      Fault: it is damaged, has absurd sizes, or holds anything but plain tensors.
    """
    members = _list_members(file)
    total = sum(member.num_bytes for member in members.values())
    if total > max(_MAX_RATIO * num_bytes, _MAX_SMALL):
        raise Fault(f'it would grow from {num_bytes:,} to {total:,} bytes, taken for a decompression bomb')
    folders = [
        name.removesuffix('/data.pkl') for name in members if name.count('/') == 1 and name.endswith('/data.pkl')
    ]
    if len(folders) != 1:
        raise Fault(f'it has {len(folders)} members <folder>/data.pkl instead of one')
    (folder,) = folders
    order = members.get(f'{folder}/byteorder')  # absent before version 2.1
    if order is not None and _read(file, order) != b'little':
        raise Fault('it was not written on a little-endian machine')
    tensors = check_tensors(_find_tensors(interpret(io.BytesIO(_read(file, members[f'{folder}/data.pkl'])))), total)
    storages = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        member = members.get(f'{folder}/data/{storage.key}')
        if member is None:
            raise Fault(f'it lacks storage {storage.key!r:.80}')
        if member.num_bytes != storage.num_elements * storage.dtype.itemsize:
            raise Fault(
                f'storage {storage.key!r:.80} has {member.num_bytes} bytes where {storage.num_elements} elements of '
                f'{storage.dtype.itemsize} are announced'
            )
        storages[storage.key] = np.frombuffer(_read(file, member), storage.dtype)
    return {name: create_array(tensor, storages[tensor.storage.key]) for name, tensor in tensors.items()}


def _find_tensors(value: Any) -> Any:
    """Returns the dict of tensors: the value itself, or its entry 'state_dict' beside numbers and texts."""
    if isinstance(value, dict) and not all(isinstance(entry, Tensor) for entry in value.values()):
        return value.get('state_dict')
    return value


def _list_members(file: BinaryIO) -> dict[str, _Member]:
    """Returns the members of an archive by name; they do not overlap and lie inside the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise Fault(f'it is damaged or truncated ({error!s:.200})') from error
    if len(entries) > _MAX_MEMBERS:
        raise Fault(f'it has more than {_MAX_MEMBERS} members')
    members = {}
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        name = entry.orig_filename
        if name in members:
            raise Fault(f'it has two members {name!r:.80}')
        if name.startswith('/') or '\\' in name or '\0' in name or '..' in name.split('/'):
            raise Fault(f'it has a member with the name {name!r:.80}')
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Fault(f'its member {name!r:.80} is encrypted or compressed by another method than deflate')
        start = _find_data(file, entry)
        if start + entry.compress_size > end:
            raise Fault(f'its member {name!r:.80} reaches into the next one')
        end = entry.header_offset  # members come last first
        is_deflated = entry.compress_type == zipfile.ZIP_DEFLATED
        members[name] = _Member(start, entry.compress_size, is_deflated, entry.file_size, entry.CRC)
    return members


def _find_data(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Returns the position of a member's first byte, after its local header, which must have the same name."""
    if entry.header_offset < 0:
        raise Fault('it is damaged or truncated (a member lies before its start)')
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    signature, num_name, num_extra = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size, b'\0'))
    encoding = 'utf-8' if entry.flag_bits & 0x800 else 'cp437'
    if signature != b'PK\3\4' or file.read(num_name).decode(encoding, 'replace') != entry.orig_filename:
        raise Fault(f'its member {entry.orig_filename!r:.80} has no matching local header')
    return entry.header_offset + _LOCAL_HEADER.size + num_name + num_extra


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.start)
    data = file.read(member.num_packed)
    if member.is_deflated:
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = decompressor.decompress(data, member.num_bytes + 1)
        except zlib.error as error:
            raise Fault(f'it is damaged or truncated ({error!s:.200})') from error
    if len(data) != member.num_bytes or zlib.crc32(data) != member.crc:
        raise Fault('it is damaged: a member has other bytes than its size and checksum say')
    return data
