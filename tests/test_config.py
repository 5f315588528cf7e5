"""Configurations: the paper's values, the argument string, and every refusal."""

import itertools
import os
import sys

import pytest

from convstem_jax.config import load_config, set_field, set_fields
from convstem_jax.errors import ConfigError
from convstem_jax.models import MODELS
from convstem_jax.rules import validate

# Table 4, tuned at 50 epochs, and section 6: lr and wd.
STABILITY = """
regnety 1gf 4gf 16gf  adamw 3.8e-3 0.1   sgd 2.54 2.4e-5
vitp    1gf 4gf       adamw 2.0e-3 0.20  sgd 1.9  1.3e-5
vitp    18gf          adamw 1.0e-3 0.24  sgd 1.1  1.2e-5
vitc    1gf           adamw 2.5e-3 0.19  sgd 1.9  1.3e-5
vitc    4gf           adamw 1.0e-3 0.24  sgd 1.3  2.2e-5
vitc    18gf          adamw 1.0e-3 0.24  sgd 1.1  2.7e-5
"""
PEAK = """
vitp    1gf 4gf 18gf       adamw 1e-3 0.24
vitp    36gf               adamw 6e-4 0.28
vitc    1gf 4gf 18gf       adamw 1e-3 0.24
vitc    36gf               adamw 6e-4 0.28
regnety 1gf 4gf 16gf 32gf  sgd 2.54 2.4e-5
"""


def settings(table, setting):
    for line in table.strip().splitlines():
        family, *words = line.split()
        sizes = [word for word in words if word.endswith("gf")]
        for size, i in itertools.product(sizes, range(len(sizes), len(words), 3)):
            optimizer, lr, wd = words[i : i + 3]
            name = f"{family}_{size}"
            yield f"{family}:{size},{optimizer},{setting}", name, optimizer, float(lr), float(wd)


@pytest.mark.parametrize(
    "spec, model, optimizer, lr, wd",
    [
        *settings(STABILITY, "stability"),
        *settings(PEAK, "peak"),
        ("vitc", "vitc_4gf", "adamw", 1e-3, 0.24),
        ("vitc:18gf,sgd", "vitc_18gf", "sgd", 1.1, 2.7e-5),
        ("vitp:stability", "vitp_4gf", "adamw", 2e-3, 0.2),
        ("vitc:72gf,lr=1e-4,wd=0.15", "vitc_72gf", "adamw", 1e-4, 0.15),
        ("vitc:s3,stability,sgd", "vitc_4gf_s3", "sgd", 1.3, 2.2e-5),
        ("vitc:ln", "vitc_4gf_ln", "adamw", 1e-3, 0.24),
        ("vitp:bn", "vitp_4gf_bn", "adamw", 1e-3, 0.24),
    ],
)
def test_configs_hold_the_settings_of_the_paper(spec, model, optimizer, lr, wd):
    name, _, arg = spec.partition(":")
    config = load_config(f"configs/{name}.py:{arg}")
    validate(config)
    assert (config.model, config.optimizer, config.lr, config.wd) == (model, optimizer, lr, wd)
    assert config.model in MODELS
    assert (config.batch_size, config.epochs, config.warmup_epochs) == (2048, 100, 5)
    assert (config.label_smoothing, config.ema_alpha, config.ema_every) == (0.1, 1e-5, 32)
    sizes = {"regnety_1gf": (232, 262), "regnety_4gf": (240, 272)}
    sizes |= {"regnety_16gf": (256, 292), "regnety_32gf": (268, 304)}
    assert (config.image_size, config.eval_resize) == sizes.get(model, (224, 256))
    assert config.min_crop_area == 0.08
    assert (config.mixup_alpha, config.cutmix_alpha, config.lighting_std) == (0.8, 1.0, 0.1)
    assert config.auto_augment and config.flip and config.precise_bn_examples == 8192


