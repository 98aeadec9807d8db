"""One scan in, one report out: what a trained run says of a chest CT that belongs to no dataset."""

import functools
import hashlib
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

from covidjax.data import sequences
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import WINDOW_HU
from covidjax.data.scan.volume import Volume, format_counts
from covidjax.errors import UserError
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.conformal import predict_sets
from covidjax.evaluation.disagreement import compute_disagreement
from covidjax.evaluation.home import describe_home
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.outputs import SliceOutputs
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.screening import TARGETS, compute_target_scores
from covidjax.evaluation.sick import compute_sick, describe_disagreement, join, join_logits
from covidjax.evaluation.voting import compute_vote_logits
from covidjax.experiment.runs import (
    Run,
    average_outputs,
    compute_home_distances,
    compute_mean_novelty,
    compute_member_outputs,
    load_run,
)
from covidjax.explain.maps import Explanations
from covidjax.files import report_full_disk, report_write_errors, write_json
from covidjax.models.seq import HEADS, GatedClassifier, HeadOutputs, SequenceClassifier
from covidjax.predict.ahead import Reader, prepare, read_scan
from covidjax.predict.masks import create_labels, write_nifti, write_overlays
from covidjax.predict.outline import choose_slices, compute_view_features, outline_scan
from covidjax.predict.prepare import PreparedScan, Recipe, plan_recipe, stack_images
from covidjax.predict.windows import compare_windows
from covidjax.report.burden import LesionPrediction, Outlined, describe_burden
from covidjax.report.prediction import (
    Prediction,
    do_members_disagree,
    do_windows_disagree,
    is_unusual,
    write_page,
)

log = logging.getLogger(__name__)

NUM_TOP = 5
FALLBACK_RULE = 'mean'
DEFAULT_OUTPUT = Path('covidjax-predictions')  # without a workdir


def predict_all(
    workdir: Path | None,
    inputs: Sequence[Path],
    output: Path | None,
    *,
    series: str | None,
    force: bool,
    masks: bool = False,
    dicom: bool = False,
    windows: int = 3,
    reader: Reader | None = None,
) -> bool:
    """Writes prediction.json and prediction.html of every input and prints a line for each; says whether all went well.

    Args:
      workdir: see `runs.load_run`.
      inputs: see `volume.read_volume`.
      output: folder of the results of a single input, or of a folder for each of several; None is predictions/ of the
        workdir, or covidjax-predictions/ without one, with a folder for each.
      series: see `volume.read_volume`.
      force: goes on in spite of doubts, and says so on the report.
      masks, dicom: see `predict_one`.
      windows: see `create_recipe`.
      reader: reads the same inputs with the same settings; None: this process reads them.

    Raises:
      UserError: the run or the output is no good. What is wrong with an input is a line on stderr.
    """
    names = [path.resolve().name for path in inputs]
    shared = sorted({name for name in names if names.count(name) > 1})
    if shared:
        log.info(
            'several inputs are called %s: the SHA-256 of the contents tells their folders apart', ', '.join(shared)
        )
    run = load_run(workdir)
    if masks and run.lesions is None:
        raise UserError(f'--masks needs a lesion model, and {workdir} was trained without --config.lesions')
    parent = output or (DEFAULT_OUTPUT if workdir is None else workdir / 'predictions')
    all_well = True
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_programs, run)  # while the first scan is read
        for path, name in zip(inputs, names, strict=True):
            folder = output if output is not None and len(inputs) == 1 else parent / name
            try:
                is_shared = name in shared
                line = predict_one(
                    run,
                    path,
                    folder,
                    series=series,
                    force=force,
                    is_shared=is_shared,
                    masks=masks,
                    dicom=dicom,
                    windows=windows,
                    loading=loading,
                    reader=reader,
                )
                print(line, flush=True)
            except UserError as error:
                print(f'error: {error}', file=sys.stderr, flush=True)
                all_well = False
    return all_well


def load_programs(run: Run) -> None:
    """Compiles the models of a run, or loads them from the cache, by predicting an empty slice."""
    if run.members:
        size = run.config.data.image_size
        compute_member_outputs(run, np.zeros((1, size, size, 1), np.uint8))
    if run.lesions:
        size = run.lesions.image_size
        outline_slices(run.lesions, np.zeros((1, size, size), np.uint8))


