"""What a step computes and moves, and the bound that follows."""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from benchmarks import roofline
from convstem_jax.complexity import complexity
from convstem_jax.models import MODELS, create_model


def test_kernels_of_a_small_program_by_hand():
    """relu(x w) is one kernel with the product, the two sums of its result are one more."""

    @jax.jit
    def program(x, w, v):
        y = jax.nn.relu(x @ w)  # [8, 32]
        full = y.astype(jnp.float32)
        return jnp.transpose(y) @ v, full.sum(axis=0), (full * full).sum(axis=0)

    shapes = ((8, 16), (16, 32), (8, 4))
    jaxpr = jax.make_jaxpr(program)(*(jnp.zeros(shape, jnp.bfloat16) for shape in shapes)).jaxpr
    found = sorted(roofline.kernels(jaxpr), key=lambda kernel: -kernel.flops)
    assert [kernel.flops for kernel in found] == [2 * 8 * 16 * 32, 2 * 32 * 8 * 4, 0]
    x, w, v, y, out, one_sum = 8 * 16, 16 * 32, 8 * 4, 8 * 32, 32 * 4, 32
    assert [kernel.bytes for kernel in found] == [
        2 * (x + w + y), 2 * (y + v + out), 2 * y + 2 * one_sum * 4
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "least", "most"),
    # A multiplication and an addition are two operations. The images need no gradient, and nearly
    # all of a ViT's last block is left out.
    [("vitc_4gf", 5.4, 5.7), ("vitp_1gf", 5.4, 5.7), ("regnety_4gf", 5.9, 6.1)],
)
def test_the_roofline_counts_three_forward_passes(monkeypatch, name, least, most):
    one_block_a_stage = dataclasses.replace(MODELS["regnety_4gf"], depths=(1, 1, 1, 1))
    monkeypatch.setitem(MODELS, "regnety_4gf", one_block_a_stage)
    forward = complexity(nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))).flops
    flops = sum(kernel.flops for kernel in roofline.step_kernels(name, 64, "NVIDIA H200")) / 64
    assert least * forward < flops < most * forward


def test_on_gpus_attention_weights_stay_on_the_chip():
    kinds = "cpu", "NVIDIA H200", "TPU v5 lite"
    found = [roofline.step_kernels("vitp_1gf", 64, kind) for kind in kinds]
    here, on_gpu, on_tpu = [(sum(k.flops for k in x), sum(k.bytes for k in x)) for x in found]
    assert on_gpu[0] == pytest.approx(here[0], rel=0.02)
    assert on_tpu == pytest.approx(here, rel=0.1), "pinned layouts are no kernels"
    assert 0.7 * here[1] < on_gpu[1] < 0.95 * here[1]


def test_roofline(tmp_path, capsys):
    measured, file = tmp_path / "train_step.json", tmp_path / "roofline.json"
    row = {"model": "vitc_tiny", "implementation": "convstem_jax", "batch": 4}
    row |= {"device": jax.devices()[0].device_kind, "commit": "abc", "optimizer": "adamw"}
    measured.write_text(json.dumps([row | {"images_per_second": 10.0}]))
    flags = [f"--measured={measured}", "--flops=1e9", "--bandwidth=1e9", f"--json={file}"]
    assert roofline.main(flags) == 0
    [row] = json.loads(file.read_text())
    seconds = row["batch"] / row["bound_images_per_second"]
    ceilings = row["flops"] / 1e9, row["bytes"] / 1e9
    assert max(ceilings) <= seconds <= sum(ceilings)
    assert row["reached"] == pytest.approx(10 / row["bound_images_per_second"])
    assert row["measured_at"] == "abc" != row["commit"]
    assert row["command"] == flags and row["versions"]["jax"] == jax.__version__
    assert "vitc_tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        roofline.main([f"--measured={tmp_path}/none.json"])
    [other] = json.loads(measured.read_text())
    measured.write_text(json.dumps([other | {"device": "NVIDIA H200"}]))
    with pytest.raises(SystemExit):  # its ceilings are not this machine's
        roofline.main([f"--measured={measured}", "--flops=1e9"])
    assert "the bound of NVIDIA H200 is wanted, and this is" in capsys.readouterr().err
    for wrong, message in (
        ({"dtype": "float32"}, "has float32 and adamw: the bound is of bfloat16 and adamw"),
        ({"model": "vit_huge"}, "has vit_huge, which is no model of this version"),
    ):
        measured.write_text(json.dumps([other | wrong]))
        with pytest.raises(SystemExit):
            roofline.main([f"--measured={measured}"])
        assert message in capsys.readouterr().err
