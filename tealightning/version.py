"""The version, in a file that imports nothing so that the build can read it without PyTorch."""

__version__ = "0.1.0"