def predict_one(
    run: Run,
    path: Path,
    folder: Path,
    *,
    series: str | None,
    force: bool,
    is_shared: bool = False,
    masks: bool = False,
    dicom: bool = False,
    windows: int = 3,
    loading: Future | None = None,
    reader: Reader | None = None,
) -> str:
    """Reads a scan, predicts it, writes prediction.json and prediction.html, and returns a line that says it.

    Args:
      run: the model.
      path, series: see `volume.read_volume`.
      folder: where the files go.
      force: goes on in spite of doubts.
      is_shared: appends the start of the SHA-256 of the contents to the name of the folder, which another scan has too.
      masks: also writes masks.nii.gz, in the geometry of the scan, and overlays/, slices with outlines; the run needs a
        lesion model.
      dicom: also writes DICOM results into a folder dicom/, see `dicom_results`; of a refused scan, a report that says
        why.
      windows: see `create_recipe`.
      loading: of `load_programs`; the model waits for it, so that nothing is compiled twice.
      reader: whose next scan this is; None: this process reads it.

    Raises:
      UserError: the scan is refused, or the folder can't be written.
    """
    recipe = create_recipe(run, windows)
    try:
        read = None if reader is None else reader.get(recipe)
        if read is None:
            read = read_scan(path, series, recipe, force=force, with_slices=masks)
        volume, prepared, seconds = read
        if loading is not None:
            wait([loading])  # whatever went wrong there goes wrong again below
        if is_shared:
            folder = folder.with_name(f'{folder.name}-{volume.sha256[:8]}')
        if isinstance(prepared, UserError):
            raise prepared
        if prepared is None:
            prepared = prepare(volume, path, recipe, seconds, force=force)
        prediction = predict_prepared(run, prepared, seconds)
    except UserError as error:
        if dicom:
            with report_write_errors(folder, '--output'), report_full_disk(folder):
                write_dicom_refusal(run, folder / 'dicom', path, series, error, windows)
        raise
    start = time.perf_counter()
    with report_write_errors(folder, '--output'), report_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_page(folder / 'prediction.html', volume, prediction, run.results)
        if masks:
            write_masks(folder, volume, prediction.outlined)
        seconds['report'] = time.perf_counter() - start
        summary = prediction.summary | {'seconds': {stage: round(s, 2) for stage, s in seconds.items()}}
        write_json(folder / 'prediction.json', summary)
        if dicom:
            write_dicom(run, folder / 'dicom', path, series, volume, prediction, windows)
    return format_line(summary, folder)


def write_dicom(
    run: Run,
    folder: Path,
    path: Path,
    series: str | None,
    volume: Volume,
    prediction: Prediction | LesionPrediction,
    windows: int = 3,
) -> None:
    """Writes the DICOM results of a prediction; see `dicom_results.create_results`.

    Raises:
      UserError: the scan is no DICOM, or its headers do not identify the slices.
    """
    from covidjax.predict import dicom_results

    headers = dicom_results.read_headers(path, series)
    maker = dicom_results.describe_maker(run.results, compute_version(run, windows))
    try:
        files = dicom_results.create_results(headers, volume, prediction, run.results, maker)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    dicom_results.write_files(folder, files)


def write_dicom_refusal(
    run: Run, folder: Path, path: Path, series: str | None, refusal: UserError, windows: int = 3
) -> bool:
    """Writes the DICOM report of a refused scan. Returns False, and writes nothing, if no slices can be referred to."""
    from covidjax.predict import dicom_results

    maker = dicom_results.describe_maker(run.results, compute_version(run, windows))
    try:
        headers = dicom_results.read_headers(path, series)
        files = dicom_results.create_refusal(headers, str(refusal).removeprefix(f'{path}: '), maker)
    except UserError:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    dicom_results.write_files(folder, files)
    return True


def write_masks(folder: Path, volume: Volume, outlined: Outlined) -> None:
    """Writes the outlines of a scan: masks.nii.gz, if the scan has a geometry, and overlays/ of its infected slices."""
    labels = create_labels(
        outlined.probabilities, outlined.burden, volume.lungs, [grey.shape for grey in volume.slices]
    )
    if volume.affine is not None:
        write_nifti(folder / 'masks.nii.gz', labels, volume.affine)
    overlays = folder / 'overlays'
    overlays.mkdir(exist_ok=True)
    for stale in overlays.glob('slice_*.png'):
        stale.unlink()
    places = [number - 1 for number in outlined.burden.infected] or choose_slices(outlined.burden)
    write_overlays(overlays, volume.slices, labels, places)


