"""Exports of hospitals with one fault each and with all pairs. Each must be read whole or be refused by its fault.

  python -m tests.faults.hospital_exports               every fault and every pair, some minutes
  python -m tests.faults.hospital_exports --share=0.1   every fault and a tenth of the pairs

Scans are phantoms with whole lungs, in Hounsfield units. "Read" means all slices, in the right order, pixel by pixel. A
doubt counts as a refusal, since a prediction needs --force then. The last line is the summary. The exit status is 1 if
any export was lost: read in part or in another order, or refused without a word on its fault.
"""

import argparse
import collections
import copy
import dataclasses
import functools
import io
import itertools
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    EnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from covidjax.data.phantom import render_volume
from covidjax.data.preprocess import apply_window
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from tests.faults.damage_scans import write_anything
from tests.scan_files import encode_dicom, make_dicom

HEIGHT_MM = 100
UIDS = ('SOPInstanceUID', 'SeriesInstanceUID', 'StudyInstanceUID', 'FrameOfReferenceUID')
NUMBERS = ('SliceLocation', 'InstanceNumber')
SAME_PLACE = 'different pictures of one place'


@dataclasses.dataclass
class Export:
    """An export under construction.

    Attributes:
      spacing: distance of the slices in mm.
      files: name and dataset of each file; later bytes.
      others: files that are no slices, by name.
      truth: volumes, int16 [T, H, W] from head to feet, any of which a reader may return.
    """

    spacing: float = 5.0
    files: list[tuple[str, Dataset]] = dataclasses.field(default_factory=list)
    others: dict[str, bytes] = dataclasses.field(default_factory=dict)
    truth: list[np.ndarray] = dataclasses.field(default_factory=list)
    is_zipped: bool = False


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of an export.

    Attributes:
      name: for the table.
      stage: 0 before the slices are made, then in this order.
      apply: changes an export.
      words: what a refusal may say, any of them; none if it must be read.
      clash: faults of one clash are not paired.
    """

    name: str
    stage: int
    apply: Callable[[Export], None]
    words: tuple[str, ...] = ()
    clash: str = ''


@functools.cache
def render(spacing, label):
    """Returns a chest of `HEIGHT_MM`."""
    return render_volume(round(HEIGHT_MM / spacing), 64, label, seed=label)


def make_slices(export, hu, **tags):
    """Returns datasets of a volume with all the attributes that faults touch."""
    slices = []
    for number, pixels in enumerate(hu):
        z = 40 - export.spacing * number
        values = {
            'FrameOfReferenceUID': '1.2.3.9',
            'SliceLocation': f'{z:.2f}',
            'InstanceNumber': number + 1,
            'AcquisitionNumber': 1,
            'ConvolutionKernel': 'B30f',
            'SliceThickness': export.spacing,
            'BodyPartExamined': 'CHEST',
            **tags,
        }
        slices.append(make_dicom(pixels, round(z, 3), **values))
    return slices


def start(export):
    """Fills an export with the slices of one scan, under shuffled names."""
    hu = render(export.spacing, 2)
    export.truth = [hu]
    order = np.random.default_rng(0).permutation(len(hu))
    export.files = [(f'IM{n:04d}.dcm', s) for n, s in zip(order, make_slices(export, hu), strict=True)]
    export.files.sort(key=lambda file: file[0])


def change(edit, every=1):
    """Returns a fault that edits the dataset of every n-th file."""

    def apply(export):
        for number, (_, dataset) in enumerate(export.files):
            if number % every == 0:
                edit(dataset, number)

    return apply


def remove(name):
    """Returns an edit that removes an attribute."""
    return lambda dataset, _: dataset.__delattr__(name) if name in dataset else None


def put(name, value):
    """Returns an edit that sets an attribute, to the value of a function of the file's number if it is one."""
    return lambda dataset, number: setattr(dataset, name, value(number) if callable(value) else value)


def put_malformed(name):
    """Returns an edit after which the file holds text that is no value of the attribute."""

    def edit(dataset, number):
        setattr(dataset, name, '4711' if name in NUMBERS else f'4711.{number}')
        dataset.malformed = {**getattr(dataset, 'malformed', {}), b'4711': b'47-x'}

    return edit


def set_spacing(spacing):
    """Returns a fault of stage 0."""
    return lambda export: setattr(export, 'spacing', spacing)


