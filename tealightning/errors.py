"""Errors that the user can mend: the command line prints their message alone, without a traceback."""


class UserError(ValueError):
    """A setting, a file or a command that cannot be used; the message names it and says what would be right.

    Every other exception is a defect, of this package or of a user's own code, and keeps its traceback.

    Args:
        message: What is wrong, and what to do.
        key: The whole dotted key of the setting, where it is known.
        file: The config that sets it, where it is known; the message then begins with it.
    """

    def __init__(self, message: str, *, key: str = "", file: str = "") -> None:
        text = f"{file}: {message}" if file else message
        super().__init__(text.encode(errors="backslashreplace").decode())  # what a name or value holds can be printed
        self.key = key
        self.file = file


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class MissingPackageError(UserError, ImportError):
    """An optional package that a setting needs; the message says how to install it."""


class WrongClassError(UserError, TypeError):
    """A class that derives from another base class than is needed."""