def predict_scan(
    run: Run, volume: Volume, seconds: dict[str, float], *, force: bool, path: Path, windows: int = 3
) -> Prediction | LesionPrediction:
    """Prepares the slices of a scan as for training and predicts them.

    Args:
      run: the model.
      volume: the scan.
      seconds: gets 'preparing' and 'model'.
      force: goes on in spite of doubts.
      path: of the scan, for messages.
      windows: see `create_recipe`, which also says how to read the scan.

    Raises:
      UserError: too few slices, or doubts.
    """
    return predict_prepared(run, prepare(volume, path, create_recipe(run, windows), seconds, force=force), seconds)


def predict_prepared(run: Run, prepared: PreparedScan, seconds: dict[str, float]) -> Prediction | LesionPrediction:
    """Returns the prediction for a prepared scan; `seconds` gets 'model'."""
    start = time.perf_counter()
    prediction = conclude(run, prepared, compute_member_outputs(run, stack_images(prepared)))
    seconds['model'] = time.perf_counter() - start
    rounded = {stage: round(s, 2) for stage, s in seconds.items()}
    return prediction._replace(summary=prediction.summary | {'seconds': rounded})


def compute_version(run: Run, windows: int = 3) -> str:
    """Returns 12 digits that name a run: the SHA-256 of its config, rules and weights, and of the number of windows."""
    digest = hashlib.sha256(run.config.to_json(sort_keys=True).encode())
    digest.update(repr(run.rules).encode())
    digest.update(f'windows {windows}'.encode())
    for leaf in jax.tree.leaves([(member.variables, member.novelty, member.home) for member in run.members]):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    if run.lesions:
        digest.update(run.lesions.digest.encode())
    return digest.hexdigest()[:12]


def create_recipe(run: Run, windows: int = 1) -> Recipe:
    """Returns how scans are prepared for a run; for `windows` see `prepare.plan_recipe`."""
    outline_size = run.lesions.image_size if run.lesions else 0
    windows = windows if run.members else 1  # a lesion model alone gives no call that could change
    return plan_recipe(run.config.data, is_scan_run=run.is_scan_run, outline_size=outline_size, windows=windows)


def describe_scan(run: Run, prepared: PreparedScan) -> dict[str, Any]:
    """Returns the parts of prediction.json about the scan, how it was read, and the model."""
    volume = prepared.volume
    return {
        'input': {
            'name': volume.name,
            'sha256': volume.sha256,
            'kind': volume.kind,
            'num_slices': len(prepared.boxes),
        },
        'reading': {
            **dict(volume.facts),
            'region': run.config.data.region,
            'notes': volume.notes + prepared.notes,
        },
        'left_out': volume.left_out,
        'forced': prepared.doubts,
        'model': run.results['model'],
        'trained_on': run.results['data'],
        'notice': run.results['notice'],
        'warnings': run.results.get('warnings', []),
    }


