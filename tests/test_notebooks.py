"""Notebooks run from the first cell to the last, with less training."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LESS = {"epochs=12,eval_every_epochs=1": "epochs=0.2,warmup_epochs=0.1,eval_every_epochs=0.1"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("colab/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n\n".join(cell["source"] for cell in cells)
    for whole, less in LESS.items():
        assert whole in code
        code = code.replace(whole, less)
    code = code.replace('"runs/', f'"{tmp_path}/')
    # It would show windows, where there is a screen.
    environment = os.environ | {"MPLBACKEND": "agg", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        # Jupyter starts in the notebook's folder.
        [sys.executable, "-c", code], cwd=path.parent, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 error") >= 2
