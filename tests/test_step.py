"""Training and evaluation step: what they change, on any number of devices, and at what cost."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax._src.array import ArrayImpl
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convstem_jax import build, layouts, mixing, optim
from convstem_jax.models import regnet
from convstem_jax.sharding import Sharding
from convstem_jax.step import (
    HParams,
    Recipe,
    TrainState,
    _interleave,
    eval_step,
    init_state,
    normalize,
    split_model,
    train_step,
)
from tests.forms import choose
from tests.networks import random_model, torchvision_network

RECIPE = Recipe(
    num_classes=10,
    optimizer="sgd",
    label_smoothing=0.1,
    mixup_alpha=0.0,
    cutmix_alpha=0.0,
    lighting_std=0.0,
    ema_every=2,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
SCHEDULE = {"num_steps": 100, "warmup_steps": 4, "ema_rate": 0.25}
MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "lighting_std": 0.1}
ONE_DEVICE = Sharding(tuple(jax.devices("cpu")[:1]))


class Run(NamedTuple):
    step: Callable  # as training has it; the state is donated
    state: TrainState
    batch: dict
    hparams: HParams
    sharding: Sharding


@functools.cache
def tiny(name):
    """A small network whose head is not zero: with a zero head no gradient reaches the rest."""
    changes = {"depth": 1, "image_size": 16, "patch_size": 4, "num_classes": 10}
    if name == "vitc_tiny":
        changes |= {"stem_channels": (8, 16), "stem_strides": (2, 2)}
    return random_model(name, **changes)


def make_batch(n=32):
    rng = np.random.default_rng(0)
    # Brighter from row to row: the statistics of one device's part are not those of the batch.
    images = rng.integers(0, 128, (n, 16, 16, 3)) + np.linspace(0, 127, n)[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": rng.integers(0, 10, n).astype(np.int32)}


@functools.cache
def jit_step(name, recipe, sharding):
    graphdef, _, _ = split_model(tiny(name))
    return build.jit_train_step(sharding, graphdef, recipe, sharding.replicated)


def make_run(name="vitc_tiny", *, num_devices=1, lr=0.1, wd=1e-4, seed=0, **recipe_changes):
    recipe = dataclasses.replace(RECIPE, **recipe_changes)
    sharding = Sharding(tuple(jax.devices("cpu")[:num_devices]))
    # A copy of the model, whose own arrays must survive the donation.
    state = init_state(recipe, jax.tree.map(jnp.copy, tiny(name)))
    hparams = HParams(jnp.float32(lr), jnp.float32(wd), jnp.uint32(seed), **SCHEDULE)
    state, hparams = jax.device_put((state, hparams), sharding.replicated)
    batch = jax.device_put(make_batch(), sharding.batch)
    return Run(jit_step(name, recipe, sharding), state, batch, hparams, sharding)


def fetch(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def distance(a, b):
    """Norm of the difference of two trees relative to the norm of `b`."""
    norm = lambda tree: math.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in tree))  # noqa: E731
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return norm([x - y for x, y in zip(a, b, strict=True)]) / norm(b)


def moved(old, new):
    """How far each parameter and statistic went."""
    return jax.tree.map(np.subtract, (new.params, new.batch_stats), (old.params, old.batch_stats))


# ----------------------------------------------------------------------------------- learning


def test_loss_falls_and_the_ema_follows_parameters_and_statistics():
    run = make_run(optimizer="adamw", lr=1e-2)
    state, ema, losses = run.state, fetch(run.state.ema), []
    first = fetch(state)
    for i in range(20):
        state, metrics = run.step(state, run.batch, run.hparams)
        losses.append(float(metrics["loss"]))
        new = fetch({"params": state.params, "batch_stats": state.batch_stats})
        if i % 2 == 0:
            rate = 1.0 if i < 4 else 0.25
            ema = jax.tree.map(lambda e, n, rate=rate: (1 - rate) * e + rate * n, ema, new)
        assert distance(state.ema, ema) < 1e-6, f"EMA after step {i}"
        assert int(state.step) == i + 1
        factor = optim.lr_factor(i, num_steps=100, warmup_steps=4)
        assert float(metrics["lr"]) == pytest.approx(1e-2 * factor)
    assert losses[-1] < 0.5 * losses[0], losses
    for old, new in zip(*map(jax.tree.leaves, (first[1:3], fetch(state)[1:3])), strict=True):
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new), "every parameter and statistic must move"


# Two draw mixup and two CutMix.
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 5), (1, 1), (1, 8)])
def test_the_step_lights_and_mixes(seed, step):
    run = make_run("vitp_tiny", seed=seed, **MIXING)
    state = run.state._replace(step=run.state.step + step)
    light_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    light = mixing.lighting(light_key, 32, 0.1)
    mask = np.array(mixing.draw_mask(mix_key, 16, 16, mixup_alpha=0.8, cutmix_alpha=1.0))
    assert np.abs(light).max() > 0.01 and mask.mean() < 0.99

    images = np.array(run.batch["image"]) / 255 + np.array(light)[:, None, None]
    images = (images - RECIPE.mean) / RECIPE.std
    targets = 0.9 * np.eye(10)[np.array(run.batch["label"])] + 0.01
    neighbour = np.arange(32) ^ 1
    images = mask[..., None] * images + (1 - mask[..., None]) * images[neighbour]
    targets = mask.mean() * targets + (1 - mask.mean()) * targets[neighbour]
    model = nnx.clone(tiny("vitp_tiny"))
    model.train()
    log_p = jax.nn.log_softmax(model(jnp.array(images, jnp.float32)))
    loss = float(-(targets * log_p).sum(axis=1).mean())
    _, metrics = run.step(state, run.batch, run.hparams)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "optimizer", "gpu"),
    [
        ("vitp_tiny", "adamw", False),
        ("vitc_tiny", "sgd", False),
        ("regnety_tiny", "sgd", False),
        ("vitp_tiny", "sgd", True),
        ("vitc_tiny", "adamw", True),
    ],
)
def test_one_step_is_pytorchs(monkeypatch, name, optimizer, gpu):
    """Normalisation, forward and backward pass, label smoothing, learning rate, decay, update.

    In the forms of CPUs, and in those that GPUs have in float32.
    """
    if gpu:
        choose(monkeypatch, gpu=True)
    lr, wd = {"adamw": (1e-2, 0.2), "sgd": (0.1, 0.05)}[optimizer]
    model = random_model(name, num_classes=10)
    network = torchvision_network(model).train()
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, 16).astype(np.int32)

    graphdef, params, _ = split_model(model)
    hparams = HParams(jnp.float32(lr), jnp.float32(wd), jnp.uint32(0), **SCHEDULE)
    step = ONE_DEVICE.jit(train_step, graphdef, recipe)
    batch = {"image": images, "label": labels}
    state, metrics = step(init_state(recipe, model), batch, hparams)

    decayed = [p for key, p in network.named_parameters() if p.ndim > 1]
    others = [p for key, p in network.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    lr *= optim.lr_factor(0, num_steps=100, warmup_steps=4)
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=float(lr), weight_decay=wd)
    else:
        optimizer = torch.optim.SGD(
            groups, lr=float(lr), weight_decay=wd, momentum=0.9, nesterov=True
        )
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    inputs = ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    loss = torch.nn.functional.cross_entropy(
        network(inputs), torch.tensor(labels).long(), label_smoothing=0.1
    )
    loss.backward()
    optimizer.step()

    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    shapes = {"params": state.params, "batch_stats": state.batch_stats}
    weights = {key: x.detach().numpy() for key, x in network.state_dict().items()}
    expected = layouts.from_torch(weights, shapes, "torchvision")["params"]
    errors = []
    for (path, new), old, e in zip(
        jax.tree.leaves_with_path(fetch(state.params)),
        jax.tree.leaves(params),
        jax.tree.leaves(expected),
        strict=True,
    ):
        error = np.abs(new - e)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if recipe.optimizer == "adamw" and name.endswith("qkv/bias"):
            # The exact gradient of the key's bias is 0; AdamW turns its rounding into whole steps.
            error = np.delete(error, np.s_[len(error) // 3 : len(error) // 3 * 2])
        assert np.abs(new - old).max() > 1e-4, "every parameter has to move"
        errors.append(error.ravel())
    errors = np.concatenate(errors)
    # AdamW's first step is +-lr, so that a gradient of the size of its rounding may go astray.
    assert (errors > 1e-5).sum() <= {"adamw": 10, "sgd": 0}[recipe.optimizer]


# ------------------------------------------------------------------- devices and micro-batches


def one_step(name, **changes):
    run = make_run(name, **changes)
    old = fetch(run.state)
    new, metrics = run.step(run.state, run.batch, run.hparams)
    return moved(old, fetch(new)), fetch(metrics)


def assert_same_step(a, b, tolerance):
    (moved_a, metrics_a), (moved_b, metrics_b) = a, b
    assert distance(moved_a[0], moved_b[0]) < tolerance, "update of the parameters"
    if jax.tree.leaves(moved_b[1]):
        assert distance(moved_a[1], moved_b[1]) < tolerance, "update of BatchNorm's statistics"
    for key in "loss", "grad_norm", "lr":
        assert metrics_a[key] == pytest.approx(metrics_b[key], rel=tolerance), key


@pytest.mark.parametrize("accumulate", [1, 4])
def test_8_devices_do_what_1_device_does(accumulate):
    """BatchNorm's statistics included: they are over the whole (micro-)batch."""
    one = one_step("vitc_tiny", num_devices=1, accumulate=accumulate, **MIXING)
    eight = one_step("vitc_tiny", num_devices=8, accumulate=accumulate, **MIXING)
    assert_same_step(eight, one, 2e-5)


