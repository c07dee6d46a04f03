"""Run `python -m tealightning`."""

from tealightning.cli import main

if __name__ == "__main__":
    main()
