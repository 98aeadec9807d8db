"""Checks the headers of a JPEG or JPEG-LS stream, on some of which a decoder in C crashes instead of refusing them."""

_TABLES, _SCAN, _END = 0xC4, 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {_TABLES, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}


def check_jpeg(stream: bytes, shape: tuple[int, int], num_bits: int) -> None:
    """Checks all headers up to the first scan of a stream; other streams pass.

    Args:
      stream: of one slice.
      shape: (rows, columns) by the DICOM header.
      num_bits: allocated for a pixel.

    Raises:
      ValueError: the headers are damaged, or name another size, several components or an impossible precision.
    """
    if not stream.startswith(b'\xff\xd8'):
        return
    place, component = 2, None
    while place + 4 <= len(stream):
        marker = stream[place + 1]
        if stream[place] != 0xFF:
            break
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            place += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(stream[place + 2 : place + 4], 'big')
        body = stream[place + 4 : place + 2 + size]
        if size < 2 or len(body) != size - 2 or marker == _END:
            break
        if marker in _FRAMES:
            if component is not None or len(body) != 9 or body[5] != 1:
                break
            if (int.from_bytes(body[1:3], 'big'), int.from_bytes(body[3:5], 'big')) != shape:
                break
            if not 2 <= body[0] <= num_bits:
                break
            component = body[6]
        elif marker == _TABLES and not _are_tables(body):
            break
        elif marker == _SCAN:
            if component is None or len(body) != 6 or body[:2] != bytes([1, component]):
                break
            return
        place += 2 + size
    raise ValueError('a JPEG stream with damaged headers, or of another size than the DICOM header says')


def _are_tables(body: bytes) -> bool:
    """Returns whether the body of a segment is a row of Huffman tables whose codes fit their lengths."""
    while body:
        counts = body[1:17]
        # Codes of a length are counted from 0; longer ones double what is left.
        room = 1
        for count in counts:
            room = 2 * room - count
            if room < 0:
                return False
        if len(counts) < 16 or body[0] >> 4 > 1 or body[0] & 15 > 3 or sum(counts) > 256:
            return False
        if len(body) < 17 + sum(counts):
            return False
        body = body[17 + sum(counts) :]
    return True
