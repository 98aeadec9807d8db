"""checklist.html: the items of two reporting guidelines, with what a run knows about each.

TRIPOD+AI is Collins et al. 2024, doi:10.1136/bmj-2023-078378. CLAIM 2024 is Tejani et al., doi:10.1148/ryai.240300.
The items are in our own short words: read the guidelines for the full ones.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covidjax.report.page import Table, format_cell, write_page
from covidjax.report.sections import Section

AUTHORS = 'for the authors'


class Run(NamedTuple):
    """What answers are drawn from.

    Attributes:
      results: results.json.
      config: flat config of the run.
      external: results.json of every test on other data.
    """

    results: dict[str, Any]
    config: Mapping[str, Any]
    external: Sequence[dict[str, Any]]

    @property
    def is_phantom(self) -> bool:
        """Whether the run used generated phantoms."""
        return bool(self.results['notice'])


def _score(value: float | None, interval: Sequence[float] | None) -> str:
    return f'{format_cell(value)} ({format_cell(interval)})' if interval else format_cell(value)


def _name_model(run: Run) -> str:
    return f'{run.results["model"]}: deep learning, classifies chest CT as {", ".join(run.results["classes"])}.'


def _name_data(run: Run) -> str:
    if run.is_phantom:
        return f'Generated phantoms (seed {run.config["data.phantom_seed"]}): synthetic, no patients.'
    dataset = run.results['dataset']
    where = f'{run.results["data"]}, lists and images with the fingerprint {dataset["fingerprint"]}'
    return f'{where}. Hospitals, dates and how patients were chosen: {AUTHORS}.'


def _count_data(run: Run) -> str:
    dataset = run.results['dataset']
    shown = '; '.join(
        f'{split} ' + ', '.join(f'{count:,} {name}' for name, count in counts.items())
        for split, counts in dataset['slices'].items()
    )
    tested = f'{run.results["num_examples"]:,} {_get_unit(run)} of {run.results["num_patients"]:,} patients'
    return (
        f'Slices by list and class: {shown}. Tested: {tested}. Unreadable images left out: {dataset["num_dropped"]:,}.'
    )


def _get_unit(run: Run) -> str:
    return 'scans' if 'scans' in run.results else 'slices'


def _describe_preparation(run: Run) -> str:
    size, region = run.config['data.image_size'], run.config['data.region']
    return (
        f'preprocessing.json states it in full: window, region ({region}), crop, {size} x {size} pixels, scaling, '
        'order of classes.'
    )


def _describe_missing(run: Run) -> str:
    dropped = run.results['dataset']['num_dropped']
    return f'Images that are missing or unreadable are not replaced; {dropped:,} were left out.'


def _describe_partitions(run: Run) -> str:
    return (
        'Three lists, given beforehand: training fits the weights; validation stops training and chooses temperature, '
        f'thresholds and conformal sets; test only measures. How patients were assigned to the lists: {AUTHORS}.'
    )


def _describe_level(run: Run) -> str:
    return 'Lists are by patient. The audit (covidjax audit) checks that no patient, scan or picture is in two.'


def _describe_model(run: Run) -> str:
    fields = ', '.join(f'{name} {value}' for name, value in run.config.items() if 'model.' in name)
    return (
        f'{run.results["model"]}; {fields}. The weights are in checkpoints/; covidjax export writes them as one file.'
    )


def _describe_software(run: Run) -> str:
    environment = run.results['environment']
    return ', '.join(f'{name} {value}' for name, value in environment.items() if isinstance(value, str)) + '.'


def _describe_start(run: Run) -> str:
    return f'Pretrained weights: {run.results["training"]["pretrained"]}; seed {run.config["seed"]}.'


def _describe_folds(run: Run) -> str | None:
    number = run.results['training'].get('num_folds')
    return number and f'{number} models, one per fold by patient; their logits are averaged. Section "Ensemble".'


def _describe_training(run: Run) -> str:
    names = ('batch_size', 'learning_rate', 'schedule', 'weight_decay', 'num_epochs', 'patience', 'augment')
    shown = ', '.join(f'{name} {run.config[f"train.{name}"]}' for name in names if f'train.{name}' in run.config)
    steps = run.results['training'].get('num_steps')
    return f'{shown}{f"; {steps:,} steps" if steps else ""}. config.json has every setting.'


def _describe_selection(run: Run) -> str:
    training = run.results['training']
    if 'best_epoch' not in training:
        return 'Of every fold the epoch of the lowest loss on its validation patients; all folds are used.'
    return f'Epoch {training["best_epoch"]} of {training["num_epochs"]}, the lowest loss on validation.'


def _describe_weights(run: Run) -> str:
    return 'The loss weighs a class by the smallest class over its own size, so that all classes count the same.'


def _describe_output(run: Run) -> str:
    points = run.results['screening']['operating_points']
    shown = ', '.join(f'{target} {format_cell(point["threshold"])}' for target, point in points.items())
    return f'Probabilities of the classes. Thresholds chosen on validation: {shown}.'


def _list_measures(run: Run) -> str:
    return (
        'Accuracy; precision, recall, F1, specificity and NPV by class; ROC and precision-recall; calibration; '
        'decision curves; conformal coverage; three trivial baselines. report.html explains them.'
    )


def _describe_uncertainty(run: Run) -> str:
    intervals = run.results['intervals']
    return f'{intervals["level"]:.0%} intervals: {intervals["method"]}.'


def _report_scores(run: Run) -> str:
    results, intervals = run.results, run.results['intervals']
    accuracy = _score(results['accuracy'], intervals['accuracy'])
    auc = _score(results['curves']['macro_auc'], results['curves']['macro_auc_interval'])
    beside = ', '.join(f'{name} {m["accuracy"]:.3f}' for name, m in results['baselines'].items())
    return f'Accuracy {accuracy}, mean area under ROC {auc}; accuracy of the baselines: {beside}.'


def _report_diagnosis(run: Run) -> str | None:
    parts = []
    for target, point in run.results['screening']['operating_points'].items():
        if point['threshold'] is not None:
            parts.append(
                f'{target}: sensitivity {_score(point["sensitivity"], point["sensitivity_interval"])}, specificity '
                f'{_score(point["specificity"], point["specificity_interval"])}'
            )
    return f'At the thresholds of validation: {"; ".join(parts)}.' if parts else None


def _report_subgroups(run: Run) -> str | None:
    columns = run.results.get('subgroups', {}).get('columns', {})
    scored = [name for name, column in columns.items() if any(group['scores'] for group in column['groups'])]
    return f'Scored by {", ".join(scored)}: section "Subgroups" of report.html.' if scored else None


def _report_characteristics(run: Run) -> str | None:
    columns = run.results.get('subgroups', {}).get('columns', {})
    parts = [
        f'{name}: ' + ', '.join(f'{group["group"]} {group["num_patients"]:,}' for group in column['groups'][:8])
        for name, column in columns.items()
    ]
    return f'Patients of the test list by {"; ".join(parts)}. Anything else: {AUTHORS}.' if parts else None


def _list_external(run: Run) -> str | None:
    parts = [
        f'{test["name"]}: accuracy {_score(test["accuracy"], test["intervals"]["accuracy"])} on '
        f'{test["num_examples"]:,} {test["unit"]} of {test["num_patients"]:,} patients'
        for test in run.external
    ]
    return f'{"; ".join(parts)}.' if parts else None


def _compare_external(run: Run) -> str | None:
    parts = [
        f'{test["name"]}: {test["comparison"]["scores"]["unusual"]["outside"]["value"]:.1%} of the slices are unlike '
        'the training data'
        for test in run.external
        if test['comparison']['scores']['unusual']['outside']['value'] is not None
    ]
    return f'{"; ".join(parts)}; class counts: external/<name>/results.json.' if parts else None


def _report_refit(run: Run) -> str | None:
    parts = [
        f'{test["name"]}: temperature {test["refit"]["temperature"]:.3f}, fitted to these data '
        f'{test["refit"]["fitted_temperature"]:.3f}'
        for test in run.external
    ]
    return f'{"; ".join(parts)}.' if parts else None


def _report_calibration(run: Run) -> str:
    calibration = run.results['screening']['calibration']
    return f'Temperature scaling with {calibration["temperature"]:.3f}, fitted on validation; no other updating.'


def _describe_explanations(run: Run) -> str:
    return 'Attention and evidence maps, scored in report.html against lesions where there are masks, and by erasure.'


def _describe_failures(run: Run) -> str:
    return 'Section "Most confident mistakes" of report.html; every prediction is in predictions.csv.'


def _describe_limits(run: Run) -> str:
    return f'Section "Limits of use and model card" of report.html. Those of the study: {AUTHORS}.'


def _describe_use(run: Run) -> str:
    return 'Research only; not a medical device; not for the care of patients.'


def _describe_code(run: Run) -> str:
    return f'covidjax {run.results["environment"]["covidjax"]}, Apache License 2.0. Where the run is kept: {AUTHORS}.'


def _describe_calculation(run: Run) -> str:
    return 'covidjax predict and covidjax export apply the model; preprocessing.json states how inputs are prepared.'


def _describe_quality(run: Run) -> str:
    return (
        'covidjax predict refuses what is no chest CT, counts what it leaves out, and marks scans that are unlike the '
        'training data.'
    )


def _describe_robustness(run: Run) -> str | None:
    return _list_external(run)


Answer = Callable[[Run], str | None] | None

TRIPOD: tuple[tuple[str, str, Answer], ...] = (
    ('1', 'Title: a prediction model is developed or evaluated, for whom and what', _name_model),
    ('2', 'Abstract by its own checklist', None),
    ('3a', 'Medical context and reason for the model', None),
    ('3b', 'Intended patients, purpose and users', _describe_use),
    ('3c', 'Known inequalities between groups of people', None),
    ('4', 'Objectives: development, evaluation or both', None),
    ('5a', 'Sources of the data, and whom they represent', _name_data),
    ('5b', 'Dates of the data', None),
    ('6a', 'Setting, number and place of the centres', None),
    ('6b', 'Eligibility of patients', None),
    ('6c', 'Treatments', None),
    ('7', 'Preparation and quality checks of the data', _describe_preparation),
    ('8a', 'Outcome and how it was assessed', None),
    ('8b', 'Who assessed the outcome, if that takes judgement', None),
    ('8c', 'Blinding of that assessment', None),
    ('9a', 'How predictors were chosen', _describe_preparation),
    ('9b', 'Predictors and how they were measured', _describe_preparation),
    ('9c', 'Who assessed the predictors, if that takes judgement', None),
    ('10', 'Reason for the sample size', None),
    ('11', 'Missing data', _describe_missing),
    ('12a', 'Which data served for what, and how they were divided', _describe_partitions),
    ('12b', 'How predictors enter the model', _describe_preparation),
    ('12c', 'Type of model, training, tuning, internal validation', _describe_training),
    ('12d', 'Differences between hospitals or groups in the estimates', None),
    ('12e', 'Measures and plots of performance', _list_measures),
    ('12f', 'Updating of the model, such as recalibration', _report_calibration),
    ('12g', 'How predictions were computed in the evaluation', _describe_calculation),
    ('13', 'Class imbalance', _describe_weights),
    ('14', 'Fairness: approach and reason', None),
    ('15', 'Output of the model, thresholds', _describe_output),
    ('16', 'Differences between development and evaluation data', _compare_external),
    ('17', 'Ethics approval and consent', None),
    ('18a', 'Funding', None),
    ('18b', 'Conflicts of interest', None),
    ('18c', 'Protocol', None),
    ('18d', 'Registration', None),
    ('18e', 'Availability of the data', None),
    ('18f', 'Availability of the code', _describe_code),
    ('19', 'Involvement of patients and the public', None),
    ('20a', 'Flow of patients, with and without the outcome', _count_data),
    ('20b', 'Characteristics of the patients', _report_characteristics),
    ('20c', 'Development against evaluation data by predictors and outcome', _compare_external),
    ('21', 'Patients and outcomes in each analysis', _count_data),
    ('22', 'The full model, for predictions on new patients', _describe_model),
    ('23a', 'Performance with intervals, for key subgroups too', _report_scores),
    ('23b', 'Performance between hospitals or groups', _report_subgroups),
    ('24', 'Results of updating', _report_refit),
    ('25', 'Interpretation, fairness included', None),
    ('26', 'Limitations', _describe_limits),
    ('27a', 'Input that is poor or missing in use', _describe_quality),
    ('27b', 'What users must do and know', None),
    ('27c', 'Next steps, use elsewhere', None),
)

CLAIM: tuple[tuple[str, str, Answer], ...] = (
    ('1', 'Title or abstract names AI and its kind', _name_model),
    ('2', 'Structured summary', None),
    ('3', 'Background and clinical role', None),
    ('4', 'Aims and hypotheses', None),
    ('5', 'Prospective or retrospective', None),
    ('6', 'Goal of the study', None),
    ('7', 'Sources of the data', _name_data),
    ('8', 'Inclusion and exclusion', None),
    ('9', 'Preprocessing', _describe_preparation),
    ('10', 'Selection of parts of the data', _describe_missing),
    ('11', 'De-identification', None),
    ('12', 'Missing data', _describe_missing),
    ('13', 'Acquisition of the images', None),
    ('14', 'How the reference standard was obtained', None),
    ('15', 'Why this reference standard', None),
    ('16', 'Who annotated', None),
    ('17', 'Annotation of the test set', None),
    ('18', 'Agreement between and within annotators', None),
    ('19', 'How data were assigned to partitions', _describe_partitions),
    ('20', 'Level at which partitions are disjoint', _describe_level),
    ('21', 'Intended sample size of the test', None),
    ('22', 'Description of the model', _describe_model),
    ('23', 'Software', _describe_software),
    ('24', 'Initial parameters', _describe_start),
    ('25', 'Training', _describe_training),
    ('26', 'Selection of the final model', _describe_selection),
    ('27', 'Ensembling', _describe_folds),
    ('28', 'Measures of performance', _list_measures),
    ('29', 'Significance and uncertainty', _describe_uncertainty),
    ('30', 'Robustness or sensitivity', _describe_robustness),
    ('31', 'Explanations', _describe_explanations),
    ('32', 'Evaluation on internal data', _report_scores),
    ('33', 'Test on external data', _list_external),
    ('34', 'Trial registration', None),
    ('35', 'Patients or examinations included and excluded', _count_data),
    ('36', 'Characteristics of the cases in each partition', _report_characteristics),
    ('37', 'Performance with its uncertainty', _report_scores),
    ('38', 'Diagnostic performance and its precision', _report_diagnosis),
    ('39', 'Analysis of failures', _describe_failures),
    ('40', 'Limitations', _describe_limits),
    ('41', 'Implications, intended use', _describe_use),
    ('42', 'Protocol or further technical details', None),
    ('43', 'Availability of software, model and data', _describe_code),
    ('44', 'Funding', None),
)
GUIDELINES = {'tripod': ('TRIPOD+AI', TRIPOD), 'claim': ('CLAIM 2024', CLAIM)}


def fill_items(items: Sequence[tuple[str, str, Answer]], run: Run) -> list[tuple[str, str, str]]:
    """Returns (number, item, answer); the answer is `AUTHORS` where the run knows none."""
    return [(number, text, (answer and answer(run)) or AUTHORS) for number, text, answer in items]


def write_checklist(
    path: Path, results: dict[str, Any], config: Mapping[str, Any], external: Sequence[dict[str, Any]]
) -> None:
    """Writes checklist.html.

    Args:
      path: of the page.
      results: results.json of the run.
      config: flat config of the run.
      external: results.json of its tests on other data.
    """
    run, sections, total, open_ = Run(results, config, external), [], 0, 0
    for name, (title, items) in GUIDELINES.items():
        rows = fill_items(items, run)
        total += len(rows)
        open_ += sum(answer == AUTHORS for _, _, answer in rows)
        sections.append(Section(name, title, [Table(f'Items of {title}', ('item', 'what to report', 'answer'), rows)]))
    headline = (
        f'{total - open_} of {total} items of TRIPOD+AI and CLAIM 2024 have an answer from results.json; {open_} are '
        f'{AUTHORS}. The items are in short: the guidelines themselves say what each asks for.'
    )
    write_page(
        path,
        'run.html',
        title=f'Reporting checklist: {results["model"]} on {results["data"]}',
        notice=results['notice'],
        warnings=[],
        headline=headline,
        sections=sections,
    )
