"""Folders of slice images with outlines: slices.csv, raw COVIDx CT directories and phantoms."""

import csv
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from covidjax.data import lists, phantom
from covidjax.data.masked_slices import (
    BINARY,
    CONSOLIDATION,
    KINDS,
    LESION,
    LUNGS,
    Outlined,
    Unit,
    combine_masks,
    read_grey,
    read_mask,
    read_metadata_sources,
)
from covidjax.data.masked_split import split_by_source
from covidjax.errors import UserError, join_faults

LIST_NAME = 'slices.csv'
MASK_COLUMNS = ('lesion', 'multiclass', 'lungs')


def list_table(folder: Path) -> list[Unit]:
    """Lists the slices of `slices.csv`. See `masked.read_masked` for its columns and for the split.

    Raises:
      UserError: the list is unreadable or has bad rows (all counted, the first 20 named).
    """
    path = folder / LIST_NAME
    rows = _read_table(path)
    if not rows:
        raise UserError(f'{path} has no row: list at least one slice, or leave the folder out')
    if 'image' not in rows[0] or not set(MASK_COLUMNS) & set(rows[0]):
        raise UserError(f'{path} needs the column image and at least one of {", ".join(MASK_COLUMNS)}')
    root, faults, files = folder.resolve(), [], []
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        try:
            files.append(_find_files(root, row))
            first = seen.setdefault(row['image'], number)
            if first != number:
                raise ValueError(f'{row["image"]} is already listed in line {first}')
            if 'split' in row and row['split'] not in lists.SPLITS:
                raise ValueError(f'the split {row["split"]!r} is not one of {", ".join(lists.SPLITS)}')
        except ValueError as error:
            faults.append(f'{LIST_NAME}:{number}: {error}')
    if faults:
        raise UserError(f'bad rows in {path}, fix them and run again: {join_faults(faults)}')
    patients = [row.get('patient') or row['image'] for row in rows]
    sources = [row.get('source') or root.name for row in rows]
    splits = _choose_splits([row.get('split') for row in rows], patients, sources)
    counts, indices, units = Counter(row.get('patient') for row in rows), Counter(), []
    for i, row in enumerate(rows):
        patient = row.get('patient', '')
        is_volume = bool(patient) and counts[patient] > 1
        read = functools.partial(_read_slice, row['image'], files[i], indices[patient] if is_volume else 0)
        indices[patient] += 1
        volume = patient if is_volume else ''
        units.append(Unit(f'{LIST_NAME}:{i + 2}', splits[i], patient, sources[i], volume, read))
    return units


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            return [{k: v or '' for k, v in row.items() if k} for row in csv.DictReader(file)]
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): fix its permissions, or copy it again') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV file in UTF-8 ({error}): save it as one') from error


def _find_files(root: Path, row: dict[str, str]) -> dict[str, Path]:
    """Returns the image and the masks of a row by column. Raises ValueError for a path that leaves the folder."""
    files = {}
    for column in ('image', *MASK_COLUMNS):
        part = row.get(column, '')
        if not part and column != 'image':
            continue
        path = (root / part).resolve()
        if not part or not path.is_relative_to(root):
            raise ValueError(f'{part!r} is not a path inside the folder')
        files[column] = path
    if len(files) == 1:
        raise ValueError(f'{row["image"]} has no mask: fill in {" or ".join(MASK_COLUMNS)}, or take the row away')
    return files


def _choose_splits(listed: list[str | None], patients: list[str], sources: list[str]) -> list[str]:
    """Returns the split of every row: as listed, and where parts are missing by the hash of the patients."""
    if None in listed:
        return split_by_source(patients, sources, with_test=True)
    if 'val' in listed:
        return listed
    training = [i for i, split in enumerate(listed) if split == 'train']
    splits = split_by_source([patients[i] for i in training], [sources[i] for i in training], with_test=False)
    chosen = dict(zip(training, splits, strict=True))
    return [chosen.get(i, split) for i, split in enumerate(listed)]


