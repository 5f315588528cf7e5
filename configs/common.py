"""Every field of a configuration, with the paper's values (section 4), and the argument string."""

import ml_collections

from convstem_jax.config import set_fields, split_argument
from convstem_jax.errors import ConfigError
from convstem_jax.models import MODELS
from convstem_jax.optim import OPTIMIZERS

# Learning rate and weight decay of section 6, for the best error after 100 to 400 epochs.
# The paper trains 72GF only on ImageNet-21k. (The authors' files have 7e-4 and 0.24 for 36GF; for
# 72GF 1.2e-3, for a batch of 4,096, and 0.28.)
PEAK = {
    ("vitp_1gf", "adamw"): (1e-3, 0.24),
    ("vitp_4gf", "adamw"): (1e-3, 0.24),
    ("vitp_18gf", "adamw"): (1e-3, 0.24),
    ("vitp_36gf", "adamw"): (6e-4, 0.28),
    ("vitc_1gf", "adamw"): (1e-3, 0.24),
    ("vitc_4gf", "adamw"): (1e-3, 0.24),
    ("vitc_18gf", "adamw"): (1e-3, 0.24),
    ("vitc_36gf", "adamw"): (6e-4, 0.28),
    ("regnety_1gf", "sgd"): (2.54, 2.4e-5),
    ("regnety_4gf", "sgd"): (2.54, 2.4e-5),
    ("regnety_16gf", "sgd"): (2.54, 2.4e-5),
    ("regnety_32gf", "sgd"): (2.54, 2.4e-5),
}
# Of section 5 (Table 4), tuned at 50 epochs.
STABILITY = {
    ("vitp_1gf", "adamw"): (2e-3, 0.20),
    ("vitp_4gf", "adamw"): (2e-3, 0.20),
    ("vitp_18gf", "adamw"): (1e-3, 0.24),
    ("vitp_1gf", "sgd"): (1.9, 1.3e-5),
    ("vitp_4gf", "sgd"): (1.9, 1.3e-5),
    ("vitp_18gf", "sgd"): (1.1, 1.2e-5),
    ("vitc_1gf", "adamw"): (2.5e-3, 0.19),
    ("vitc_4gf", "adamw"): (1e-3, 0.24),
    ("vitc_18gf", "adamw"): (1e-3, 0.24),
    ("vitc_1gf", "sgd"): (1.9, 1.3e-5),
    ("vitc_4gf", "sgd"): (1.3, 2.2e-5),
    ("vitc_18gf", "sgd"): (1.1, 2.7e-5),
    ("regnety_1gf", "adamw"): (3.8e-3, 0.1),
    ("regnety_4gf", "adamw"): (3.8e-3, 0.1),
    ("regnety_16gf", "adamw"): (3.8e-3, 0.1),
    ("regnety_1gf", "sgd"): (2.54, 2.4e-5),
    ("regnety_4gf", "sgd"): (2.54, 2.4e-5),
    ("regnety_16gf", "sgd"): (2.54, 2.4e-5),
}
SETTINGS = {"peak": PEAK, "stability": STABILITY}

# Pixels of the short side before the centre crop, where not 256 (Table 2).
EVAL_RESIZE = {"regnety_1gf": 262, "regnety_4gf": 272, "regnety_16gf": 292, "regnety_32gf": 304}


def imagenet(
    family: str,
    arg: str,
    *,
    sizes: tuple[str, ...],
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
    variants: tuple[str, ...] = (),
) -> ml_collections.ConfigDict:
    """The paper's recipe on ImageNet-1k.

    Args:
        family: first part of the model's name: `vitp`, `vitc` or `regnety`.
        arg: size, optimiser, setting, variant and fields, in any order: `4gf`, `18gf,sgd`,
            `1gf,stability,epochs=50`, `4gf,s2`. By default the first size and optimiser, the
            setting `peak` where the paper has one and `stability` otherwise, and no variant.
        sizes: the sizes that there are.
        optimizers: of the family, its usual one first.
        variants: last parts of the model's name.

    Raises:
        ConfigError: a word of `arg` means nothing, or the paper has no such setting.
    """
    choices = sizes, optimizers, (None, *SETTINGS), (None, *variants)
    (size, optimizer, setting, variant), fields = parse(arg, *choices)
    config = base()
    plain = f"{family}_{size}"
    config.model = f"{plain}_{variant}" if variant else plain
    if config.model not in MODELS:
        raise ConfigError(f"there is no model {config.model}: leave out '{variant}' or the size")
    config.image_size = MODELS[plain].image_size
    config.eval_resize = EVAL_RESIZE.get(plain, 256)
    config.optimizer = optimizer
    for name in [setting] if setting else SETTINGS:
        if (plain, optimizer) in SETTINGS[name]:
            config.lr, config.wd = SETTINGS[name][plain, optimizer]
            break
    else:
        if not {"lr", "wd"} <= fields.keys():
            example = {"adamw": "lr=1e-3,wd=0.2", "sgd": "lr=1.1,wd=2e-5"}[optimizer]
            raise ConfigError(
                f"the paper has no {setting or 'setting'} of {optimizer} for {plain}: give both "
                f"lr and wd, as in '{size},{optimizer},{example}'"
            )
    set_fields(config, fields)
    return config


