"""Slices with outlines of the lungs, of lesions and of consolidation, from one or several folders.

`read_masked` documents the kinds of folders.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
from PIL import Image

from covidjax.data import lists, phantom, preprocess
from covidjax.data.masked_folder import LIST_NAME, list_phantoms, list_raw, list_table
from covidjax.data.masked_slices import CONSOLIDATION, LESION, LUNGS, Outlined, Unit
from covidjax.data.sources import check_sources
from covidjax.errors import WORKER_KILLED, UserError, join_faults
from covidjax.progress import track

__all__ = ['CONSOLIDATION', 'LESION', 'LUNGS', 'MaskedData', 'MaskedRow', 'read_masked']

_MIN_PARALLEL = 1000  # slices; workers start in 1 to 2 seconds, as long as about 200 slices take


class MaskedRow(NamedTuple):
    """One slice.

    Attributes:
      name: unique over all folders: the folder, then the image, or the case and the number of the slice.
      patient: patient ID.
      source: name of the source.
      volume: unique name of the scan that it belongs to, with the folder; '' for a single slice.
      slice_index: place in the volume, from head to feet where the volume tells.
      spacing_mm: distances of rows, columns and slices of the prepared [S, S] slice, or None.
      known: sum of the codes of the masks that exist.
      has_lesion: whether a pixel of the prepared slice is lesion.
    """

    name: str
    patient: str
    source: str
    volume: str
    slice_index: int
    spacing_mm: tuple[float, float, float] | None
    known: int
    has_lesion: bool


class MaskedSource:
    """Random access to the slices of a split. They are kept in memory as PNG: about 30 kB each at 224 pixels.

    Args:
      pairs: PNG of the image and PNG of the mask codes of each slice.
      known: code of the masks that exist, of each slice.
    """

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]], known: Sequence[int]):
        self._pairs = pairs
        self._known = known

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict:
        """Returns {'image': uint8 [S, S, 1], 'masks': uint8 [S, S, 1], 'known': uint8} of one slice.

        Raises:
          IndexError: `index` is out of range.
        """
        if not 0 <= index < len(self):
            raise IndexError(f'slice {index} of {len(self)}')
        image, masks = self._pairs[index]
        return {
            'image': preprocess.decode_png(image),
            'masks': preprocess.decode_png(masks),
            'known': np.uint8(self._known[index]),
        }


class MaskedData(NamedTuple):
    """Slices with outlines, by split.

    Attributes:
      rows: what is known of each slice, by split ('train', 'val', 'test').
      sources: the slices of each split, in the order of `rows`: records {'image', 'masks', 'known'}. `masks` holds sums
        of the codes `LUNGS`, `LESION` and `CONSOLIDATION`; a bit means something only if it is set in `known`.
      folders: that were read.
      fingerprint: SHA-256, in hex, of all of it.
    """

    rows: dict[str, list[MaskedRow]]
    sources: dict[str, Sequence[dict]]
    folders: tuple[Path, ...]
    fingerprint: str


def read_masked(
    folders: Sequence[Path], size: int, sources: Sequence[str] = (), *, for_training: bool = True
) -> MaskedData:
    """Reads slices with outlines.

    Slices are resized whole: images bicubically; a pixel of a mask is set if the mask covers at least half of it.

    A folder is of one of four kinds:

    1. `slices.csv`, with the columns `image` and at least one of `lesion`, `multiclass` and `lungs`: paths of images
       inside the folder, all of one size. `lesion` and `lungs` are 0 and 1, or 0 and 255; `multiclass` is 0, 1 for
       ground glass and 2 for consolidation. A mask may be missing in a row. The columns `split` (train, val or test),
       `patient` and `source` are optional. Slices of one patient are one volume, in the order of the list. Without
       `patient`, each image is a patient.
    2. Volumes in NIfTI: `<case>.nii.gz`, `<case>_lungs.nii.gz` (0 and 1, or 1 and 2 for the two lungs) and
       `<case>_lesions.nii.gz` (0 and 1, or 1 for ground glass and 2 for consolidation); one of the masks may be
       missing, and all may be `.nii`. Every case is a patient. Slices are axial by the header; masks have the shape
       and geometry of their scan. Scans are in Hounsfield units, brought to grey by the COVIDx CT window, or, if all
       values are in 0..255, in grey already.
    3. A raw COVIDx CT directory: the slices of class 0, as split by its lists. They have no lesion.
    4. A directory of `phantom.write_phantoms`. All masks are known; the lesion of a pneumonia is consolidation.

    Consolidation is known where `multiclass` or a volume with the value 2 tells it, and where there is no lesion.

    Splits that are missing are made by a fixed rule, for each source of a folder on its own: the patients are sorted by
    the SHA-256 of their ID. Without any split, the first fifth is test, the second validation; with a list that has no
    validation part, the first fifth of its training patients is validation (see `masked_split.split_patients`).

    The source comes from the column `source` of slices.csv, or from that of a `metadata.csv` with the column
    `patient id`. Without one it is the name of the folder.

    Args:
      folders: to read.
      size: side S of the slices in pixels.
      sources: names of the sources to read; empty for all.
      for_training: whether a model learns from train and is tested on test, so that they must share nothing.

    Raises:
      UserError: a folder is missing, empty or of no kind; a source that no folder has; an unreadable image; a mask of
        another size, geometry or with other values. With `for_training` also: a patient in two splits; equal pixels in
        train or val and in test; no lesion mask in train.
    """
    folders = tuple(Path(folder).expanduser() for folder in folders)
    labels = _label_folders(folders)
    units = [(label, unit) for label, folder in zip(labels, folders, strict=True) for unit in _list_units(folder)]
    units = _choose_sources(units, [name for name in sources if name])
    if for_training:
        _check_patients(units)
    rows: dict[str, list[MaskedRow]] = {split: [] for split in lists.SPLITS}
    pairs: dict[str, list[tuple[bytes, bytes]]] = {split: [] for split in lists.SPLITS}
    fingerprint, faults = hashlib.sha256(str(size).encode()), []
    first_seen: dict[bytes, tuple[str, str]] = {}
    for (label, unit), (slices, fault) in zip(units, _prepare_units(units, size), strict=True):
        if fault:
            faults.append(f'{label}/{unit.where}{": " if unit.where else ""}{fault}')
        for row, image, masks, digest in slices:
            rows[unit.split].append(row)
            pairs[unit.split].append((image, masks))
            fingerprint.update(json.dumps([unit.split, *row]).encode() + digest + hashlib.sha256(masks).digest())
            if digest and for_training:
                other, split = first_seen.setdefault(digest, (row.name, unit.split))
                if (split == 'test') != (unit.split == 'test'):
                    faults.append(f'{row.name} in {unit.split} has the pixels of {other} in {split}: take one away')
    if faults:
        raise UserError(f'bad outlined slices, fix them and run again: {join_faults(faults)}')
    if for_training and not any(row.known & LESION for row in rows['train']):
        raise UserError(
            f'no slice for training has a lesion mask in {", ".join(map(str, folders))}: add outlined slices'
        )
    slices = {split: MaskedSource(pairs[split], [row.known for row in rows[split]]) for split in lists.SPLITS}
    return MaskedData(rows, slices, folders, fingerprint.hexdigest())


def _label_folders(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each folder: its own, with as many parents as tell it from the others."""
    if not folders:
        raise UserError('no folder of outlined slices: name one')
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f'{folders[i]} is named twice: name it once')
    labels = []
    for folder in resolved:
        depth = 1
        while sum(other.parts[-depth:] == folder.parts[-depth:] for other in resolved) > 1:
            depth += 1
        labels.append('/'.join(folder.parts[-depth:]))
    return labels


