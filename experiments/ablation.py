r"""Trains every kind of attention with the same budget and seeds; compares accuracy, AUC and localisation.

  python -m experiments.ablation --config=configs/att2.py --output=runs/ablation                 on phantoms
  python -m experiments.ablation --config=configs/att2.py:/data/covidx-ct --output=runs/ablation-ct       on CT
  python -m experiments.ablation --config=configs/att2.py --output=/tmp/ablation --seeds=0 \
      --compatibilities=additive,uniform --combinations=concat \
      --config.train.num_epochs=1 --config.train.steps_per_epoch=5                               a trial

Set config fields as for main.py; they apply to all runs. Each run has its own workdir,
<output>/<compatibility>-<combination>/seed<seed>. Repeat the command to resume; with more seeds or variants it trains
only the missing runs. The comparison is written to <output>/ablation.md and ablation.json. Localisation is scored on
test slices that have a mask in the folder lesion_masks of the raw directory, as phantoms do.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from covidjax.cli import create_parser, refuse_arguments, set_up_log
from covidjax.errors import UserError
from covidjax.experiment import ablation
from covidjax.models.att2 import COMBINATIONS
from covidjax.models.attention import COMPATIBILITIES

_CONFIG = config_flags.DEFINE_config_file(
    'config',
    None,
    'configs/att2.py, optionally followed by a colon and the raw COVIDx-CT directory; default: phantoms.',
)
_OUTPUT = flags.DEFINE_string('output', 'runs/ablation', 'Folder for all runs and the comparison.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds for initial weights, data order and augmentation.')
_COMPATIBILITIES = flags.DEFINE_list('compatibilities', list(COMPATIBILITIES), 'Compatibility functions to train.')
_COMBINATIONS = flags.DEFINE_list('combinations', list(COMBINATIONS), 'Combinations of the attention modules to train.')


def main(argv: list[str]) -> None:
    """Checks the flags, runs the comparison and prints it."""
    refuse_arguments(argv)
    set_up_log()
    config = _CONFIG.value
    if config is None:
        raise UserError('--config is required: --config=configs/att2.py (python -m experiments.ablation --help)')
    if 'extractor' in config:
        raise UserError(f'--config must be that of a slice experiment, att2.py or lite.py, got {config.name!r}')
    for flag, known in ((_COMPATIBILITIES, COMPATIBILITIES), (_COMBINATIONS, COMBINATIONS)):
        unknown = set(flag.value) - set(known)
        if unknown or not flag.value:
            raise UserError(f'--{flag.name} must be chosen from {",".join(known)}, got {",".join(flag.value)!r}')
    if not _SEEDS.value or not all(seed.isdigit() for seed in _SEEDS.value):
        raise UserError(f'--seeds must be non-negative integers separated by commas, got {",".join(_SEEDS.value)!r}')
    output = Path(_OUTPUT.value)
    comparison = ablation.compare(
        config, [int(seed) for seed in _SEEDS.value], _COMPATIBILITIES.value, _COMBINATIONS.value, output
    )
    print(ablation.format_report(comparison))
    print(f'{output / "ablation.md"}, {output / "ablation.json"}')


def run_main(argv: list[str]) -> None:
    """Runs main; a user error prints one line on stderr and exits with status 1."""
    try:
        main(argv)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted: repeat the command to resume')


if __name__ == '__main__':
    app.run(run_main, flags_parser=create_parser(flags.FLAGS))
