"""Runs an audit: all checks in order, then the reports."""

from pathlib import Path
from typing import Any

from covidjax.audit import baseline_checks, image_checks, label_checks, list_checks, metadata_checks, source_checks
from covidjax.audit.check import NOT_CHECKED, Check
from covidjax.audit.copies import Place, check_copies
from covidjax.audit.dataset import Dataset, read_dataset
from covidjax.audit.measure import list_files, measure_images
from covidjax.audit.report import describe_audit, format_summary, save_audit
from covidjax.audit.version_check import check_version
from covidjax.files import report_write_errors


def run_audit(raw_dir: Path, workdir: Path, predictions: Path | None = None) -> dict[str, Any]:
    """Audits a raw COVIDx CT directory and prints a summary.

    Writes audit.json and audit.html. Lists, metadata.csv and images may each be missing; their checks are then
    'not checked'. The lists of CT-3A take seconds. Each image is read once, on all cores.

    Args:
      raw_dir: the directory of the lists.
      workdir: where the reports go; created if missing.
      predictions: predictions.csv of a cross-validation of these data: labels that it contradicts are listed.

    Returns:
      The content of audit.json, see `report.describe_audit`. Its 'verdict' is 'broken' if any check is.

    Raises:
      UserError: no such directory, no list in it, lists of several versions, or a workdir that cannot be written;
        predictions that cannot be read.
    """
    raw_dir, workdir = Path(raw_dir), Path(workdir)
    dataset = read_dataset(raw_dir)
    predicted = None if predictions is None else label_checks.read_predictions(Path(predictions))
    with report_write_errors(workdir, '--workdir'):  # fail before the long work
        workdir.mkdir(parents=True, exist_ok=True)
    checks = check_dataset(dataset)
    if predicted is not None and dataset.splits:
        checks.append(label_checks.check_predicted_labels(dataset, predicted))
    audit = describe_audit(dataset, checks)
    with report_write_errors(workdir, '--workdir'):
        save_audit(audit, checks, workdir)
    print(format_summary(audit))
    print(f'wrote {workdir / "audit.json"} and {workdir / "audit.html"}')
    return audit


def check_dataset(dataset: Dataset) -> list[Check]:
    """Runs every check and returns the results in order."""
    checks = [list_checks.check_rows(dataset)]
    if not dataset.splits:
        return checks  # without a valid row there is nothing to check
    checks += [
        list_checks.check_classes(dataset),
        check_version(dataset),
        list_checks.check_lengths(dataset),
        list_checks.check_sequences(dataset),
        list_checks.check_short(dataset),
        *list_checks.check_leakage(dataset),
        *list_checks.check_labels(dataset),
        *metadata_checks.check_metadata(dataset),
        source_checks.check_lone_classes(dataset),
        baseline_checks.check_names(dataset),
    ]
    if dataset.images is None:
        reason = f'{dataset.images_reason[:1].upper()}{dataset.images_reason[1:]}.'
        titles = {
            **image_checks.TITLES,
            'baselines.thumbnails': 'What a thumbnail predicts',
            source_checks.NAME: source_checks.TITLE,
        }
        skipped = [Check(name, title, NOT_CHECKED, reason) for name, title in titles.items()]
        return [*checks, image_checks.check_boxes(dataset, None), *skipped]
    return checks + _check_images(dataset)


def _check_images(dataset: Dataset) -> list[Check]:
    files = list_files(dataset.images)
    places = {}
    for split, part in dataset.splits.items():
        for row in part.rows:
            if row.file in files:
                places.setdefault(row.file, Place(split, row))  # check_leakage reports files in two lists
    drawn = baseline_checks.draw_thumbnail_rows(dataset)
    crop_files = {row.file for rows in drawn.values() for row in rows}
    images = measure_images([place.row for place in places.values()], dataset.images, crop_files)
    measured = [places[file] for file in images.index]
    return [
        image_checks.check_boxes(dataset, images),
        *image_checks.check_files(dataset, files),
        *image_checks.check_images(images, measured),
        *check_copies(images, measured),
        baseline_checks.check_thumbnails(drawn, images.crops),
        source_checks.check_sources(dataset, files),
    ]
