"""Every command line in the documentation is accepted."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import QUICKSTART, resolved, run

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "docs" / "cli.md",
    ROOT / "docs" / "quickstart.md",
    *(ROOT / "docs" / "how-to" / name for name in ("lora.md", "resume.md", "deadlines.md", "optimizers.md")),
]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(("tealightning fit", "tealightning test"))]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_documented_command_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    # A run's folder and a reader's own file do not exist here: the quickstart's stands in for them.
    there = re.compile(r"runs/.*config\.yaml|my_run\.yaml")
    args = [QUICKSTART if there.fullmatch(arg) else arg for arg in shlex.split(line)[1:]]
    if any("help" in arg for arg in args):
        assert run(*args).status == 0
    else:
        assert resolved(*args[1:], command=args[0])["model"]["init_args"]["policy"]


def test_the_pages_have_commands():
    assert all(commands(page) for page in PAGES)
