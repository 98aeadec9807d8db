"""Reads small scans with random damage. Each must be read, or refused in one line, within seconds and without logs.

  python -m tests.faults.damage_scans              10,000 in all, half an hour
  python -m tests.faults.damage_scans --count=20 --seed=1000

Reading covers all steps of a prediction before the model. It runs in a separate process, which makes decoder crashes
detectable. The last lines are the summary, the slowest scan and the peak memory of a process. The exit status is 1 if
any scan was neither read nor refused.
"""

import argparse
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import gzip
import io
import logging
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

from covidjax.data.preprocess import apply_window
from covidjax.data.scan.body import find_body_box, find_doubts
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from covidjax.predict.prepare import prepare_slice
from tests.scan_files import change_syntax, create_nifti, encode_dicom, make_chest, make_dicom

HANG_SECONDS = 30
OUTCOMES = ('read', 'read with doubts', 'refused')
NUM_SLICES = 6
HU = make_chest(NUM_SLICES)
STRANGE = (None, '', 0, -1, 1, 65535, 1e30, float('nan'), 'nan', 'x' * 300, [0, 0, 0], ['a', 'b'], b'\xff\xfe\0')


def damage_bytes(rng, data):
    """Flips up to 20 bits, mostly near the beginning, or truncates the data."""
    if rng.random() < 0.25:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        end = len(data) if rng.random() < 0.3 else min(len(data), 2000)
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_tags(rng, data):
    """Deletes elements of a DICOM file or gives them unusual values."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    for _ in range(rng.randint(1, 3)):
        element = rng.choice(list(dataset))
        if rng.random() < 0.3:
            del dataset[element.tag]
            continue
        before, value = element.value, rng.choice(STRANGE)
        try:
            element.value = value
            data = encode_dicom(dataset)
        except Exception:  # pydicom cannot write this value
            element.value = before
    return data


def write_dicom(rng, folder, syntax):
    """Writes a series and damages one file or all."""
    for number, pixels in enumerate(HU):
        path = folder / f'{number}.dcm'
        path.write_bytes(encode_dicom(make_dicom(pixels, -5.0 * number)))
        if syntax:
            change_syntax(path, syntax)
    for path in rng.sample(sorted(folder.iterdir()), rng.choice((1, 1, NUM_SLICES))):
        path.write_bytes(rng.choice((damage_bytes, damage_tags))(rng, path.read_bytes()))
    return folder


def write_zip(rng, folder):
    """Writes a zip of a series and damages the archive."""
    path = folder / 'scan.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for number, pixels in enumerate(HU):
            archive.writestr(f'{number}.dcm', encode_dicom(make_dicom(pixels, -5.0 * number)))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:  # damage the central directory
        for _ in range(rng.randint(1, 5)):
            data[-rng.randint(1, 60 * NUM_SLICES)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(damage_bytes(rng, bytes(data)))
    return path


def write_nifti(rng, folder, ending):
    """Writes a NIfTI with a random header field, damaged bytes or both."""
    path = folder / f'scan{ending}'
    image = create_nifti(HU)
    header = image.header.copy()
    if rng.random() < 0.5:
        name = rng.choice(list(header.keys()))
        value = np.frombuffer(rng.randbytes(header[name].nbytes), header[name].dtype)
        header[name] = value.reshape(header[name].shape)
    data = bytearray(header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes('F'))
    struct.pack_into('<f', data, 108, 352.0)
    data = bytes(data) if rng.random() < 0.5 else damage_bytes(rng, bytes(data))
    if ending.endswith('gz'):
        data = gzip.compress(data)
        data = data if rng.random() < 0.5 else damage_bytes(rng, data)
    path.write_bytes(data)
    return path


def write_export(rng, folder):
    """Writes an export with two faults of `hospital_exports` and damages one file."""
    from tests.faults import hospital_exports

    faults = [f for f in hospital_exports.create_faults() if f.name not in ('slices of 0.6 mm', 'slices of 2 mm')]
    while True:
        chosen = rng.sample(faults, 2)
        if not chosen[0].clash or chosen[0].clash != chosen[1].clash:
            break
    path, _ = hospital_exports.write_export(folder, chosen)
    files = [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.is_file())
    file = rng.choice(files)
    change = rng.choice((damage_bytes, damage_tags))
    file.write_bytes(change(rng, file.read_bytes()) if change is damage_bytes else try_tags(rng, file.read_bytes()))
    return path


def try_tags(rng, data):
    """Damages the tags of DICOM, the bytes of anything else."""
    try:
        return damage_tags(rng, data)
    except Exception:
        return damage_bytes(rng, data)


def write_itk(rng, folder, ending):
    """Writes a MetaImage or NRRD with a damaged header, damaged bytes or both."""
    hu = HU.astype('<i2').tobytes()
    size = ' '.join(map(str, HU.shape[::-1]))
    if ending == '.mha':
        header = (
            'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n'
            'CompressedData = False\nTransformMatrix = 1 0 0 0 1 0 0 0 -1\nOffset = 0 0 0\n'
            f'ElementSpacing = 1 1 5\nDimSize = {size}\n'
            'ElementType = MET_SHORT\nElementDataFile = LOCAL\n'
        )
    else:
        header = (
            f'NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {size}\n'
            'space directions: (1,0,0) (0,1,0) (0,0,-5)\nkinds: domain domain domain\nendian: little\n'
            'encoding: raw\nspace origin: (0,0,0)\n\n'
        )
    header = header.encode()
    if rng.random() < 0.7:
        changed = bytearray(header)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice(b'0123456789 -.,:=abcLPS\n\0')
        header = bytes(changed)
    data = header + hu
    path = folder / f'scan{ending}'
    path.write_bytes(data if rng.random() < 0.5 else damage_bytes(rng, data))
    return path


def write_images(rng, folder):
    """Writes a folder of PNG files, some damaged. Half of these have valid checksums, so that decoders go on."""
    for number, pixels in enumerate(apply_window(HU)):
        Image.fromarray(pixels).save(folder / f'{number}.png')
    for path in rng.sample(sorted(folder.iterdir()), rng.choice((1, NUM_SLICES))):
        data = path.read_bytes()
        if rng.random() < 0.5:
            header = bytearray(data[16:29])
            header[rng.randrange(13)] = rng.randrange(256)
            checksum = struct.pack('>I', zlib.crc32(b'IHDR' + header))
            path.write_bytes(data[:16] + header + checksum + data[33:])
        else:
            path.write_bytes(damage_bytes(rng, data))
    return folder


KINDS = {
    'DICOM': lambda rng, folder: write_dicom(rng, folder, None),
    'JPEG Lossless': lambda rng, folder: write_dicom(rng, folder, 'JPEGLosslessProcess14_1'),
    'JPEG-LS': lambda rng, folder: write_dicom(rng, folder, 'JPEGLSLossless'),
    'JPEG 2000': lambda rng, folder: write_dicom(rng, folder, 'JPEG2000Lossless'),
    'RLE': lambda rng, folder: write_dicom(rng, folder, 'RLELossless'),
    'zip': write_zip,
    'NIfTI': lambda rng, folder: write_nifti(rng, folder, '.nii'),
    'NIfTI, packed': lambda rng, folder: write_nifti(rng, folder, '.nii.gz'),
    'PNG': write_images,
    'export': write_export,
    'MetaImage': lambda rng, folder: write_itk(rng, folder, '.mha'),
    'NRRD': lambda rng, folder: write_itk(rng, folder, '.nrrd'),
}


class Refuse(logging.Handler):
    """Raises AssertionError for any log record: only the error message may report a damaged scan."""

    def emit(self, record):
        raise AssertionError(record.getMessage())


@contextlib.contextmanager
def write_anything():
    """Silences the warnings of pydicom about unusual values."""
    settings = pydicom.config.settings
    modes = settings.reading_validation_mode, settings.writing_validation_mode
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    logging.disable(logging.NOTSET)
    settings.reading_validation_mode, settings.writing_validation_mode = modes


def read_damaged(kind, seed):
    """Reads one damaged scan and returns the outcome: one of OUTCOMES, or another string on failure."""
    folder, handler = Path(tempfile.mkdtemp()), Refuse()
    with write_anything():
        path = KINDS[kind](random.Random(f'{kind} {seed}'), folder)
    logging.root.addHandler(handler)
    try:
        volume = read_volume(path)
        slices = [prepare_slice(grey, find_body_box(grey), 64) for grey in volume.slices]
        return 'read with doubts' if volume.doubts + find_doubts(slices) else 'read'
    except UserError as error:
        return 'refused' if '\n' not in str(error) else 'refused in several lines'
    finally:
        logging.root.removeHandler(handler)
        shutil.rmtree(folder)


def measure_damaged(kind, seed):
    """Returns the outcome, the seconds and the peak memory of this process in MB."""
    start = time.perf_counter()
    outcome = read_damaged(kind, seed)
    return outcome, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    """Reads the scans selected by the flags and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=834, help='scans of each of the 12 kinds')
    parser.add_argument('--seed', type=int, default=0, help='seed of the first scan of each kind')
    parser.add_argument('--only', default='', help='kinds, joined by +; default: all')
    arguments = parser.parse_args()
    slowest, peak = (0.0, '', 0), 0.0
    counts, lost, pool = collections.defaultdict(collections.Counter), [], None
    for kind in arguments.only.split('+') if arguments.only else KINDS:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            pool = pool or concurrent.futures.ProcessPoolExecutor(1)
            try:
                outcome, seconds, memory = pool.submit(measure_damaged, kind, seed).result(HANG_SECONDS)
                slowest, peak = max(slowest, (seconds, kind, seed)), max(peak, memory)
            except concurrent.futures.process.BrokenProcessPool:
                outcome, pool = 'crashed', None
            except TimeoutError:
                outcome = f'took more than {HANG_SECONDS} s'
                for process in pool._processes.values():
                    process.kill()
                pool = None
            except Exception as error:
                outcome = f'raised {type(error).__name__}'
            counts[kind][outcome] += 1
            if outcome not in OUTCOMES:
                lost.append((kind, seed, outcome))
                print(*lost[-1], sep=', ')
        print(f'{kind}: {dict(counts[kind])}', flush=True)
    pool.shutdown()
    total = sum(counts.values(), collections.Counter())
    print(f'{total.total()} scans: {dict(total)}; {len(lost)} lost')
    print(f'slowest: {slowest[0]:.1f} s ({slowest[1]}, {slowest[2]}); peak memory of a process: {peak:.0f} MB')
    sys.exit(bool(lost))


if __name__ == '__main__':
    main()
