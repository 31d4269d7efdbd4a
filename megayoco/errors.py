"""The one exception for what a user did wrong."""


class UserError(Exception):
    """A mistake in input: one message that names the place (file, line, key or flag) and the remedy.

    Command-line entry points catch it once, print `error: MESSAGE` and exit with code 2. Any other exception is a bug
    and keeps its traceback.
    """