@pytest.mark.parametrize("is_product", [True, False])
def test_8_devices_share_grouped_convolutions(monkeypatch, is_product):
    """By itself, XLA would have each of them compute the whole batch."""
    monkeypatch.setattr(regnet, "is_product", lambda *_: is_product)
    model = random_model("regnety_tiny", num_classes=10, depths=(1,), widths=(8,), group_width=2)
    graphdef, _, _ = split_model(model)
    grads = []
    for num_devices in (1, 8):
        run = make_run("vitc_tiny", num_devices=num_devices)  # for its batch
        step = run.sharding.jit(train_step, graphdef, RECIPE)
        state = jax.device_put(init_state(RECIPE, model), run.sharding.replicated)
        assert "all-gather" not in step.lower(state, run.batch, run.hparams).compile().as_text()
        grads.append(fetch(step(state, run.batch, run.hparams)[0].params))
    assert distance(grads[1], grads[0]) < 1e-5


def test_accumulated_micro_batches_make_the_same_update():
    """Without BatchNorm, whose statistics differ between a micro-batch and the batch."""
    assert_same_step(one_step("vitp_tiny", accumulate=4), one_step("vitp_tiny"), 2e-5)


def test_accumulation_updates_the_running_statistics_with_each_micro_batch():
    run = make_run(accumulate=4)
    state, _ = run.step(run.state, run.batch, run.hparams)
    model, images = nnx.clone(tiny("vitc_tiny")), make_batch()["image"]
    model.train()
    forward = nnx.jit(lambda model, x: model(normalize(x, RECIPE)))
    for i in range(4):
        forward(model, images[i::4])
    assert distance(fetch(state.batch_stats), fetch(split_model(model)[2])) < 1e-5


