"""The configuration reaches the step."""

import jax
import jax.numpy as jnp
import pytest

from convstem_jax import build
from convstem_jax.config import load_config, set_field
from convstem_jax.data.examples import EvalExamples, TrainExamples, TrainTransform
from convstem_jax.errors import ConfigError
from convstem_jax.step import HParams, Recipe


def test_every_field_arrives():
    config = load_config("configs/quickstart.py")
    for name, text in {
        "optimizer": "sgd", "lr": "0.3", "wd": "0.07", "seed": "9", "label_smoothing": "0.2",
        "mixup_alpha": "0.3", "cutmix_alpha": "0.4", "lighting_std": "0.5", "accumulate": "4",
        "epochs": "2", "warmup_epochs": "0.5", "ema_alpha": "1e-3", "ema_every": "3",
        "mean": "(0.1, 0.2, 0.3)", "std": "(0.4, 0.5, 0.6)", "batch_size": "128",
        "stem_init": "later", "dtype": "bfloat16", "image_size": "64", "eval_resize": "70",
        "min_crop_area": "0.7", "flip": "false", "auto_augment": "true",
    }.items():  # fmt: skip
        set_field(config, name, text)
    assert build.recipe(config, 10) == Recipe(
        num_classes=10, optimizer="sgd", label_smoothing=0.2, mixup_alpha=0.3, cutmix_alpha=0.4,
        lighting_std=0.5, ema_every=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), accumulate=4,
    )  # fmt: skip
    transform = TrainTransform(64, 0.7, flip=False, auto_augment=True)
    assert build.train_examples(config, None) == TrainExamples(None, transform, seed=9)
    config.data_seed = 4
    assert build.train_examples(config, None) == TrainExamples(None, transform, seed=4)
    assert build.eval_examples(config, None) == EvalExamples(None, resize=70, image_size=64)
    expected = HParams(0.3, 0.07, 9, num_steps=156, warmup_steps=39, ema_rate=1e-3 * 128 / 2 * 3)
    assert [float(x) for x in build.hparams(config, 10_000)] == pytest.approx(expected)

    # Whole batches of 128: of as many images as are asked for, of an epoch at most, one at least.
    found = []
    for asked, there in (("0", 1000), ("1000", 10_000), ("1000", 300), ("1000", 60), ("1", 1000)):
        set_field(config, "precise_bn_examples", asked)
        found.append(build.num_precise_batches(config, there))
    assert found == [0, 7, 2, 1, 1]

    model = build.new_model(config, 10, seed=9)
    assert (model.spec.image_size, model.spec.stem_init) == (64, "later")
    assert model.dtype == jnp.bfloat16 and model.head.out_features == 10
    other = build.new_model(config, 10, seed=8)
    assert (model.position_embedding[...] != other.position_embedding[...]).any()


def test_parameters_and_steps_have_keys_of_their_own(monkeypatch):
    config = load_config("configs/quickstart.py:seed=9")
    monkeypatch.setattr(build, "create_model", lambda name, rngs, **kwargs: rngs)
    rngs = build.new_model(config, 10, seed=9)
    of_parameters = {tuple(jax.random.key_data(rngs.params()).tolist()) for _ in range(100)}
    of_steps = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(9), jnp.arange(1000))
    of_steps = set(map(tuple, jax.random.key_data(of_steps).tolist()))
    assert (len(of_parameters), len(of_steps)) == (100, 1000)
    assert not of_parameters & of_steps


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    config = load_config("configs/quickstart.py:batch_size=100")
    with pytest.raises(ConfigError, match="config.batch_size=100 .* 8 devices .*: use 96"):
        build.check_batch(config, 8)
    config.batch_size = 96
    build.check_batch(config, 8)
