"""Checks of the lists: rows, classes, scans, sequences of 16 slices, leakage, labels."""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from covidjax.audit import figures
from covidjax.audit.check import BROKEN, LOOK, NOT_CHECKED, OK, Check, count_things, join_words
from covidjax.audit.dataset import Dataset
from covidjax.audit.version_check import count_classes, find_candidates
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.data.published import SEQUENCES
from covidjax.data.sequences import NUM_SLICES
from covidjax.report.page import Table

# 'look' if the 16-slice rule drops more than this share of the scans of a class.
_MAX_DROPPED = 0.1


def check_rows(dataset: Dataset) -> Check:
    """Checks that every line of every list is a valid row."""
    title = 'Rows of the lists'
    if dataset.faults:
        reason = f'{count_things(len(dataset.faults), "fault")} in {count_things(dataset.num_lines, "line")}.'
        return Check('lists.rows', title, BROKEN, reason, dataset.faults)
    absent = f'; {join_words(dataset.absent)} not there' if dataset.absent else ''
    reason = f'All {count_things(dataset.num_lines, "line")} of {join_words(list(dataset.splits))} are good{absent}.'
    return Check('lists.rows', title, OK, reason)


def check_classes(dataset: Dataset) -> Check:
    """Checks that every list has every class."""
    faults = [
        f'{split}: no slice of class {label} ({CLASSES[label]})'
        for split, part in dataset.splits.items()
        for label, count in enumerate(count_classes(part.labels))
        if not count
    ]
    if faults:
        verdict, reason = BROKEN, 'A class is missing from a list, so it can neither be learnt nor tested there.'
    else:
        verdict, reason = OK, f'All {len(CLASSES)} classes stand in {join_words(list(dataset.splits))}.'
    return Check('lists.classes', 'Classes in every list', verdict, reason, faults)


def check_lengths(dataset: Dataset) -> Check:
    """Tabulates slices per scan by class; `check_names` judges whether they predict the class."""
    rows = []
    lengths = {name: [] for name in CLASSES}
    for part in dataset.splits.values():
        for scan in part.scans:
            lengths[CLASSES[scan.label]].append(len(scan.records))
    for name, values in lengths.items():
        if values:
            low, median, high = np.quantile(values, (0.05, 0.5, 0.95))
            rows.append((name, len(values), min(values), float(low), float(median), float(high), max(values)))
    columns = ('class', 'scans', 'fewest', '5 %', 'median', '95 %', 'most')
    medians = join_words([f'{row[0]} {row[4]:.0f}' for row in rows])
    num_scans = count_things(sum(row[1] for row in rows), 'scan')
    num_patients = count_things(len({s.patient for p in dataset.splits.values() for s in p.scans}), 'patient')
    reason = f'{num_scans} of {num_patients}; the median scan holds, in slices: {medians}.'
    check = Check('scans.lengths', 'Slices per scan', OK, reason, tables=[Table('Slices per scan', columns, rows)])
    check.pictures.append(functools.partial(figures.render_lengths, lengths))
    return check


def check_sequences(dataset: Dataset) -> Check:
    """Counts scans of 16 slices or more; compares them with Table II of the paper if the lists are the paper's."""
    are_the_papers = 'CT-2A' in find_candidates(dataset)
    rows, remarks, differ = [], [], False
    for split, part in dataset.splits.items():
        long = np.array([len(scan.records) >= NUM_SLICES for scan in part.scans])
        ours = count_classes(part.scan_labels[long])
        paper = SEQUENCES[SPLITS.index(split)] if are_the_papers else (None,) * len(CLASSES)
        rows += [(split, *row) for row in zip(CLASSES, ours, paper, strict=True)]
        rows.append((split, 'total', sum(ours), sum(paper) if are_the_papers else None))
        without_last = count_classes(part.scan_labels[:-1][long[:-1]])
        shown = f'{sum(ours):,} ({"/".join(f"{count:,}" for count in ours)})'
        if not are_the_papers:
            remarks.append(f'{split} {shown}')
        elif ours == paper:
            remarks.append(f'{split} {shown} as in the paper')
        elif without_last == paper:
            remarks.append(
                f"{split} {shown} where the paper prints {sum(paper):,}, because its authors' loop loses the last "
                f'scan of a list, here one of class {CLASSES[part.scans[-1].label]}'
            )
        else:
            differ = True
            remarks.append(f'{split} {shown} where the paper prints {sum(paper):,}')
    table = Table(f'Scans of {NUM_SLICES} slices or more', ('split', 'class', 'scans', 'Table II'), rows)
    reason = f'COVIDx-SeqCT from these lists: {"; ".join(remarks)}.'
    return Check('scans.sequences', 'COVIDx-SeqCT', LOOK if differ else OK, reason, tables=[table])