def add_second(alter, tags, suffix, *, is_truth=True):
    """Returns a fault that adds a second volume, of altered pixels, to the same places."""

    def apply(export):
        hu = alter(export.truth[0])
        if is_truth:
            export.truth.append(hu)
        first = [(name, dataset) for name, dataset in export.files if not is_other(dataset)]
        copies = [copy.deepcopy(dataset) for _, dataset in first]
        by_place = sorted(copies, key=lambda dataset: -float(dataset.ImagePositionPatient[2]))
        for pixels, dataset in zip(hu, by_place, strict=True):
            dataset.PixelData = (pixels.astype(np.int32) + 1024).astype(np.uint16).tobytes()
            dataset.SOPInstanceUID = generate_uid()
            for name, value in tags.items():
                setattr(dataset, name, value)
        names = [f'{name[:-4]}{suffix}.dcm' for name, _ in first]
        export.files = sorted([*export.files, *zip(names, copies, strict=True)], key=lambda file: file[0])

    return apply


def is_other(dataset):
    """Returns whether a slice belongs to another scan of the export."""
    return getattr(dataset, 'is_other', False)


def sharpen(hu):
    """Returns the volume as a sharp kernel shows it."""
    noise = np.random.default_rng(1).normal(0, 30, hu.shape)
    return np.clip(hu + noise, -1024, 3071).astype(np.int16)


def enhance(hu):
    """Returns the volume after contrast medium."""
    return np.where(hu > 20, hu + 60, hu + 1).astype(np.int16)


def copy_files(num):
    """Returns a fault that copies the first files, all for None, under other names and UIDs."""

    def apply(export):
        copies = [(f'copy of {name}', copy.deepcopy(dataset)) for name, dataset in export.files[:num]]
        for _, dataset in copies:
            dataset.SOPInstanceUID = generate_uid()
        export.files += copies

    return apply


def add_study(export):
    """Adds the scan of another patient, half as long."""
    hu = render(export.spacing, 1)
    hu = hu[: len(hu) // 2]
    export.truth.append(hu)
    slices = make_slices(export, hu, study='1.9.9', series='1.9.9.1', number=7)
    for number, dataset in enumerate(slices):
        dataset.is_other = True
        export.files.append((f'other/{number}.dcm', dataset))


def tilt(dataset, _):
    """Tilts the gantry by 20 degrees about the centre of the table: the rows slide as the table moves."""
    angle = np.radians(20)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(angle).round(6)), float(-np.sin(angle).round(6))]


def reverse_instances(export):
    """Counts the instances from the feet."""
    count = len(export.files)
    for _, dataset in export.files:
        if str(getattr(dataset, 'InstanceNumber', '') or '').isdigit():
            dataset.InstanceNumber = count + 1 - int(dataset.InstanceNumber)


def rename_upwards(export):
    """Names the files from the feet to the head."""
    heights = [float(dataset.ImagePositionPatient[2]) for _, dataset in export.files]
    order = np.argsort(np.argsort(heights, kind='stable'), kind='stable')
    folders = [name.rpartition('/')[0] for name, _ in export.files]
    export.files = [
        (f'{folder}/{place:04d}.dcm'.lstrip('/'), dataset)
        for folder, place, (_, dataset) in zip(folders, order, export.files, strict=True)
    ]