def conclude(run: Run, prepared: PreparedScan, by_member: tuple[SliceOutputs, ...]) -> Prediction | LesionPrediction:
    """Returns the prediction for a scan from the outputs of every member of the run for `stack_images`."""
    outlined = outline_scan(run.lesions, prepared) if run.lesions else None
    if not run.members:
        warnings = ['this model outlines lungs and lesions; it gives no verdict on COVID-19']
        summary = describe_scan(run, prepared) | {'warnings': warnings, 'lesions': outlined.summary}
        return LesionPrediction(summary, prepared.boxes, outlined)
    volume, used, boxes = prepared.volume, prepared.used, prepared.boxes
    stacked, by_member = by_member, _take(by_member, slice(len(prepared.images)))
    outputs = average_outputs(run, by_member)
    if not run.is_scan_run:
        stored = run.rules.get('scans')
        rule = stored['rule'] if stored else FALLBACK_RULE
        attention = None
        temperature = run.classifier_temperature
        shares, bias = sum_evidence(run, outputs)
        scan_logits, votes = vote(run, by_member)
    else:
        stored, rule, temperature = run.rules, None, 1.0
        scan_logits, attention, shares, bias, votes = classify_sequence(run, by_member)
    joined = {}
    if outlined:
        sick = _compute_sick(run, outlined.features)
        # Votes are of calibrated slices.
        alone = apply_temperature(scan_logits[np.newaxis], run.classifier_temperature if run.is_scan_run else 1.0)
        scan_logits, *votes = (_join(sick, x) for x in (scan_logits, *votes))
        joined = {
            'lesions': outlined.summary,
            'sick': {
                'probability': float(sick[0]),
                'classifier_alone': dict(zip(CLASSES, alone[0].tolist(), strict=True)),
                'disagreement': describe_disagreement(join(sick, alone)[0], alone[0]),
            },
        }
    # Slices of a slice run are calibrated; votes of them need a calibration of their own.
    probabilities = apply_temperature(scan_logits[np.newaxis], stored['temperature'] if stored else 1.0)
    of_slices = apply_temperature(outputs.logits, temperature)
    novelty = compute_mean_novelty(run, by_member)

    called = int(probabilities[0].argmax())
    weight = of_slices[:, called] if attention is None else attention
    top = np.argsort(-weight, kind='stable')[:NUM_TOP]
    summary = {
        **describe_scan(run, prepared),
        'verdict': 'uncertain',
        'class': CLASSES[called],
        'probabilities': dict(zip(CLASSES, probabilities[0].tolist(), strict=True)),
        **_describe_rules(stored, probabilities),
        'members': _describe_members(votes, stored),
        'vote': rule and {'rule': rule, 'is_chosen_on_validation': stored is not None},
        'evidence': {
            'of': 'the logits of each slice'
            if attention is None
            else f'the logits of the scan{" by the sequence model alone" if outlined else ""}',
            'bias': np.asarray(bias).tolist(),
        },
        'rests_on': sorted((used[top] + 1).tolist()),
        'slices_called': dict(zip(CLASSES, np.bincount(of_slices.argmax(1), minlength=3).tolist(), strict=True)),
        'novelty': None
        if novelty is None
        else {'median': float(np.median(novelty)), 'share_unusual': float((novelty > 1).mean())},
        'slices': [
            {
                'number': int(place) + 1,
                'depth_mm': None if volume.depths_mm is None else float(volume.depths_mm[place]),
                'box': [int(side) for side in boxes[place]],
                'probabilities': of_slices[i].tolist(),
                'attention': None if attention is None else float(attention[i]),
                'evidence': shares[i].tolist(),
                'novelty': None if novelty is None else float(novelty[i]),
            }
            for i, place in enumerate(used.tolist())
        ],
    }
    summary |= joined
    summary['home'] = describe_home(compute_home_distances(run, by_member), is_far=is_unusual(summary))
    summary['windows'] = (
        None if prepared.views is None else _look_through_windows(run, prepared, stacked, summary, outlined)
    )
    summary['verdict'] = _find_verdict(summary)
    explained = Explanations(softmax(outputs.logits), outputs.attention, outputs.evidence)
    return Prediction(
        summary,
        used,
        boxes,
        prepared.images,
        of_slices,
        attention,
        evidence=shares,
        explained=explained,
        combination=run.slice_model.combination,
        novelty=novelty,
        outlined=outlined,
    )


def _take(by_member: tuple[SliceOutputs, ...], chosen: slice | np.ndarray) -> tuple[SliceOutputs, ...]:
    return jax.tree.map(lambda x: x[chosen], by_member)


