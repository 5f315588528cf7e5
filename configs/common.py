"""Every field of a configuration, with the paper's values (section 4), and the argument string."""

import ml_collections

from convstem_jax.config import set_fields
from convstem_jax.errors import ConfigError

SIZES = ("4gf", "1gf", "18gf", "36gf", "72gf")  # the first is the default
OPTIMIZERS = ("adamw", "sgd")

# Learning rate and weight decay. AdamW: section 6; SGD: section 5, tuned at 50 epochs (Table 4).
# The paper trains 36GF and 72GF with AdamW only, and 72GF only on ImageNet-21k.
SETTINGS = {
    ("vitp", "1gf", "adamw"): (1e-3, 0.24),
    ("vitp", "4gf", "adamw"): (1e-3, 0.24),
    ("vitp", "18gf", "adamw"): (1e-3, 0.24),
    ("vitp", "36gf", "adamw"): (6e-4, 0.28),
    ("vitp", "1gf", "sgd"): (1.9, 1.3e-5),
    ("vitp", "4gf", "sgd"): (1.9, 1.3e-5),
    ("vitp", "18gf", "sgd"): (1.1, 1.2e-5),
    ("vitc", "1gf", "adamw"): (1e-3, 0.24),
    ("vitc", "4gf", "adamw"): (1e-3, 0.24),
    ("vitc", "18gf", "adamw"): (1e-3, 0.24),
    ("vitc", "36gf", "adamw"): (6e-4, 0.28),
    ("vitc", "1gf", "sgd"): (1.9, 1.3e-5),
    ("vitc", "4gf", "sgd"): (1.3, 2.2e-5),
    ("vitc", "18gf", "sgd"): (1.1, 2.7e-5),
}


def imagenet(family: str, arg: str) -> ml_collections.ConfigDict:
    """The paper's recipe on ImageNet-1k for `family`, `vitp` or `vitc`.

    Args:
        family: first half of the model's name.
        arg: size, optimiser and fields, in any order: `4gf`, `18gf,sgd`, `1gf,epochs=50`. Without
            them: 4gf, adamw.

    Raises:
        ConfigError: a word of `arg` means nothing, or the paper has no such setting.
    """
    (size, optimizer), fields = parse(arg, SIZES, OPTIMIZERS)
    config = base()
    config.model = f"{family}_{size}"
    config.optimizer = optimizer
    if (family, size, optimizer) in SETTINGS:
        config.lr, config.wd = SETTINGS[family, size, optimizer]
    elif not {"lr", "wd"} <= fields.keys():
        raise ConfigError(
            f"the paper has no {optimizer} setting for {family} {size}: give both, as in "
            f"'{size},{optimizer},lr=1.1,wd=2e-5'"
        )
    set_fields(config, fields)
    return config


def parse(arg: str, *choices: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Splits an argument such as `18gf,sgd,epochs=50`.

    Args:
        arg: words and FIELD=VALUE, in any order.
        choices: groups of words; of each group one may stand in `arg`, by default the first.

    Returns:
        The chosen word of each group, and the fields.

    Raises:
        ConfigError: a word is in no group, or two are in one.
    """
    chosen, taken, fields = [group[0] for group in choices], set(), {}
    for part in filter(None, (part.strip() for part in arg.split(","))):
        name, equals, value = part.partition("=")
        if equals:
            fields[name] = value
            continue
        for i, group in enumerate(choices):
            if part in group:
                if i in taken:
                    raise ConfigError(
                        f"'{part}' and '{chosen[i]}' in the config's argument '{arg}': give one"
                    )
                chosen[i] = part
                taken.add(i)
                break
        else:
            known = ", ".join(word for group in choices for word in group)
            raise ConfigError(
                f"'{part}' in the config's argument '{arg}' is none of {known}, nor FIELD=VALUE"
            )
    return chosen, fields


def base() -> ml_collections.ConfigDict:
    """The fields that all configurations share."""
    config = ml_collections.ConfigDict()

    # Model
    config.model = "vitc_4gf"  # a key of convstem_jax.models.MODELS
    config.dtype = "bfloat16"  # of the computation: bfloat16 or float32; parameters are float32

    # Optimisation
    config.optimizer = "adamw"  # adamw or sgd
    config.lr = 1e-3  # base learning rate, for the whole batch
    config.wd = 0.24  # weight decay
    config.batch_size = 2048  # over all devices
    # Micro-batches whose gradients one update averages, where memory is short. BatchNorm then uses
    # the statistics of each micro-batch, and its running ones move once for each.
    config.accumulate = 1
    config.epochs = 100.0
    config.warmup_epochs = 5.0
    config.label_smoothing = 0.1
    config.ema_alpha = 1e-5  # per example and epoch: see optim.ema_rate
    config.ema_every = 32  # steps between two updates of the EMA
    config.seed = 0  # of the initialisation, the order of the data and the augmentation

    # Data
    config.dataset = "imagenet2012"
    config.data_dir = "~/tensorflow_datasets"
    config.train_split = "train"
    config.eval_split = "validation"
    config.image_size = 224
    config.eval_resize = 256  # short side before the centre crop
    config.min_crop_area = 0.08  # of the random resized crop; 1.0 for the centre crop
    config.flip = True
    config.mean = (0.485, 0.456, 0.406)  # of the channels, in [0, 1]
    config.std = (0.229, 0.224, 0.225)

    # Input speed; no batch depends on it. The host holds about (2 + read_ahead) batches for each
    # worker, for training and again for evaluation: 0.3 GB each at 2048 x 224 x 224.
    config.num_workers = 16  # processes that decode: about one a core; 0 for threads instead
    config.num_threads = 1  # batches made at the same time in each of them
    config.read_ahead = 1  # batches ready on the host, for each of them
    config.prefetch = 2  # batches ready on the devices

    # Evaluation and records
    config.eval_batch_size = 2048
    config.eval_every_epochs = 5.0
    config.log_every_steps = 100
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # latest ones, beside the best
    return config