def _list_units(folder: Path) -> list[Unit]:
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({error.strerror}): name a folder of outlined slices') from error
    if not names:
        raise UserError(f'{folder} is empty: name a folder of outlined slices')
    from covidjax.data.masked_nifti import ENDINGS, list_volumes  # loads nibabel and pydicom

    is_raw = any(lists.get_list_name(split, version) in names for split in lists.SPLITS for version in lists.VERSIONS)
    is_phantom = is_raw and {phantom.OPTIONS_FILE, phantom.MASK_FOLDER} <= names
    kinds = {
        LIST_NAME: (LIST_NAME in names, list_table),
        'COVIDx CT lists': (is_raw, list_phantoms if is_phantom else list_raw),
        'NIfTI volumes': (any(name.endswith(ENDINGS) for name in names), list_volumes),
    }
    found = [kind for kind, (is_there, _) in kinds.items() if is_there]
    if len(found) != 1:
        wrong = f'{" and ".join(found)} in one folder' if found else 'no outlined slices'
        raise UserError(f'{folder} holds {wrong}: it needs {LIST_NAME}, NIfTI volumes or COVIDx CT lists')
    return kinds[found[0]][1](folder)


def _choose_sources(units: list[tuple[str, Unit]], sources: Sequence[str]) -> list[tuple[str, Unit]]:
    names = sorted({unit.source for _, unit in units})
    check_sources(sources, names, 'the folders have')
    return [(label, unit) for label, unit in units if not sources or unit.source in sources]


