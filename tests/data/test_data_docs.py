import re
import shutil
from pathlib import Path

import yaml

from tealightning.data import PromptDataModule

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_python_example_runs(playground: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(playground, tmp_path / "runs" / "prose")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {})
    assert "train-" in capsys.readouterr().out


def test_yaml_example_is_accepted():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    data = PromptDataModule(**yaml.safe_load(example)["data"]["init_args"])
    assert data.sources["val"] == "prompts.jsonl@[90%:]"
