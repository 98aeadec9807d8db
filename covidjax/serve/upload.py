"""Receives the files of a scan. Names that a client sends never become paths; they only order the files."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from covidjax.data.scan.sources import split_numbers
from covidjax.serve.limits import Limits, Refused

_KINDS = re.compile(r'\.(nii\.gz|nii|zip|mha|nrrd|png|jpe?g|tiff?|bmp|dcm)$', re.IGNORECASE)
_DETACHED = ('.mhd', '.nhdr')
_MAX_NAME = 1_000
_MAX_HEADERS = 20  # of a part
_DRAIN_SECONDS = 10


async def receive_files(request: Request, folder: Path, limits: Limits, count_bytes: Callable[[int], None]) -> int:
    """Writes the files of a multipart request to a folder as 00001, 00002.png, ... and returns how many there are.

    They are numbered in the natural order of the client's names, and keep a known ending. Other fields are ignored.

    Args:
      request: the request.
      folder: existing and empty.
      limits: of the server.
      count_bytes: called with the size of each chunk before it is written; may raise Refused.

    Raises:
      Refused: too many files, too slow, no files, or no multipart request. What remains of the request is read for up
        to 10 seconds, because most clients look for an answer only after they have sent everything.
    """
    kind, options = parse_options_header(request.headers.get('content-type', ''))
    if kind != b'multipart/form-data' or not options.get(b'boundary'):
        raise Refused(415, 'type', 'Send the files as multipart/form-data, e.g. curl -F files=@scan.zip.')
    writer = _Writer(folder, limits.num_files)
    chunks = request.stream().__aiter__()
    deadline = time.monotonic() + limits.upload_seconds
    length = request.headers.get('content-length', '')
    try:
        if length.isdecimal() and int(length) > limits.upload_bytes:
            count_bytes(int(length))  # refuses it before anything is written
        parser = MultipartParser(options[b'boundary'], writer.callbacks)
        while True:
            wait = min(limits.idle_seconds, deadline - time.monotonic())
            try:
                chunk = await asyncio.wait_for(anext(chunks), max(wait, 0.001))
            except StopAsyncIteration:
                break
            except TimeoutError as error:
                raise Refused(408, 'slow', 'The upload was too slow. Try again on a faster connection.') from error
            count_bytes(len(chunk))
            parser.write(chunk)
        parser.finalize()
        return writer.finish()
    except (FormParserError, ValueError) as error:
        raise Refused(400, 'multipart', 'The upload is damaged: it is no valid multipart/form-data.') from error
    except ClientDisconnect as error:
        raise Refused(400, 'cut', 'The upload was cut off.') from error
    except Refused as refused:
        if refused.status != 408:
            await drain(request, chunks)
        raise
    finally:
        writer.close()


async def drain(request: Request, chunks: AsyncIterator[bytes] | None = None) -> None:
    """Reads what remains of a request for up to 10 seconds, unless its client waits for an answer first.

    Args:
      request: the request.
      chunks: its body, if a part was read.
    """
    if 'expect' in request.headers:
        return
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in chunks or request.stream():
                pass
    except (TimeoutError, ClientDisconnect):
        pass


class _Writer:
    """Callbacks of the multipart parser that write each file to a number of its own."""

    def __init__(self, folder: Path, max_files: int):
        self._folder, self._max_files = folder, max_files
        self._names: list[str] = []  # of the client, by number
        self._file: BinaryIO | None = None
        self._num_parts = self._num_headers = 0
        self._header, self._value, self._disposition = b'', b'', b''

    @property
    def callbacks(self) -> dict[str, Callable]:
        return {
            'on_part_begin': self._begin_part,
            'on_header_field': self._read_header,
            'on_header_value': self._read_value,
            'on_header_end': self._end_header,
            'on_headers_finished': self._open,
            'on_part_data': self._write,
            'on_part_end': self.close,
        }

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_files:
            raise Refused(413, 'files', f'More than {self._max_files:,} files. Upload a single series, or a zip.')
        self._header, self._value, self._disposition, self._num_headers = b'', b'', b'', 0

    def _read_header(self, data: bytes, start: int, stop: int) -> None:
        self._header += data[start:stop]
        self._check_header()

    def _read_value(self, data: bytes, start: int, stop: int) -> None:
        self._value += data[start:stop]
        self._check_header()

    def _check_header(self) -> None:
        if max(len(self._header), len(self._value)) > _MAX_NAME or self._num_headers > _MAX_HEADERS:
            raise Refused(400, 'multipart', f'A file has a name or a header of more than {_MAX_NAME:,} bytes.')

    def _end_header(self) -> None:
        if self._header.lower() == b'content-disposition':
            self._disposition = self._value
        self._header, self._value = b'', b''
        self._num_headers += 1

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b'filename', b'').decode(errors='replace')
        if not name:  # a field, or a file input that was left empty
            return
        if name.lower().endswith(_DETACHED):
            raise Refused(
                415, 'detached', 'A header with its data in another file can not be uploaded. Save it as .mha or .nrrd.'
            )
        self._file = (self._folder / f'part{len(self._names)}').open('xb')
        self._names.append(name)

    def _write(self, data: bytes, start: int, stop: int) -> None:
        if self._file is not None:
            self._file.write(data[start:stop])

    def close(self) -> None:
        """Closes the file of the present part."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> int:
        """Names the files by their order; returns their number."""
        if not self._names:
            raise Refused(400, 'empty', 'There is no file in the upload. Send the files of one scan, or a zip of them.')
        order = sorted(range(len(self._names)), key=lambda number: split_numbers(self._names[number]))
        for place, number in enumerate(order, 1):
            found = _KINDS.search(self._names[number])
            ending = found[0].lower() if found else ''
            (self._folder / f'part{number}').rename(self._folder / f'{place:05}{ending}')
        return len(order)
