"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in the input, the flags or the files that the user can mend.

    The message is one line: what was wrong, the offending value, and the way out. `main.py` prints it on stderr and
    exits with status 1; every other exception is a defect of this project and keeps its traceback.
    """