def check_short(dataset: Dataset) -> Check:
    """Counts the scans that the rule of 16 slices drops."""
    total, dropped, rows = Counter(), Counter(), []
    for split, part in dataset.splits.items():
        for label, name in enumerate(CLASSES):
            scans = [scan for scan in part.scans if scan.label == label]
            short = sum(len(scan.records) < NUM_SLICES for scan in scans)
            total[name] += len(scans)
            dropped[name] += short
            rows.append((split, name, len(scans), short, short / len(scans) if scans else None))
    shares = [f'{dropped[c]:,} of {total[c]:,} {c} ({dropped[c] / total[c]:.0%})' for c in CLASSES if total[c]]
    verdict = LOOK if any(dropped[c] > _MAX_DROPPED * total[c] for c in CLASSES) else OK
    reason = f'Dropping scans of fewer than {NUM_SLICES} slices loses {join_words(shares)}.'
    sick, sick_dropped = (sum(counts[c] for c in CLASSES[1:]) for counts in (total, dropped))
    if verdict == LOOK and sick:
        reason = f'{reason[:-1]}: {sick_dropped / sick:.0%} of the sick scans.'
    table = Table('Scans that are too short', ('split', 'class', 'scans', 'dropped', 'share'), rows)
    return Check('scans.short', f'What the rule of {NUM_SLICES} slices drops', verdict, reason, tables=[table])


def check_leakage(dataset: Dataset) -> list[Check]:
    """Checks for leakage: files, scans and patients in more than one list."""
    things = {
        'files': ('file', {split: {row.file for row in part.rows} for split, part in dataset.splits.items()}),
        'scans': ('scan', {split: {scan.scan for scan in part.scans} for split, part in dataset.splits.items()}),
        'patients': ('patient', {split: {s.patient for s in part.scans} for split, part in dataset.splits.items()}),
    }
    checks = []
    for name, (thing, members) in things.items():
        title = f'{name.capitalize()} in several lists'
        if len(members) < 2:
            reason = 'There is only one list with rows.'
            checks.append(Check(f'leakage.{name}', title, NOT_CHECKED, reason))
            continue
        shared = _find_shared(members)
        faults = [f'{thing} {member}: {join_words(splits)}' for member, splits in sorted(shared.items())]
        rows = [(split, len(ids), len(ids & shared.keys())) for split, ids in members.items()]
        table = Table(title, ('split', name, 'also in another'), rows)
        if shared:
            verb = 'stands' if len(shared) == 1 else 'stand'
            reason = f'{count_things(len(shared), thing)} {verb} in more than one list: results on them are no test.'
        else:
            reason = f'No {thing} stands in more than one of {join_words(list(members))}.'
        checks.append(Check(f'leakage.{name}', title, BROKEN if shared else OK, reason, faults, [table]))
    return checks


def _find_shared(members: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Returns the splits of every ID that is in several."""
    counts = Counter(member for ids in members.values() for member in ids)
    return {m: [split for split, ids in members.items() if m in ids] for m, n in counts.items() if n > 1}


def check_labels(dataset: Dataset) -> list[Check]:
    """Checks for scans and patients with more than one class."""
    classes: dict[str, dict[str, set[int]]] = {'scan': defaultdict(set), 'patient': defaultdict(set)}
    for part in dataset.splits.values():
        for scan in part.scans:
            classes['scan'][scan.scan].add(scan.label)
            classes['patient'][scan.patient].add(scan.label)
    checks = []
    # A patient may fall ill or recover between two scans, but one scan has one diagnosis.
    for thing, verdict in (('scan', BROKEN), ('patient', LOOK)):
        faults = [f'{thing} {name}: {_name_classes(found)}' for name, found in classes[thing].items() if len(found) > 1]
        if faults:
            verb = 'carries' if len(faults) == 1 else 'carry'
            reason = f'{count_things(len(faults), thing)} {verb} more than one class.'
        else:
            verdict, reason = OK, f'Each of {count_things(len(classes[thing]), thing)} carries one class.'
        checks.append(
            Check(f'labels.{thing}s', f'{thing.capitalize()}s with more than one class', verdict, reason, faults)
        )
    return checks


def _name_classes(labels: Iterable[int]) -> str:
    return join_words([CLASSES[label] for label in sorted(labels)])
