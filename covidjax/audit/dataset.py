"""Reads a raw directory for an audit.

Training stops at a bad row of a list. An audit reports the row and reads on.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covidjax.data import lists
from covidjax.data.sequences import Scan, group_scans
from covidjax.errors import UserError


class Split(NamedTuple):
    """The valid rows of one list, at least one.

    Attributes:
      rows: in list order, with sources.
      labels: int [N].
      scans: the M scans, from `group_scans`.
      scan_labels: int [M].
    """

    rows: list[lists.Row]
    labels: np.ndarray
    scans: list[Scan]
    scan_labels: np.ndarray


class Dataset(NamedTuple):
    """The content of a raw directory.

    Attributes:
      raw_dir: the directory.
      version: '1', '2A' or '3A', from the names of the lists.
      splits: the lists with at least one valid row.
      absent: names of the missing lists.
      num_lines: total over all lists.
      faults: '<list>:<line>: <reason>' per bad row, and lists that cannot be read.
      bad_files: files named by bad rows.
      metadata: columns of metadata.csv by patient, or None.
      metadata_reason: why metadata is None, else empty.
      images: the image folder, or None.
      images_reason: why images is None, else empty.
    """

    raw_dir: Path
    version: str
    splits: dict[str, Split]
    absent: list[str]
    num_lines: int
    faults: list[str]
    bad_files: set[str]
    metadata: dict[str, dict[str, str]] | None
    metadata_reason: str
    images: Path | None
    images_reason: str


def read_dataset(raw_dir: Path) -> Dataset:
    """Reads the lists and metadata of a raw directory and finds its images.

    Raises:
      UserError: no such directory, no list in it, or lists of several versions.
    """
    version = lists.find_version(os.fspath(raw_dir))
    metadata, metadata_reason = _read_metadata(raw_dir / 'metadata.csv')
    sources = lists.get_sources(metadata or {})
    splits, absent, faults, bad_files, num_lines = {}, [], [], set(), 0
    for split in lists.SPLITS:
        name = lists.get_list_name(split, version)
        if not (raw_dir / name).exists():
            absent.append(name)
            continue
        rows, list_faults, list_bad_files = lists.parse_list(os.fspath(raw_dir / name), {})
        num_lines += len(rows) + len(list_faults)
        faults += list_faults
        bad_files |= list_bad_files
        if rows:
            rows = lists.add_sources(rows, sources)
            scans = group_scans(rows)
            labels, scan_labels = (np.array([x.label for x in things]) for things in (rows, scans))
            splits[split] = Split(rows, labels, scans, scan_labels)
    try:
        images, images_reason = Path(lists.find_images(os.fspath(raw_dir), version)), ''
    except UserError:
        images, images_reason = None, 'there is no image folder'
    return Dataset(
        raw_dir, version, splits, absent, num_lines, faults, bad_files, metadata, metadata_reason, images, images_reason
    )


def make_printable(text: str) -> str:
    """Returns text with unprintable characters escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _read_metadata(path: Path) -> tuple[dict[str, dict[str, str]] | None, str]:
    if not path.is_file():
        return None, 'there is no metadata.csv'
    try:
        return lists.read_metadata(os.fspath(path)), ''
    except UserError as error:
        return None, str(error)
