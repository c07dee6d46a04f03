"""A machine without vLLM: one engine says how to install it, the other one trains."""

import os
import subprocess
import sys

import pytest
from run_records import quickstart_args

NOT_INSTALLED = """
import sys
sys.modules["vllm"] = None  # what `import vllm` finds where it is not installed
from tealightning.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    assert exit.code == 2
else:
    raise AssertionError("trained without vLLM")
main([*sys.argv[1:], "--rollout.engine=TransformersEngine", "--trainer.logger.init_args.version=second"])
"""


@pytest.mark.slow
def test_without_vllm_its_engine_says_how_to_install_it_and_the_other_one_trains(playground, tmp_path):
    args = quickstart_args("fit", playground, tmp_path, max_steps=1, callbacks=["tealightning.ExportPolicy"])
    result = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED, *args],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for way_out in ('pip install "tealightning[vllm]"', "make install", "--rollout.engine=TransformersEngine"):
        assert way_out in result.stderr
    assert (tmp_path / "second" / "policy" / "model.safetensors").is_file()
