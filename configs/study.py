"""The stability study (section 5): six experiments on ViT_P, ViT_C and a CNN, and their verdicts.

    python -m convstem_jax.study --config configs/study.py            10 minutes on 2 CPU cores
    python -m convstem_jax.study --config configs/study.py:cpu        an hour or more
    python -m convstem_jax.study --config configs/study.py:full       one large GPU
    python -m convstem_jax.study --config configs/study.py:imagenet   the 4GF models
    python -m convstem_jax.study --config configs/study.py:full,colour,num_seeds=5

`quick`, the first, runs all experiments with few trials on a part of the embedded data:
it shows that everything works, but has too few to decide a claim. `cpu` has enough: results/study
holds `cpu,num_seeds=6`, 68 minutes on 2 cores of an Intel Xeon. `full` and `imagenet` have not been
run yet; the latter has the paper's optima and intervals. `colour` is the harder set of
`convstem_jax.study.colour_set`, in place of the grey Fashion-MNIST.
"""

from configs import common, quickstart
from convstem_jax.config import set_fields
from convstem_jax.errors import ConfigError


def get_config(arg: str = ""):
    """`arg` holds quick, cpu, full or imagenet, grey or colour, and FIELD=VALUE."""
    scales = ("quick", "cpu", "full", "imagenet")
    (scale, colours), fields = common.parse(arg, scales, ("grey", "colour"))
    config = common.base() if scale == "imagenet" else quickstart.get_config()

    # The study sets them for each trial.
    own = ("model", "optimizer", "epochs", "lr", "wd", "seed", "warmup_epochs", "eval_every_epochs")
    own += ("init_from", "state_sharding", "profile_step")
    for name in (*own, "num_threads", "prefetch", "keep_checkpoints"):
        del config[name]

    config.experiments = ("length", "optimizer", "lr_wd", "stems", "norms", "depth")
    config.vitp = "vitp_tiny"  # the models to compare; their variants are named after them
    config.vitc = "vitc_tiny"
    config.cnn = "regnety_tiny"
    config.cnn_image_size, config.cnn_eval_resize = 32, 32
    config.lengths = (5.0, 10.0, 20.0, 40.0)  # epochs; most experiments use the first alone
    config.warmup_share = 0.1  # of the shortest length, for all of them
    config.evals_of_shortest = 2  # evaluations in it; longer ones have as many an epoch
    config.num_seeds = 4  # of every comparison at one setting; fewer decide nothing
    config.num_random = 64  # settings drawn for each model and optimiser, in `lr_wd` and `depth`
    # "own": they lie around each model's own optimum, as wide as the paper's; or "paper".
    config.intervals = "own"
    config.optima = ()  # (model, optimiser, learning rate, weight decay) of those that are known
    # The coarse grid from which each other optimum is taken: factors to these centres.
    config.grid_factors = (0.25, 1.0, 4.0)
    config.grid_seeds = 3  # of each point; the best points lie as close together as seeds do
    config.max_widenings = 2  # times that a grid grows where its best point is on the edge
    config.adamw_center = (2e-3, 0.2)  # learning rate, weight decay
    config.sgd_center = (0.1, 5e-4)
    config.memory_gb = 0.0  # of each device to use; 0 for nine tenths of what it has
    config.host_memory_gb = 8.0  # to keep batches in, which the next population reads again
    config.data_seed = 0  # one order for all trials, which read the same batches

    if scale == "quick":
        config.train_split = "train[:1000]"
        config.eval_split = "test[:500]"
        config.batch_size = 32
        config.ema_alpha = 1.28e-2  # the paper's 1e-5, for 1,281 times fewer examples
        config.ema_every = 4
        config.lengths = (3.0, 6.0)
        config.grid_seeds = 1
        config.max_widenings = 0
        config.num_seeds = 2
        config.num_random = 4
    elif scale == "cpu":
        config.train_split = "train[:3000]"
        config.batch_size = 32
        config.ema_alpha = 4.27e-3  # the same, for 427 times fewer
        config.ema_every = 4
        config.lengths = (4.0, 8.0, 16.0)
        config.num_random = 32
    elif scale == "full":
        config.dataset = "fashion_mnist"
        config.ema_alpha = 2.1e-4  # the same, for 21 times fewer
        config.batch_size = 256
        config.eval_batch_size = 2000
        config.dtype = "bfloat16"
        config.num_workers = 8
    else:
        config.vitp, config.vitc, config.cnn = "vitp_4gf", "vitc_4gf", "regnety_4gf"
        config.cnn_image_size, config.cnn_eval_resize = 240, 272
        config.optima = tuple((*pair, *best) for pair, best in common.STABILITY.items())
        config.intervals = "paper"
        config.grid_seeds = 1
        config.accumulate = 4  # a trial has one device for its whole batch
        config.lengths = (50.0, 100.0, 200.0, 400.0)
        config.sgd_center = (1.9, 2e-5)
    if colours == "colour":
        if scale == "imagenet":
            raise ConfigError("'imagenet' has colours already: leave out 'colour'")
        config.dataset = config.dataset.replace("mnist", "photos")
        config.mean = (0.513, 0.473, 0.364)
        config.std = (0.254, 0.248, 0.268)
    set_fields(config, fields)
    return config
