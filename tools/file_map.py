"""Write docs/file-map.md, one line per module, from the first lines of the modules' docstrings.

    python tools/file_map.py           # write the page
    python tools/file_map.py --check   # exit status 1 if it is not up to date

A configuration is described by its first comment line.
"""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "file-map.md"
FOLDERS = ("tealightning", "configs", "tools")
HEAD = """\
# File map

Every module, configuration and tool, with the first line of its docstring or comment.
[Architecture](architecture.md) says how the parts fit together. Written by `python tools/file_map.py`.
"""


def first_line(file: Path) -> str:
    """First line of a module's docstring, or of the comment on top of a YAML file.

    Raises:
        ValueError: if there is none, or the sentence goes on in the next line.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        line, following = text.splitlines()[0].removeprefix("#").strip(), ""
    else:
        line, _, following = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    if not line or following.partition("\n")[0].strip():
        raise ValueError(f"{file.relative_to(ROOT)} must start with a docstring (YAML: a comment) of one line.")
    return line


def files_of(folder: Path) -> list[Path]:
    """Modules and configurations directly in `folder`, the package's own docstring left out."""
    files = [file for file in folder.iterdir() if file.suffix in (".py", ".yaml")]
    return sorted(file for file in files if file.name != "__init__.py")


def page() -> str:
    """The whole page: a section per folder, its files in a list."""
    folders = [ROOT / name for name in FOLDERS]
    folders += [folder for top in folders for folder in top.rglob("*") if folder.is_dir()]
    parts = [HEAD]
    for folder in sorted(folders):
        if files := files_of(folder):
            about = folder / "__init__.py"
            parts.append(f"## {folder.relative_to(ROOT)}/\n")
            parts += [f"{first_line(about)}\n"] if about.exists() else []
            parts.append("".join(f"- `{file.name}`: {first_line(file)}\n" for file in files))
    return "\n".join(parts)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date: run `python tools/file_map.py`.")


if __name__ == "__main__":
    main()