def parse(arg: str, *choices: tuple[str | None, ...]) -> tuple[list[str | None], dict[str, str]]:
    """Splits an argument such as `18gf,sgd,epochs=50`.

    Args:
        arg: words and FIELD=VALUE, in any order.
        choices: groups of words; of each group one may stand in `arg`, by default the first,
            which may be None.

    Returns:
        The chosen word of each group, and the fields.

    Raises:
        ConfigError: a word is in no group, or two are in one.
    """
    words, fields = split_argument(arg)
    known = [word for group in choices for word in group if word]
    for word in words:
        if word not in known:
            raise ConfigError(
                f"'{word}' in the config's argument '{arg}' is none of {', '.join(known)}, nor "
                "FIELD=VALUE"
            )
    chosen = []
    for group in choices:
        given = [word for word in words if word in group]
        if len(given) > 1:
            raise ConfigError(
                f"'{given[0]}' and '{given[1]}' in the config's argument '{arg}': give one"
            )
        chosen.append(given[0] if given else group[0])
    return chosen, fields


def base() -> ml_collections.ConfigDict:
    """The fields that all configurations share."""
    config = ml_collections.ConfigDict()

    # Model
    config.model = "vitc_4gf"  # a key of convstem_jax.models.MODELS
    # Of the computation: bfloat16 or float32; parameters are float32. GPUs multiply float32 as TF32
    # and TPUs as bfloat16, unless JAX_DEFAULT_MATMUL_PRECISION=highest says otherwise.
    config.dtype = "bfloat16"
    config.stem_init = "paper"  # of the convolutional stem: "paper", or the authors' "later" one
    # Run's folder or file of convstem_jax.convert to start from, also for another image size or
    # other classes; "" for random weights.
    config.init_from = ""

    # Optimisation
    config.optimizer = "adamw"  # adamw or sgd
    config.lr = 1e-3  # base learning rate, for the whole batch
    config.wd = 0.24  # weight decay
    config.batch_size = 2048  # over all devices
    # Micro-batches whose gradients one update averages, to save memory. BatchNorm then uses each
    # micro-batch's statistics; its running ones are updated, and gradients summed over devices,
    # once for each.
    config.accumulate = 1
    # "replicated" on every device, or "fsdp": parameters, optimiser and EMA are split over the
    # devices, to save memory.
    config.state_sharding = "replicated"
    config.epochs = 100.0
    config.warmup_epochs = 5.0
    config.label_smoothing = 0.1
    config.mixup_alpha = 0.8  # mixup or CutMix, drawn for each batch; 0 for none
    config.cutmix_alpha = 1.0
    config.lighting_std = 0.1  # of the three principal components of colour
    config.ema_alpha = 1e-5  # per example and epoch: see optim.ema_rate
    config.ema_every = 32  # steps between two updates of the EMA
    config.seed = 0  # of the initialisation and of mixing
    config.data_seed = -1  # of the order of the data and of augmentation; -1 for the same as `seed`

    # Data
    config.dataset = "imagenet2012"
    config.data_dir = "~/tensorflow_datasets"
    config.train_split = "train"
    config.eval_split = "validation"
    config.image_size = 224
    config.eval_resize = 256  # short side before the centre crop
    config.min_crop_area = 0.08  # of the random resized crop; 1.0 for the centre crop
    config.flip = True
    config.auto_augment = True
    config.mean = (0.485, 0.456, 0.406)  # of the channels, in [0, 1]
    config.std = (0.229, 0.224, 0.225)

    # Input speed; none of these changes a batch. For each worker a host holds 2 + 2 * read_ahead
    # batches in shared memory (/dev/shm), and max(num_threads, read_ahead) in the worker, for
    # training and again for evaluation: with these values 2 x 16 x 5 batches, or 49 GB if one
    # host has all of 2048 x 224 x 224. The devices together hold 1.2 GB of images for the precise
    # statistics.
    # Worker processes that decode, and up to as many again for evaluation, one per batch of it:
    # at most one a core; 0 for threads.
    config.num_workers = 16
    config.num_threads = 1  # batches that a worker makes at once
    config.read_ahead = 1  # batches ready on the host, for each worker
    config.prefetch = 2  # batches ready on the devices, beside those of steps under way

    # Evaluation and records
    config.eval_batch_size = 2048
    config.eval_every_epochs = 5.0
    # Training examples whose BatchNorm statistics replace the running ones before an evaluation,
    # an epoch at most.
    config.precise_bn_examples = 8192
    config.log_every_steps = 100
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # latest ones, beside the best
    config.profile_step = 0  # first of the five steps to profile; 0 for none
    return config