def test_each_micro_batch_lies_on_every_device_and_nothing_is_sent():
    run = make_run(num_devices=8)
    rows = jax.device_put(np.arange(64), run.sharding.batch)  # 8 on each device
    interleave = jax.jit(lambda x: _interleave(x, 4)).lower(rows).compile()
    micro_batches = np.array(interleave(rows))
    assert sorted(micro_batches.ravel()) == list(range(64))
    for micro_batch in micro_batches:
        np.testing.assert_array_equal(np.bincount(micro_batch // 8), np.full(8, 2))
    hlo = interleave.as_text()
    assert not [op for op in ("all-to-all", "all-gather", "permute", "all-reduce") if op in hlo]


def test_learning_rates_can_be_vmapped():
    """What the study does: trials that differ in `hparams` are one program."""
    lrs = [0.01, 0.03, 0.1]
    graphdef, _, _ = split_model(tiny("vitp_tiny"))
    run = make_run("vitp_tiny")
    axes = (None, None, 0, None, HParams(0, *[None] * 5))
    trials = ONE_DEVICE.jit(jax.vmap(train_step, in_axes=axes), graphdef, RECIPE)
    states = jax.tree.map(lambda x: jnp.stack([x] * len(lrs)), run.state)
    hparams = run.hparams._replace(lr=jnp.array(lrs))
    for _ in range(2):
        states, _ = trials(states, run.batch, hparams)
    for i, lr in enumerate(lrs):
        run = make_run("vitp_tiny", lr=lr)
        old, state = fetch(run.state), run.state
        for _ in range(2):
            state, _ = run.step(state, run.batch, run.hparams)
        trial = jax.tree.map(lambda x, i=i: x[i], fetch(states))
        assert distance(moved(old, trial)[0], moved(old, fetch(state))[0]) < 2e-5, lr
        assert int(trial.step) == 2


# --------------------------------------------------------------------------------------- cost


@pytest.fixture
def fetches(monkeypatch):
    """Shapes of the arrays that were read back to the host."""
    # The property that float(), bool(), np.asarray() and jax.device_get() all go through. An array
    # on one CPU device can be read past it; one on several devices cannot.
    shapes, value = [], ArrayImpl._value
    monkeypatch.setattr(
        ArrayImpl, "_value", property(lambda x: shapes.append(x.shape) or value.fget(x))
    )
    return shapes


def test_steps_compile_once_and_leave_the_host_alone(fetches):
    run = make_run(num_devices=8)
    state = run.state
    fetches.clear()
    with jax.transfer_guard("disallow"):
        for _ in range(4):
            state, metrics = run.step(state, run.batch, run.hparams)
    assert not fetches, "a step waits for the device where it reads an array"
    assert run.step._cache_size() == 1
    # Both guards can fail.
    float(metrics["loss"])
    assert fetches == [()]
    with jax.transfer_guard("disallow"), pytest.raises(jax.errors.JaxRuntimeError, match="isallow"):
        run.step(state, make_batch(), run.hparams)


def test_donated_state_is_reused():
    def memory(state):
        return sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state))

    run = make_run()
    before = memory(run.state)
    state, _ = run.step(run.state, run.batch, run.hparams)
    assert all(x.is_deleted() for x in jax.tree.leaves(run.state))
    assert memory(state) == before, "the new state must lie where the old one lay"
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, run.batch, run.hparams)))