def _read_slice(name: str, files: dict[str, Path], index: int) -> Iterator[Outlined]:
    grey = read_grey(files['image'])

    def read(column: str, allowed: tuple[tuple[int, ...], ...]) -> np.ndarray | None:
        return read_mask(files[column], grey.shape, allowed) if column in files else None

    lungs, lesion, kinds = read('lungs', BINARY), read('lesion', BINARY), read('multiclass', KINDS)
    masks = combine_masks(None if lungs is None else lungs > 0, None if lesion is None else lesion > 0, kinds)
    yield Outlined(name, index, None, grey, masks)


def list_raw(folder: Path) -> list[Unit]:
    """Lists the slices of class 0 of a raw COVIDx CT directory: they have no lesion. The body boxes are not used.

    Raises:
      UserError: bad lists (see `lists.parse_list`), no image folder, or no slice of class 0.
    """
    rows = [(split, row) for split, row in _read_lists(folder) if row.label == 0]
    if not rows:
        raise UserError(f'{folder} lists no slice of class 0 (normal), the only ones whose lesions are known: none')
    images = Path(lists.find_images(str(folder), lists.find_version(folder)))

    def read(row: lists.Row) -> Iterator[Outlined]:
        grey = read_grey(images / row.file)
        none = np.zeros(grey.shape, bool)
        yield Outlined(row.file, row.slice_index, None, grey, {LESION: none, CONSOLIDATION: none})

    return _list_rows(folder, rows, read)


def list_phantoms(folder: Path) -> list[Unit]:
    """Lists the slices of a folder of phantoms, whose lungs, lesions and consolidations are all known.

    Raises:
      UserError: bad lists, or phantoms that were written without masks of the lungs.
    """
    if not (folder / phantom.LUNGS_FOLDER).is_dir():
        raise UserError(
            f'{folder} holds phantoms of an earlier version, without {phantom.LUNGS_FOLDER}/: delete that folder and '
            'run again'
        )

    def read(row: lists.Row) -> Iterator[Outlined]:
        grey = read_grey(folder / phantom.IMAGE_FOLDER / row.file)
        lungs = read_mask(folder / phantom.LUNGS_FOLDER / row.file, grey.shape, BINARY) > 0
        path = folder / phantom.MASK_FOLDER / row.file  # there is none for a slice without a lesion
        lesion = read_mask(path, grey.shape, BINARY) > 0 if path.exists() else np.zeros(grey.shape, bool)
        consolidation = lesion & (row.label == phantom.PNEUMONIA)
        masks = {LUNGS: lungs, LESION: lesion, CONSOLIDATION: consolidation}
        yield Outlined(row.file, row.slice_index, None, grey, masks)

    return _list_rows(folder, _read_lists(folder), read)


def _read_lists(folder: Path) -> list[tuple[str, lists.Row]]:
    """Returns (split, row) of all three lists. Unlike `lists.read_lists`, one class is enough."""
    version = lists.find_version(folder)
    rows, faults, first_seen = [], [], {}
    for split in lists.SPLITS:
        path = os.path.join(folder, lists.get_list_name(split, version))
        found, list_faults, _ = lists.parse_list(path, first_seen)
        rows += [(split, row) for row in found]
        faults += list_faults
    if faults:
        raise UserError(f'bad lists in {folder}, fix them and run again: {join_faults(faults)}')
    return rows


def _list_rows(
    folder: Path, rows: list[tuple[str, lists.Row]], read: Callable[[lists.Row], Iterator[Outlined]]
) -> list[Unit]:
    known, name = read_metadata_sources(folder), folder.resolve().name
    counts = Counter(row.scan for _, row in rows)
    return [
        Unit(
            where='',
            split=split,
            patient=row.patient,
            source=known.get(row.patient, name),
            volume=row.scan if counts[row.scan] > 1 else '',
            read=functools.partial(read, row),
        )
        for split, row in rows
    ]
