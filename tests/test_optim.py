"""Optimisers against torch.optim, the schedule and the EMA against the paper's formulas."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from convstem_jax import optim
from convstem_jax.models import create_model
from convstem_jax.step import split_model

WD = 0.3
DECAYED = {"kernel": True, "position_embedding": True, "bias": False, "scale": False}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_follow_torch(name):
    rng = np.random.default_rng(0)
    params = {key: rng.normal(size=(5, 3)) for key in DECAYED}
    params_torch = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    groups = [
        {"params": [params_torch[key]], "weight_decay": WD * decayed}
        for key, decayed in DECAYED.items()
    ]
    if name == "adamw":
        optimizer_torch = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    else:
        optimizer_torch = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)

    @jax.jit
    def update(params, grads, state, lr):
        optimizer = optim.OPTIMIZERS[name](lr, WD)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.enable_x64(True):  # in double precision only another rule can make a difference
        params = jax.tree.map(jnp.asarray, params)
        state = optim.OPTIMIZERS[name](0.0, 0.0).init(params)
        for step in range(20):
            lr = 0.1 / (1 + step)
            # From 1e-9 to 10: the small ones show where AdamW's epsilon stands.
            grads = {
                key: rng.normal(size=(5, 3)) * 10.0 ** rng.integers(-9, 2, size=(5, 3))
                for key in DECAYED
            }
            params, state = update(params, grads, state, lr)
            for key, param in params_torch.items():
                param.grad = torch.tensor(grads[key])
            for group in optimizer_torch.param_groups:
                group["lr"] = lr
            optimizer_torch.step()
            for key in DECAYED:
                np.testing.assert_allclose(
                    params[key],
                    params_torch[key].detach().numpy(),
                    rtol=1e-6,
                    err_msg=f"{key} after step {step}",
                )


def test_decay_acts_on_all_but_biases_and_norms():
    model = nnx.eval_shape(lambda: create_model("vitc_tiny", depth=5, rngs=nnx.Rngs(0)))
    mask = optim.decay_mask(split_model(model)[1])
    flat = {tuple(k.key for k in path): x for path, x in jax.tree.leaves_with_path(mask)}
    norms = [p for p, m in nnx.iter_modules(model) if isinstance(m, nnx.LayerNorm | nnx.BatchNorm)]
    assert len(norms) == 3 + 2 * 5 + 1
    for path, decayed in flat.items():
        assert decayed == (path[:-1] not in norms and path[-1] != "bias"), path
    assert flat["position_embedding",]
    assert flat["class_token",]
    # Kernels of the stem, the blocks and the head, and the two above.
    assert sum(flat.values()) == 4 + 4 * 5 + 1 + 2
    assert len(flat) == 77


@pytest.mark.parametrize("warmup_steps", [0, 50])
def test_schedule_is_the_papers(warmup_steps):
    num_steps = 1000

    def paper(step):
        factor = 0.005 + (1 - 0.005) * 0.5 * (1 + np.cos(np.pi * step / num_steps))
        if step < warmup_steps:
            factor *= 0.1 + (1 - 0.1) * step / warmup_steps
        return factor

    steps = [0, 25, 49, 50, 51, 500, 999, 1000]
    got = [
        optim.lr_factor(jnp.int32(step), num_steps=num_steps, warmup_steps=warmup_steps)
        for step in steps
    ]
    np.testing.assert_allclose(got, [paper(step) for step in steps], rtol=1e-5)
    assert got[0] == pytest.approx(0.1 if warmup_steps else 1.0)
    assert got[-1] == pytest.approx(0.005)


def test_ema_rate():
    # The paper's: alpha 1e-5, batch 2048, 100 epochs, every 32 steps.
    rate = optim.ema_rate(alpha=1e-5, batch_size=2048, epochs=100, every=32)
    assert rate == pytest.approx(0.0065536)
    assert optim.ema_rate(alpha=1e-2, batch_size=2048, epochs=1, every=32) == 1.0


def test_ema_is_copied_in_the_warmup_and_moves_every_few_steps_after():
    rate, every, warmup_steps = 0.3, 4, 8
    update = jax.jit(
        lambda ema, new, step: optim.update_ema(
            ema, new, step, rate=rate, every=every, warmup_steps=warmup_steps
        )
    )
    rng = np.random.default_rng(0)
    ema = {"params": {"a": np.float32(rng.normal(size=1000))}, "batch_stats": {"b": np.zeros(3)}}
    ema = jax.tree.map(np.float32, ema)
    for step in range(20):
        new = jax.tree.map(lambda x: np.float32(1e3 * rng.normal(size=x.shape)), ema)
        got = jax.device_get(update(ema, new, step))
        for e, n, g in zip(*map(jax.tree.leaves, (ema, new, got)), strict=True):
            if step % every:
                np.testing.assert_array_equal(g, e, err_msg=f"step {step} is none to move at")
            elif step < warmup_steps:
                np.testing.assert_array_equal(g, n, err_msg=f"step {step} must copy every bit")
            else:
                np.testing.assert_allclose(g, (1 - rate) * e + rate * n, rtol=1e-5, atol=1e-3)
        ema = got