def test_fields_in_the_argument():
    config = load_config("configs/vitc.py:4gf,epochs=50,sgd,lr=0.5")
    assert (config.epochs, config.optimizer, config.lr) == (50.0, "sgd", 0.5)
    assert load_config("configs/quickstart.py:sgd,vitp").model == "vitp_tiny"
    assert load_config("configs/quickstart.py:optimizer=adamw,model=vitc_tiny,seed=1").seed == 1
    config = load_config("configs/quickstart.py:mean=(0.1, 0.2,0.3),seed=3")
    assert (config.mean, config.seed) == ((0.1, 0.2, 0.3), 3)
    config = load_config("configs/study.py:lengths=[1.0, 2.0],num_seeds=5")
    assert (config.lengths, config.num_seeds) == ((1.0, 2.0), 5)
    rows = ("vitp_tiny", "sgd", 0.1, 1e-4), ("vitc_tiny", "sgd", 0.2, 1e-4)
    config = load_config(f"configs/study.py:cpu,optima={rows},num_seeds=5")
    assert (config.optima, config.num_seeds, config.num_random) == (rows, 5, 32)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("configs/vitc.py:17gf", "'17gf' .* is none of 4gf, 1gf"),
        ("configs/vitc.py:1gf,18gf", "'1gf' and '18gf' .* give one"),
        ("configs/vitc.py:optimizer=sgd", "optimizer=sgd would keep lr=0.001 and wd=0.24 of adamw"),
        ("configs/vitc.py:model=regnety_16gf,lr=1,wd=0", "is made for 256 pixels and this .* 224"),
        ("configs/vitc.py:epocs=3", "unknown config field 'epocs': did you mean 'epochs'"),
        ("configs/study.py:optimizer=sgd", "unknown config field 'optimizer'"),
        ("configs/vitc.py:epochs=many", "config.epochs=many: it must be a number"),
        ("configs/vitc.py:36gf,sgd", "the paper has no setting of sgd for vitc_36gf"),
        ("configs/vitc.py:1gf,sgd,peak", "the paper has no peak of sgd for vitc_1gf"),
        ("configs/vitc.py:18gf,s2", "there is no model vitc_18gf_s2"),
        ("configs/vitp.py:s2", "'s2' .* is none of 4gf"),
        ("configs/vitc.py:mean=(0.1,0.2,lr=1", "a bracket of .* has no partner"),
        ("configs/none.py", "configs/none.py is not there, seen from /"),
        ("README.md", "README.md is not a Python file"),
        ("tests/__init__.py", r"has no function get_config\(arg\)"),
        ("configs/vitc", "did you mean configs/vitc.py"),
        ("quickstart", "did you mean configs/quickstart.py"),
        ("configs/vitc.py:epochs=3,wd=0,epochs=4", "sets epochs twice"),
        ("configs/vitc.py:optimizer=sgd,lr=0.5", "would keep wd=0.24 of adamw"),
        ("quickstart.py:sgd", "did you mean configs/quickstart.py"),
        ("configs/vitc.py:workdir=runs/a", "give --workdir FOLDER"),
        ("configs/vitc.py:worker=3", "did you mean 'num_workers'"),
    ],
)
def test_wrong_arguments_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        load_config(spec)