def _check_patients(units: Sequence[tuple[str, Unit]]) -> None:
    """Raises UserError for patients in two splits."""
    first: dict[str, tuple[str, str]] = {}
    faults = {}
    for label, unit in units:
        if not unit.patient:
            continue
        other, split = first.setdefault(unit.patient, (label, unit.split))
        if split != unit.split:
            faults.setdefault(unit.patient, f'{unit.patient} ({split} of {other}, {unit.split} of {label})')
    if faults:
        raise UserError(f'patients in two splits, move or rename them: {join_faults(list(faults.values()))}')


class _Slice(NamedTuple):
    """A prepared slice: its row, PNGs of image and mask codes, and the SHA-256 of the pixels.

    The SHA-256 is b'' for an image of a single grey. Such slices lie beyond the ends of volumes and are no copies.
    """

    row: MaskedRow
    image: bytes
    masks: bytes
    digest: bytes


def _prepare_units(units: Sequence[tuple[str, Unit]], size: int) -> Iterator[tuple[list[_Slice], str]]:
    """Yields (slices, '') or ([], reason) for each unit; many are read by worker processes on all cores."""
    num_workers = (
        1 if sum(unit.work for _, unit in units) < _MIN_PARALLEL else max(1, min(joblib.cpu_count(), len(units)))
    )
    # max_nbytes=None turns off memory mapping, which does not pay for paths.
    results = joblib.Parallel(n_jobs=num_workers, return_as='generator', max_nbytes=None)(
        joblib.delayed(_prepare_unit)(label, unit, size, os.getpid()) for label, unit in units
    )
    try:
        yield from track(results, 'reading outlined slices', len(units), 'file')
    except BrokenProcessPool as error:
        raise UserError(f'cannot read outlined slices: {WORKER_KILLED}') from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # joblib warns of cancelled tasks; after an error that is intended
            results.close()


def _prepare_unit(label: str, unit: Unit, size: int, main_pid: int) -> tuple[list[_Slice], str]:
    preprocess.set_up_worker(main_pid)
    try:
        return [_prepare_slice(outlined, unit, label, size) for outlined in unit.read()], ''
    except ValueError as error:
        return [], str(error)


def _prepare_slice(outlined: Outlined, unit: Unit, label: str, size: int) -> _Slice:
    name = f'{label}/{outlined.name}'
    masks = np.zeros((size, size), np.uint8)
    for code, mask in outlined.masks.items():
        full = Image.fromarray(mask.astype(np.uint8) * 255)
        masks |= (np.asarray(full.resize((size, size), Image.Resampling.BOX)) >= 128) * np.uint8(code)
    spacing_mm = outlined.spacing_mm
    if spacing_mm is not None:
        height, width = outlined.grey.shape
        spacing_mm = spacing_mm[0] * height / size, spacing_mm[1] * width / size, spacing_mm[2]
    row = MaskedRow(
        name=name,
        patient=unit.patient or name,
        source=unit.source,
        volume=f'{label}/{unit.volume}' if unit.volume else '',
        slice_index=outlined.slice_index,
        spacing_mm=spacing_mm,
        known=sum(outlined.masks),
        has_lesion=bool((masks & LESION).any()),
    )
    image = preprocess.resize(outlined.grey, size)
    digest = hashlib.sha256(image.tobytes()).digest() if np.ptp(image) else b''
    return _Slice(row, preprocess.encode_png(image), preprocess.encode_png(masks), digest)
