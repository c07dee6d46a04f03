"""Errors that the user can mend: the command line prints their message alone, without a traceback."""


class UserError(ValueError):
    """A setting, a file or a command that cannot be used; the message names it and says what would be right.

    Every other exception is a defect, of this package or of a user's own code, and keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class MissingPackageError(UserError, ImportError):
    """An optional package that a setting needs; the message says how to install it."""
