"""Who may import whom, read from the source: an import that would turn the layers around fails here."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tealightning"

# A unit (a module or folder of the package) may import its own line and the lines above it.
LAYERS = [
    {
        "version",
        "types",
        "registry",
        "errors",
        "checks",
        "strict_yaml",
        "functional",
        "reliability",
        "text",
        "adapter_folder",
        "pretrained",
    },
    {"estimators", "metrics"},
    {"training"},
    {"rewards", "data"},
    {"rollouts"},
    {"callbacks"},
    {"reporting"},
    {"worlds", "ablation", "diagnostics", "deployment"},
    {"cli", "__main__"},
]
LAYER_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# The package's own `__init__` offers names lazily; it is a shop window and nothing inside may import from it ...
WINDOW = {"register", "__version__"}  # ... except what its layer-0 modules define.


def unit_of(file: Path) -> str:
    """`tealightning/text/chat.py` -> `rewards`, `tealightning/types.py` -> `types`."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(file: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute dotted name that the file imports (`from a import b` is `a.b`), with its line."""
    package = (PACKAGE.name, *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [(file, name, line) for file in FILES for name, line in imported_names(file, parse(file))]


@lru_cache
def lines_of_type_checking(file: Path) -> set[int]:
    blocks = [node for node in ast.walk(parse(file)) if isinstance(node, ast.If)]
    blocks = [block for block in blocks if "TYPE_CHECKING" in ast.unparse(block.test)]
    imports = (ast.Import, ast.ImportFrom)
    return {node.lineno for block in blocks for node in ast.walk(block) if isinstance(node, imports)}


def describe(file: Path, name: str, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line} imports {name}"


def test_layers_name_every_unit_of_the_package():
    unknown = {unit_of(file) for file in FILES} - LAYER_OF.keys() - {"__init__"}
    assert not unknown, f"give {sorted(unknown)} a layer in {Path(__file__).name} and in docs/architecture.md"


def test_imports_never_point_to_a_later_layer():
    wrong = []
    for file, name, line in IMPORTS:
        top, _, rest = name.partition(".")
        importer = unit_of(file)
        if top != PACKAGE.name or importer in ("__init__", "__main__") or rest in WINDOW:
            continue
        imported = rest.split(".")[0]
        if imported in LAYER_OF and LAYER_OF[imported] <= LAYER_OF[importer]:
            continue
        if rest == "" and importer == "cli":
            continue  # the command line reads the package's version and folder
        wrong.append(describe(file, name, line))
    assert not wrong, "\n".join(wrong)


def test_no_import_leads_back_to_the_module_that_makes_it():
    module_of = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}
    names = {name.removesuffix(".__init__") for name in module_of.values()}
    graph: dict[str, set[str]] = {}
    for file, name, line in IMPORTS:  # also those inside functions, which would only hide a circle; types are no import
        imported = name if name in names else name.rpartition(".")[0]
        if imported in names - {PACKAGE.name} and line not in lines_of_type_checking(file):
            graph.setdefault(module_of[file].removesuffix(".__init__"), set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_functional_imports_only_numerical_libraries_and_itself():
    allowed = {"torch", "numpy", "scipy", "liger_kernel"} | sys.stdlib_module_names
    wrong = [
        describe(file, name, line)
        for file, name, line in IMPORTS
        if unit_of(file) == "functional"
        and name.split(".")[0] not in allowed
        and not name.startswith("tealightning.functional")
    ]
    assert not wrong, "\n".join(wrong)


def test_training_knows_nothing_of_rollouts_rewards_or_callbacks():
    forbidden = ("tealightning.rollouts", "tealightning.rewards", "tealightning.callbacks")
    wrong = [
        describe(file, name, line)
        for file, name, line in IMPORTS
        if unit_of(file) == "training" and name.startswith(forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def test_vllm_is_imported_in_two_files_and_only_inside_functions():
    files = {file for file, name, _ in IMPORTS if name.split(".")[0] == "vllm"}
    assert {file.name for file in files} == {"vllm.py", "vllm_worker.py"}, sorted(files)
    for file in files:
        tree = parse(file)
        inside_functions = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        eager = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and "vllm" in ast.unparse(node).split()[1]
            and not ast.unparse(node).split()[1].startswith("tealightning")
            and id(node) not in inside_functions
            and node.lineno not in lines_of_type_checking(file)
        ]
        assert not eager, eager


@pytest.mark.parametrize("statement", ["import tealightning", "import tealightning.rollouts, tealightning.callbacks"])
def test_import_loads_no_engine_and_no_logger(statement: str):
    code = f"{statement}; import sys; print(*sorted({{'vllm', 'wandb'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_no_file_names_a_home_folder_or_a_workplace():
    # Written in pieces, so that this file does not name one.
    pattern = re.compile("|".join(["/" + "home/", "/" + "root/", "/" + "Users/", "/" + "work/", r"\.\./" + "shared"]))
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    wrong = []
    for name in names.stdout.splitlines():
        file = ROOT / name
        if file.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".json", ".jsonl"} and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            wrong += [f"{name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if pattern.search(line)]
    assert not wrong, "\n".join(wrong)