# --------------------------------------------------------------------------------- evaluation


class Echo(nnx.Module):
    """Takes the first pixels' red channel for logits."""

    def __call__(self, images):
        return images[:, 0, :, 0]


def jit_eval_step(model, **recipe_changes):
    recipe = dataclasses.replace(RECIPE, **recipe_changes)
    graphdef, params, batch_stats = split_model(model)
    step = ONE_DEVICE.jit(eval_step, graphdef, recipe)
    return lambda batch, params=params: jax.device_get(step(params, batch_stats, batch))


@pytest.mark.parametrize("num_classes", [3, 10])
def test_errors_are_counted_exactly_and_padding_is_not(num_classes):
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.permutation(num_classes) for _ in range(64)])
    labels = rng.integers(0, num_classes, 64)  # wrong ones in the padding too
    mask = np.arange(64) < 50
    eval_batch = jit_eval_step(Echo(), num_classes=num_classes, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    images = np.zeros((64, 1, num_classes, 3), np.uint8)
    images[..., 0] = pixels[:, None]
    sums = eval_batch({"image": images, "label": labels, "mask": mask})

    pixels, labels = pixels[mask], labels[mask]
    ranks = np.sum(pixels > np.take_along_axis(pixels, labels[:, None], axis=1), axis=1)
    p = np.exp(pixels - pixels.max(axis=1, keepdims=True))
    p = np.take_along_axis(p, labels[:, None], axis=1)[:, 0] / p.sum(axis=1)
    assert sums["examples"] == 50
    assert sums["top1_errors"] == np.sum(ranks >= 1)
    assert sums["top5_errors"] == np.sum(ranks >= 5)  # none of 3 classes
    assert sums["loss_sum"] == pytest.approx(-np.log(p).sum(), rel=1e-5)


def test_models_that_have_learnt_nothing_or_diverged_are_not_right():
    model = tiny("vitc_tiny")
    eval_batch = jit_eval_step(model)
    batch = make_batch() | {"label": np.arange(32, dtype=np.int32) % 10, "mask": np.ones(32, bool)}
    params = split_model(model)[1]

    fresh = eval_batch(batch, params | {"head": jax.tree.map(jnp.zeros_like, params["head"])})
    assert fresh["top1_errors"] >= 28, "with 10 equal logits at most one class can be right"
    assert fresh["top5_errors"] >= 15
    assert fresh["loss_sum"] == pytest.approx(32 * math.log(10), rel=1e-5)

    diverged = eval_batch(batch, jax.tree.map(lambda x: x * jnp.nan, params))
    assert (diverged["top1_errors"], diverged["top5_errors"]) == (32, 32)
    assert math.isnan(diverged["loss_sum"])


def test_evaluation_uses_running_statistics():
    """So that a prediction does not depend on the other images of the batch."""
    eval_batch = jit_eval_step(tiny("vitc_tiny"))
    batch = make_batch() | {"mask": np.ones(32, bool)}
    whole = eval_batch(batch)
    parts = [eval_batch(batch | {"mask": np.arange(32) // 16 == i}) for i in range(2)]
    for key in whole:
        assert whole[key] == pytest.approx(sum(part[key] for part in parts), rel=1e-5), key
    bright = batch["image"] // np.where(np.arange(32) < 16, 1, 2)[:, None, None, None]
    part = eval_batch(batch | {"image": bright.astype(np.uint8), "mask": np.arange(32) < 16})
    assert part["loss_sum"] == pytest.approx(parts[0]["loss_sum"], rel=1e-5)