def add_mixed(export):
    """Adds a scout, a capture, an abdomen, a report, a text and a picture."""
    [hu] = export.truth[:1]
    export.others['scout'] = encode_dicom(make_dicom(hu[0], 0.0, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
    export.others['capture.dcm'] = encode_dicom(make_dicom(hu[0], 0.0, SOPClassUID=SecondaryCaptureImageStorage))
    export.others['dose'] = encode_dicom(make_dicom(hu[0], 0.0, series='1.2.3.77', Modality='SR'))
    export.others['readme.txt'] = b'viewer'
    buffer = io.BytesIO()
    Image.fromarray(apply_window(hu[0])).save(buffer, 'PNG')
    export.others['key.png'] = buffer.getvalue()
    study = export.files[0][1].get('StudyInstanceUID') or ''
    belly = make_slices(export, enhance(hu)[::2], study=study, series='1.2.3.5', number=5)
    for number, dataset in enumerate(belly):
        dataset.BodyPartExamined, dataset.is_other = 'ABDOMEN', True
        dataset.ImagePositionPatient = [-31.5, -31.5, -200.0 - 2 * export.spacing * number]
        export.files.append((f'abdomen/{number}.dcm', dataset))


def add_dicomdir(export):
    """Adds the index file of a medium."""
    index = make_dicom(export.truth[0][0], 0.0)
    wanted = pydicom.Dataset()
    wanted.FileSetID = 'EXPORT'
    wanted.DirectoryRecordSequence = Sequence([])
    wanted.file_meta, wanted.preamble = index.file_meta, bytes(128)
    wanted.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, wanted, enforce_file_format=True)
    export.others['DICOMDIR'] = buffer.getvalue()


def make_frames(export):
    """Joins the files of the first series to one enhanced multi-frame file."""
    members = [file for file in export.files if not is_other(file[1])]
    whole = copy.deepcopy(members[0][1])
    groups = []
    for _, dataset in members:
        parts = {name: Dataset() for name in ('position', 'plane', 'measures', 'values', 'content', 'kernel')}
        parts['position'].ImagePositionPatient = dataset.ImagePositionPatient
        parts['plane'].ImageOrientationPatient = dataset.ImageOrientationPatient
        parts['measures'].PixelSpacing = dataset.PixelSpacing
        parts['measures'].SliceThickness = dataset.SliceThickness
        parts['values'].RescaleSlope, parts['values'].RescaleIntercept = 1, dataset.RescaleIntercept
        parts['content'].TemporalPositionIndex = int(dataset.get('AcquisitionNumber') or 1)
        if 'ConvolutionKernel' in dataset:
            parts['kernel'].ConvolutionKernel = dataset.ConvolutionKernel
        group = Dataset()
        group.PlanePositionSequence = Sequence([parts['position']])
        group.PlaneOrientationSequence = Sequence([parts['plane']])
        group.PixelMeasuresSequence = Sequence([parts['measures']])
        group.PixelValueTransformationSequence = Sequence([parts['values']])
        group.FrameContentSequence = Sequence([parts['content']])
        group.CTReconstructionSequence = Sequence([parts['kernel']])
        groups.append(group)
    whole.SOPClassUID = EnhancedCTImageStorage if whole.get('SOPClassUID') else ''
    whole.NumberOfFrames = len(members)
    whole.PixelData = b''.join(dataset.PixelData for _, dataset in members)
    whole.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    whole.PerFrameFunctionalGroupsSequence = Sequence(groups)
    for name in ('ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'ConvolutionKernel'):
        if name in whole:
            delattr(whole, name)
    export.files = [f for f in export.files if not any(f is member for member in members)] + [('frames.dcm', whole)]


def drop_classes(dataset, _):
    """Blanks modality and class. The meta header cannot lack a class: one that nobody registered stands there."""
    dataset.Modality = dataset.SOPClassUID = ''
    dataset.file_meta.MediaStorageSOPClassUID = '1.2.3.4.5'


def cut_file(export):
    """Marks the last slice file as truncated."""
    slices = [dataset for _, dataset in export.files if not is_other(dataset)]
    slices[-1].is_cut = True


def drop_extensions(export):
    """Names files as scanners do."""
    export.files = [(name.removesuffix('.dcm'), dataset) for name, dataset in export.files]


def zip_whole(export):
    """Packs the export into one archive."""
    export.is_zipped = True


def create_faults():
    """Returns all faults."""
    faults = []
    for name in (*UIDS, *NUMBERS):
        repeated = 7 if name == 'InstanceNumber' else '7.00' if name == 'SliceLocation' else '1.2.3.4'
        kinds = {
            'missing': change(remove(name)),
            'empty': change(put(name, '')),
            'repeated': change(put(name, repeated)),
            'malformed': change(put_malformed(name)),
            'missing in every second file': change(remove(name), 2),
        }
        # Without series or study UIDs two patients at the same places can't be told apart.
        faults += [Fault(f'{name} {kind}', 2, apply, clash=name) for kind, apply in kinds.items()]
    for name in UIDS[1:3]:
        faults.append(Fault(f'{name} new in every file', 2, change(put(name, lambda n: f'1.2.3.{n}')), clash=name))
    both = {'ConvolutionKernel': 'B70f'}
    faults += [
        Fault('slices of 2 mm', 0, set_spacing(2.0), clash='spacing'),
        Fault('slices of 0.6 mm', 0, set_spacing(0.6), clash='spacing'),
        Fault('gantry tilt', 1, change(tilt)),
        Fault('positions from feet to head', 5, rename_upwards),
        Fault('InstanceNumber reversed', 2, reverse_instances, clash='InstanceNumber'),
        Fault('SeriesNumber new in every file', 2, change(put('SeriesNumber', lambda n: n)), clash='number'),
        Fault('two kernels in one series', 3, add_second(sharpen, both, 'k'), (SAME_PLACE,), 'second'),
        Fault('two kernels, not named', 3, add_second(sharpen, {}, 'k', is_truth=False), (SAME_PLACE,), 'second'),
        Fault('two phases', 3, add_second(enhance, {'AcquisitionNumber': 2}, 'p'), (SAME_PLACE,), 'second'),
        Fault('two phases, not named', 3, add_second(enhance, {}, 'p', is_truth=False), (SAME_PLACE,), 'second'),
        Fault('one file twice', 4, copy_files(1), clash='copies'),
        Fault('every file twice', 4, copy_files(None), ('copies',), 'copies'),
        Fault('two studies', 1, add_study, ('several studies', SAME_PLACE, 'slices of this scan were left out')),
        Fault('mixed folder', 4, add_mixed),
        Fault('DICOMDIR', 7, add_dicomdir),
        Fault('multi-frame', 6, make_frames),
        Fault('Modality missing', 2, change(put('Modality', '')), clash='Modality'),
        Fault('Modality and class missing', 2, change(drop_classes), ('headers do not say',), 'Modality'),
        Fault('a file truncated', 6, cut_file, ('cannot be decoded', 'damaged'), clash='cut'),
        Fault('no extensions', 8, drop_extensions),
        Fault('zip', 9, zip_whole),
        Fault('zips in a folder', 9, lambda export: setattr(export, 'is_nested', True)),
    ]
    return faults


def encode(dataset):
    """Returns the bytes of a slice with its malformed values."""
    data = encode_dicom(dataset)
    for before, after in getattr(dataset, 'malformed', {}).items():
        data = data.replace(before, after)
    return data[: len(data) * 2 // 3] if getattr(dataset, 'is_cut', False) else data


def write_export(folder, faults):
    """Writes an export with faults; returns its path and the volumes that a reader may return."""
    export = Export()
    for fault in sorted(faults, key=lambda fault: fault.stage):
        if fault.stage > 0 and not export.files:
            start(export)
        fault.apply(export)
    if not export.files:
        start(export)
    files = {name: encode(dataset) for name, dataset in export.files} | export.others
    root = folder / 'export'
    if getattr(export, 'is_nested', False):
        half = len(files) // 2
        parts = {'a.zip': dict(list(files.items())[:half]), 'deep/b.zip': dict(list(files.items())[half:])}
        files = {name: pack(members) for name, members in parts.items()}
    if export.is_zipped:
        (folder / 'export.zip').write_bytes(pack(files))
        return folder / 'export.zip', export.truth
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root, export.truth


def pack(files):
    """Returns a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def try_export(faults):
    """Returns 'read', 'doubted', 'refused' or what went wrong, and the message."""
    folder = Path(tempfile.mkdtemp())
    words = [word for fault in faults for word in fault.words]
    try:
        with write_anything():
            path, truth = write_export(folder, faults)
        try:
            volume = read_volume(path)
        except UserError as error:
            message = str(error)
            is_named = '\n' not in message and any(word in message for word in words)
            return ('refused' if is_named else 'LOST: refused without its fault'), message
        message = '; '.join(volume.doubts)
        if not any(np.array_equal(volume.slices, apply_window(hu)) for hu in truth):
            if volume.doubts and any(word in message for word in words):
                return 'doubted', message
            return f'LOST: {len(volume.slices)} slices, not those of the scan', message
        if volume.doubts and not any(word in message for word in words):
            return 'LOST: doubted without its fault', message
        return ('doubted' if volume.doubts else 'read'), message
    finally:
        shutil.rmtree(folder)


def list_exports(share=1.0):
    """Returns every fault alone, and a share of all pairs, always the same."""
    faults = create_faults()
    pairs = [
        pair for pair in itertools.combinations(faults, 2) if not (pair[0].clash and pair[0].clash == pair[1].clash)
    ]
    chosen = [p for p in pairs if zlib.crc32(f'{p[0].name}, {p[1].name}'.encode()) < share * 2**32]
    return [(), *((fault,) for fault in faults), *chosen]


def try_names(names):
    """Runs in a worker: functions of faults can't travel, their names can."""
    by_name = {fault.name: fault for fault in create_faults()}
    return try_export([by_name[name] for name in names])


def main():
    """Tries the exports and prints a table of counts by fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--share', type=float, default=1.0, help='of the pairs')
    parser.add_argument('--jobs', type=int, default=-1, help='processes')
    arguments = parser.parse_args()
    exports = [[fault.name for fault in faults] for faults in list_exports(arguments.share)]
    started = time.perf_counter()
    from tests.faults.hospital_exports import try_names  # workers can't import __main__

    results = joblib.Parallel(n_jobs=arguments.jobs)(joblib.delayed(try_names)(names) for names in exports)
    alone, pairs, lost = {}, collections.defaultdict(collections.Counter), 0
    total = collections.Counter()
    for names, (outcome, message) in zip(exports, results, strict=True):
        kind = 'lost' if outcome.startswith('LOST') else outcome
        total[kind] += 1
        if kind == 'lost':
            lost += 1
            print(f'{" + ".join(names)}: {outcome} ({message})')
        if len(names) == 1:
            alone[names[0]] = kind
        for name in names if len(names) == 2 else ():
            pairs[name][kind] += 1
    print('| fault | alone | in pairs: read | doubted | refused | lost |\n|---|---|---|---|---|---|')
    for name, kind in alone.items():
        counts = ' | '.join(str(pairs[name][k]) for k in ('read', 'doubted', 'refused', 'lost'))
        print(f'| {name} | {kind} | {counts} |')
    print(f'{total.total()} exports: {dict(total)}; {time.perf_counter() - started:.0f} s')
    sys.exit(bool(lost))


if __name__ == '__main__':
    main()
