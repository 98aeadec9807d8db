"""What commands with a config share: their log, and a user's mistake as one line on stderr and exit status 1."""

import logging
import sys
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from covidjax.errors import UserError


def set_up_log() -> None:
    """Shows the project's messages, and of the libraries' only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    logging.getLogger('covidjax').setLevel(logging.INFO)


def create_parser(config: flags.FlagHolder) -> Callable[[list[str]], list[str]]:
    """Returns a parser of flags for `app.run`: one that is misspelt, config fields included, ends the process."""

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            if config.value is not None:
                config.value.name  # noqa: B018, a file that could not be loaded raises only now
            return rest
        except Exception as error:  # Config overrides raise many kinds; all come from the command line.
            sys.exit(f'error: {_describe(error)} (--help tells more)')

    return parse_flags


def _describe(error: Exception) -> str:
    """Returns what an error of parsing says, on one line; ml_collections wraps a KeyError for an absent field."""
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    if isinstance(cause, KeyError):
        return f'the config has no field {" ".join(str(cause.args[0]).split())}'
    return ' '.join(str(error).split())


def refuse_arguments(argv: list[str]) -> None:
    """Checks that nothing but flags was given.

    Raises:
      UserError: something was.
    """
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: every option is written --name=value')
