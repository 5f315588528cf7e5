"""Complexity against the paper's tables and against sums by hand."""

import json
import subprocess
import sys

from flax import nnx
import pytest

from convstem_jax import complexity
from convstem_jax.models import create_model

# Flops (G) and activations (M) as they follow from the paper's definitions, and parameters.
RECOMPUTED = {
    "vitp_1gf": (1.080, 4_830_376, 5.549),
    "vitp_4gf": (3.898, 18_507_112, 11.098),
    "vitp_18gf": (17.524, 86_567_656, 24.001),
    "vitp_36gf": (35.880, 178_364_392, 37.267),
    "vitc_1gf": (1.077, 4_567_936, 5.658),
    "vitc_4gf": (3.956, 17_754_136, 11.315),
    "vitc_18gf": (17.675, 81_573_160, 24.133),
    "vitc_36gf": (34.917, 167_796_008, 36.741),
    "regnety_1gf": (1.047, 9_600_538, 6.210),
    "regnety_4gf": (4.096, 22_408_976, 14.465),
    "regnety_16gf": (15.460, 72_282_900, 30.702),
    "regnety_32gf": (31.073, 128_552_446, 46.221),
}


@pytest.fixture(scope="module")
def table():
    return {row["model"]: row for row in complexity.rows(complexity.PAPER)}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_counts_are_the_papers(table, name):
    row = table[name]
    flops, params, acts = RECOMPUTED[name]
    assert row["flops"] == pytest.approx(flops * 1e9, rel=1e-3)
    assert row["params"] == params
    assert row["acts"] == pytest.approx(acts * 1e6, rel=1e-3)


def test_printed_columns_are_the_rounded_counts_but_for_two_misprints(table):
    wrong = set()
    for name, row in table.items():
        for column, unit in (("flops", 1e9), ("params", 1e6), ("acts", 1e6)):
            if abs(row[column] - row[f"paper_{column}"]) > 0.0505 * unit:
                wrong.add((name, column))
    assert wrong == set(complexity.MISPRINTS)


def test_stems_of_table_3_cost_about_the_same(table):
    for row in complexity.rows([f"vitc_4gf_s{i}" for i in range(1, 5)]):
        assert row["flops"] == pytest.approx(table["vitc_4gf"]["flops"], rel=0.01), row["model"]


def test_a_small_network_by_hand():
    """Two tokens of width 4 in one block: every product and bias."""
    changes = {"width": 4, "mlp_dim": 8, "num_heads": 2, "depth": 1, "image_size": 8}
    model = nnx.eval_shape(
        lambda: create_model("vitp_tiny", num_classes=3, rngs=nnx.Rngs(0), **changes)
    )
    count = complexity.complexity(model)
    stem = 8 * 8 * 3 * 4 + 4
    position = 2 * 4
    qkv, out = 2 * (4 * 12 + 12), 2 * (4 * 4 + 4)
    maps, values = 2 * (2 * 2 * 2), 2 * (2 * 2 * 2)
    mlp = 1 * (4 * 8 + 8 + 8 * 4 + 4)  # without the class token
    head = 4 * 3 + 3
    assert count.flops == stem + position + qkv + out + maps + values + mlp + head
    assert count.acts == 4 + 2 * 4 + 2 * 12 + 2 * 2 * 2 + 2 * 4 + 2 * 4 + (8 + 4) + 3
    params = 8 * 8 * 3 * 4 + 4 + 4 + 2 * 4 + 3 * 8 + 4 * 12 + 12 + 4 * 4 + 4
    assert count.params == params + 4 * 8 + 8 + 8 * 4 + 4 + head


def test_small_models_have_three_digits_too(capsys):
    assert complexity.main(["--model", "vitc_tiny", "--num_classes", "10"]) == 0
    assert " 0.00292 " in capsys.readouterr().out
    assert complexity.main(["--model", "vitc_tiny", "--image_size", "96"]) == 0
    assert " 0.0330 " in capsys.readouterr().out


def test_json_and_markdown(capsys):
    assert complexity.main(["--model", "vitp_18gf", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "vitp_18gf" and row["paper_params"] == 86_700_000
    assert row.keys() == {
        "model", "flops", "params", "acts", "paper_flops", "paper_params", "paper_acts",
    }  # fmt: skip
    assert complexity.main(["--model", "vitp_18gf", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "| vitp_18gf |" in text and "86.7*" in text and "86.6 in Table 2" in text
    assert complexity.main(["--model", "vitp_18gf", "--image_size", "100"]) == 2
    assert "not a multiple of patch size 16" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "convstem_jax.complexity", "--model", "vitc_tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert "vitc_tiny" in done.stdout
