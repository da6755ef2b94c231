"""The base of every error that a user has to fix."""


class UserError(ValueError):
    """Something that the user has to fix: a config, a file, a directory or a request.

    Its message says what is wrong, what was found, what is wanted and what to do. A job shows it
    without a traceback and exits with status 2. Subclasses exist only where code handles them
    differently.
    """