def test_a_file_in_any_folder_may_use_ours(tmp_path, monkeypatch):
    """As `configs`, where the package alone is installed; without that, modules are not found."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd())])
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "own.py").write_text(
        "from configs import quickstart\n\n"
        "def get_config(arg):\n    config = quickstart.get_config(arg)\n"
        "    config.epochs = 2.5\n    return config\n"
    )
    before = list(sys.path)
    assert load_config(f"{tmp_path}/own.py").epochs == 2.5 and sys.path == before

    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/shared.py").write_text("from ml_collections import ConfigDict as Config")
    (tmp_path / "configs/own.py").write_text(
        "from configs import shared\n\ndef get_config(arg):\n    return shared.Config({'lr': 7})\n"
    )
    assert load_config(f"{tmp_path}/configs/own.py").lr == 7, "another project's configs"


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("lr", "5e-4", 5e-4),
        ("epochs", "3", 3.0),
        ("batch_size", "96", 96),
        ("flip", "False", False),
        ("model", "vitp_1gf", "vitp_1gf"),
        ("mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
    ],
)
def test_text_takes_the_type_of_the_field(name, text, value):
    config = load_config("configs/quickstart.py")
    set_field(config, name, text)
    assert config[name] == value and type(config[name]) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("lrr", "1", "unknown config field 'lrr': did you mean 'lr'"),
        ("learning_rate", "1", "unknown config field 'learning_rate': did you mean 'lr'"),
        ("lerning_rate", "1", "unknown config field 'lerning_rate': did you mean 'lr'"),
        ("a.b", "1", "unknown config field 'a.b'"),
        ("batch_size", "1.5", "config.batch_size=1.5: it must be a whole number"),
        ("batch_size", "0", "config.batch_size=0: it must be a whole number of 1 or more"),
        ("lr", "nan", "config.lr=nan: it must be a number above 0"),
        ("lr", "inf", "config.lr=inf: it must be a number above 0"),
        ("lr", "-1", "config.lr=-1.0: it must be a number above 0"),
        ("lr", "fast", "config.lr=fast: it must be a number"),
        ("flip", "maybe", "config.flip=maybe: it must be true or false"),
        ("mean", "(3, 'a', 1)", "config.mean=.*three numbers between 0 and 1"),
        ("mean", "(0.1, 0.2)", "config.mean=.*three numbers between 0 and 1"),
        ("mean", "0.5", "config.mean=0.5: it must be such as"),
        ("optimizer", "lion", "config.optimizer='lion': it must be one of adamw, sgd"),
        ("model", "vitc_tny", "did you mean 'vitc_tiny'"),
        ("model", "vit_b", "config.model='vit_b': it must be one of vitp_1gf"),
        ("warmup_epochs", "500", "config.warmup_epochs=500.0 is not below config.epochs"),
        ("eval_resize", "8", "config.eval_resize=8 is below config.image_size=32"),
        ("seed", "-1", "config.seed=-1: it must be from 0"),
        ("epochs", "1e308", "config.epochs=1e.308: it must be a number above 0, to a million"),
        ("ema_every", "3000000000", "config.ema_every=3000000000: it must be from 1 to"),
        ("data_dir", "a\0b", "config.data_dir=.*it must be a text"),
    ],
)
def test_wrong_values_are_refused(name, text, message):
    config = load_config("configs/quickstart.py")
    with pytest.raises(ConfigError, match=message):
        set_field(config, name, text)
        validate(config)


@pytest.mark.parametrize(
    "name, value",
    [("lr", "1e-3"), ("lr", None), ("batch_size", 64.0), ("flip", "no"), ("seed", True)],
)
def test_types_of_a_configuration_file_are_checked(name, value):
    config = load_config("configs/quickstart.py").copy_and_resolve_references().unlock()
    del config[name]
    config[name] = value
    with pytest.raises(ConfigError, match=f"config.{name}=.*it must be"):
        validate(config)


@pytest.mark.parametrize("name, text", [("optimizer", "sgd"), ("model", "vitp_1gf")])
def test_a_model_or_optimizer_brings_its_learning_rate_and_weight_decay(name, text):
    config = load_config("configs/vitc.py")
    with pytest.raises(
        ConfigError, match=f"config.{name}={text} would keep wd=0.24 of .* give lr and wd too"
    ):
        set_fields(config, {name: text, "lr": "1"})
    set_fields(config, {name: text, "lr": "1", "wd": "2e-5"})
    assert (config[name], config.lr, config.wd) == (text, 1.0, 2e-5)


def test_a_configuration_without_a_field_or_with_an_unknown_one_is_refused():
    config = load_config("configs/quickstart.py").unlock()
    del config.lr
    with pytest.raises(ConfigError, match="has no field 'lr'"):
        validate(config)
    config.lr, config.learning_rate = 1e-3, 1e-3
    with pytest.raises(ConfigError, match="unknown config field 'learning_rate'"):
        validate(config)


def test_a_configuration_of_a_study_is_refused():
    with pytest.raises(ConfigError, match="a study's: give it to python -m convstem_jax.study"):
        validate(load_config("configs/study.py"))
