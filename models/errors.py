"""Errors that a user can fix. Programs report them in one line; any other exception is a bug."""


class InputError(ValueError):
    """An argument, a config value, an environment or a file that cannot be used; the message says what to do."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that does not exist."""
