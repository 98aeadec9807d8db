"""Checks the header of a JPEG or JPEG-LS stream. Decoders in C can crash on one that contradicts the DICOM header."""

_NO_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)  # tables among the markers of frames
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))


def check_jpeg(stream: bytes, shape: tuple[int, int], num_bits: int) -> None:
    """Checks the frame header of a stream; other streams pass.

    Args:
      stream: of one slice.
      shape: (rows, columns) by the DICOM header.
      num_bits: allocated for a pixel.

    Raises:
      ValueError: there is no frame header, or it names another size, several components or an impossible precision.
    """
    if not stream.startswith(b'\xff\xd8'):
        return
    place = 2
    while place + 4 <= len(stream):
        if stream[place] != 0xFF:
            raise ValueError('a JPEG stream without a frame header')
        marker = stream[place + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME_HEADERS):
            header = stream[place + 4 : place + 10]
            if len(header) < 6:
                break
            size = int.from_bytes(header[1:3], 'big'), int.from_bytes(header[3:5], 'big')
            if size != shape or header[5] != 1 or not 2 <= header[0] <= num_bits:
                raise ValueError('a JPEG stream that contradicts the DICOM header')
            return
        place += 2 + max(2, int.from_bytes(stream[place + 2 : place + 4], 'big'))
    raise ValueError('a JPEG stream without a frame header')
