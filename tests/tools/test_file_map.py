"""docs/file-map.md: complete, up to date, every file once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tool_scripts import TOOLS, tool

ROOT = TOOLS.parent
file_map = tool("file_map.py")


def entries(page: str) -> list[str]:
    """Every file that has a line, alone or with others, by its name in its folder's section or by a path anywhere."""
    found, folder = [], ""
    for line in page.splitlines():
        folder = line.removeprefix("## ") if line.startswith("## ") else folder
        for name in re.findall(r"`([^`]+)`", line.partition(": ")[0]) if line.startswith("- ") else ():
            path = next((p for p in (folder + name, name, f"tealightning/{name}") if (ROOT / p).is_file()), name)
            found.append(path)
    return found


def test_file_map_has_every_file_exactly_once():
    patterns = ("tealightning/**/*.py", "tools/**/*.py", "configs/**/*.yaml")
    files = [file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern)]
    named = entries(file_map.PAGE.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(str(file) for file in files if file.name != "__init__.py")


def test_a_file_that_stands_several_times_is_seen_in_every_form():
    page = (
        "## tealightning/cli/\n\n- `resume.py`: Its line.\n- `resume.py`: Again.\n\n"
        "## tealightning/data/\n\n- `cli/resume.py`, `module.py`: Together, see `x.py`.\n"
    )
    assert entries(page).count("tealightning/cli/resume.py") == 3
    assert entries(page).count("tealightning/data/module.py") == 1
    assert len(entries(page)) == 4


def test_file_map_is_what_the_command_writes():
    command = [sys.executable, str(TOOLS / "file_map.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"""One line."""\n', "One line."),
        ('"""One line.\n\nMore.\n"""\n', "One line."),
        ('"""A sentence that goes on\nin the next line."""\n', None),
        ("x = 1\n", None),
    ],
)
def test_first_line_is_one_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: str | None):
    monkeypatch.setattr(file_map, "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(text, encoding="utf-8")
    if line is not None:
        assert file_map.first_line(file) == line
    else:
        with pytest.raises(ValueError, match=r"module\.py must start with a docstring .* of one line"):
            file_map.first_line(file)


def test_check_names_the_command_for_a_page_that_is_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "tealightning" / "added.py"
    for folder in file_map.FOLDERS:
        (tmp_path / folder).mkdir()
    module.write_text('"""Something new."""\n', encoding="utf-8")
    monkeypatch.setattr(file_map, "ROOT", tmp_path)
    monkeypatch.setattr(file_map, "PAGE", tmp_path / "file-map.md")
    monkeypatch.setattr(sys, "argv", ["file_map.py"])
    file_map.main()
    assert "- `added.py`: Something new." in file_map.PAGE.read_text()
    module.write_text('"""Something else."""\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["file_map.py", "--check"])
    with pytest.raises(SystemExit, match=r"file-map.md is out of date: run `python tools/file_map.py`"):
        file_map.main()