def vote(run: Run, by_member: tuple[SliceOutputs, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the logits [K] of a scan by a slice run, and those by each of its members alone."""
    stored = run.rules.get('scans')
    rule, temperature = stored['rule'] if stored else FALLBACK_RULE, run.classifier_temperature
    return compute_vote_logits(average_outputs(run, by_member).logits, temperature, rule), [
        compute_vote_logits(of_member.logits / member.temperature, temperature, rule)
        for member, of_member in zip(run.members, by_member, strict=True)
    ]


def _compute_sick(run: Run, features: np.ndarray) -> np.ndarray:
    """Returns the probability of sick, [1], by the lesions."""
    return compute_sick(run.sick_rule, features[np.newaxis])


def _join(sick: np.ndarray, logits_K: np.ndarray) -> np.ndarray:
    return join_logits(sick, logits_K[np.newaxis])[0]


def _look_through_windows(
    run: Run,
    prepared: PreparedScan,
    stacked: tuple[SliceOutputs, ...],
    summary: dict[str, Any],
    outlined: Outlined | None,
) -> dict[str, Any]:
    """Returns `compare_windows` of a scan; `stacked` are the outputs for `stack_images`."""
    views, number = prepared.views, len(prepared.views.positions)
    starts = [len(prepared.images) + number * i for i in range(len(views.windows_hu))]
    of_windows = [_take(stacked, views.positions), *(_take(stacked, slice(i, i + number)) for i in starts)]
    logits = [
        classify_sequence(run, by_member)[0] if run.is_scan_run else vote(run, by_member)[0] for by_member in of_windows
    ]
    if outlined:
        features = [
            outlined.features,
            *(compute_view_features(run.lesions, prepared, whole) for whole in views.whole),
        ]
        logits = [_join(_compute_sick(run, f), x) for f, x in zip(features, logits, strict=True)]
    stored = run.rules if run.is_scan_run else run.rules.get('scans')
    probabilities = apply_temperature(np.stack(logits), stored['temperature'] if stored else 1.0)
    windows = (WINDOW_HU, *views.windows_hu)
    return compare_windows(windows, probabilities, CLASSES.index(summary['class']), number)


def sum_evidence(run: Run, outputs: SliceOutputs) -> tuple[np.ndarray, np.ndarray]:
    """Returns the evidence of each slice in its own logits, summed over its pixels [N, K], and the bias [K].

    With 'concat' their sum is the logit. With 'average' both are means over the modules. Of an ensemble they are means
    over the members, each divided by its temperature.
    """
    sums = sum(of_module.sum((1, 2)) for of_module in outputs.evidence)
    is_one = run.slice_model.combination == 'concat'
    names = ('classifier',) if is_one else ('classifier1', 'classifier2')
    biases = [
        sum(member.slice_variables['params'][name]['bias'] for name in names) / len(names) / member.temperature
        for member in run.members
    ]
    return sums / len(names), np.mean(biases, axis=0)


def classify_sequence(
    run: Run, by_member: tuple[SliceOutputs, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Returns logits [K], attention [T], evidence [T, K] and bias [K], means over members, and the logits of each."""
    model = HEADS[run.config.model.head](run.config.model.hidden, len(CLASSES))
    temperatures = [np.float32(member.temperature) for member in run.members]
    heads = [
        apply_sequence(model, member.sequence, of_member.embedding)
        for member, of_member in zip(run.members, by_member, strict=True)
    ]
    biases = [member.sequence['classifier']['bias'] for member in run.members]
    votes, shares, biases = (
        [value / t for value, t in zip(values, temperatures, strict=True)]
        for values in ([head.logits for head in heads], [head.evidence for head in heads], biases)
    )
    attention = np.mean([head.attention for head in heads], axis=0)
    return np.mean(votes, axis=0), attention, np.mean(shares, axis=0), np.mean(biases, axis=0), votes


@functools.partial(jax.jit, static_argnums=0)
def _apply_sequence(
    model: SequenceClassifier | GatedClassifier, params: dict[str, Any], embeddings_1xTxE: jax.Array, lengths: jax.Array
) -> HeadOutputs:
    return model.apply({'params': params}, embeddings_1xTxE, lengths)


def apply_sequence(
    model: SequenceClassifier | GatedClassifier, params: dict[str, Any], embeddings_TxE: np.ndarray
) -> HeadOutputs:
    """Returns logits [K], attention [T] and evidence [T, K] of the sequence model, given the extractor's embeddings."""
    count = len(embeddings_TxE)
    padded = np.zeros((1, sequences.pad_length(count), embeddings_TxE.shape[1]), np.float32)
    padded[0, :count] = embeddings_TxE
    outputs = jax.device_get(_apply_sequence(model, params, padded, np.array([count], np.int32)))
    return HeadOutputs(outputs.logits[0], outputs.attention[0, :count], outputs.evidence[0, :count])


def _describe_rules(rules: dict[str, Any] | None, probabilities_1xK: np.ndarray) -> dict[str, Any]:
    """Returns what the rules of scans say: the conformal set and the answers at the thresholds, None without rules."""
    if rules is None:
        return {'conformal': None, 'screening': None}
    conformal, answers = rules['conformal'], {}
    held = predict_sets(probabilities_1xK, [conformal['thresholds'][name] for name in CLASSES])[0]
    for target in TARGETS:
        threshold = rules['thresholds'][target]['threshold']
        score = float(compute_target_scores(probabilities_1xK, CLASSES, target)[0])
        answers[target] = {
            'score': score,
            'threshold': threshold,
            'is_finding': None if threshold is None else score >= threshold,
        }
    return {
        'conformal': {
            'coverage': conformal['coverage'],
            'notes': conformal['notes'],
            'set': [name for name, is_held in zip(CLASSES, held, strict=True) if is_held],
        },
        'screening': answers,
    }


def _describe_members(votes: Sequence[np.ndarray], rules: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns what the members of an ensemble say of the scan, given their logits [K]; None for a single model."""
    if len(votes) == 1:
        return None
    probabilities_MxK = apply_temperature(np.stack(votes), rules['temperature'] if rules else 1.0)
    disagreement = float(compute_disagreement(probabilities_MxK[:, np.newaxis])[0])
    limit = rules['disagreement']['limit'] if rules else None
    return {
        'probabilities': probabilities_MxK.tolist(),
        'disagreement': disagreement,
        'limit': limit,
        'is_beyond': limit is not None and disagreement > limit,
    }


def _find_verdict(summary: dict[str, Any]) -> str:
    """Returns the class that is called, or 'uncertain'.

    It is uncertain if another class can't be ruled out, the scan is unusual, the members of the ensemble disagree, or
    another grey window changes the call.
    """
    conformal = summary['conformal']
    is_open = conformal is not None and conformal['set'] != [summary['class']]
    is_doubtful = is_open or is_unusual(summary) or do_members_disagree(summary) or do_windows_disagree(summary)
    return 'uncertain' if is_doubtful else summary['class']


def format_verdict(summary: dict[str, Any]) -> str:
    """Returns e.g. 'covid19 (normal 0.010, pneumonia 0.090, covid19 0.900; 90% set: covid19)'."""
    shown = [', '.join(f'{name} {p:.3f}' for name, p in summary['probabilities'].items())]
    conformal = summary['conformal']
    if conformal is None:
        shown.append('not calibrated for scans, no conformal set')
    else:
        shown.append(f'{conformal["coverage"]:.0%} set: {" or ".join(conformal["set"]) or "none of the classes"}')
    if summary['members'] is not None:
        apart = (
            'members disagree'
            if do_members_disagree(summary)
            else f'{len(summary["members"]["probabilities"])} members'
        )
        shown.append(f'{apart}, {summary["members"]["disagreement"]:.3f}')
    if summary['windows'] is not None:
        windows = summary['windows']
        agree = 'the window changes the call' if windows['is_changed'] else f'{len(windows["by_window"])} windows agree'
        shown.append(f'{agree}, spread {windows["largest_spread"]:.3f}')
    if is_unusual(summary):
        shown.append('unlike the training data')
    if summary['home'] is not None:
        shown.append(summary['home']['text'])
    return f'{summary["verdict"]} ({"; ".join(shown)})'


def format_line(summary: dict[str, Any], folder: Path) -> str:
    """Returns what is printed of an input."""
    seconds, lesions = summary['seconds'], summary.get('lesions')
    stages = ', '.join(f'{stage} {s:.1f}' for stage, s in seconds.items())
    marks = [', FORCED'] * bool(summary['forced']) + [' [model trained on phantoms]'] * bool(summary['notice'])
    marks += [f' [{warning}]' for warning in summary['warnings']]
    parts = [f'{format_verdict(summary)}{"".join(marks)}'] if 'verdict' in summary else []
    if lesions is not None:
        described = describe_burden(lesions)
        parts.append(f'{described[0].lower()}{described[1:]}{"" if parts else "".join(marks)}')
    if 'rests_on' in summary:
        rests = ', '.join(map(str, summary['rests_on']))
        parts.append(f'rests on slices {rests} of {summary["input"]["num_slices"]}')
    if summary['left_out']:
        parts.append(f'left out: {format_counts(summary["left_out"])}')
    parts += [f'{sum(seconds.values()):.1f} s ({stages})', str(folder / 'prediction.html')]
    return f'{summary["input"]["name"]}: {"; ".join(parts)}'
