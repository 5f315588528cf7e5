"""RegNetY, the paper's CNN baseline, on ImageNet-1k.

    python -m convstem_jax.main --config configs/regnety.py                  RegNetY-4GF, SGD
    python -m convstem_jax.main --config configs/regnety.py:16gf             1gf, 4gf, 16gf or 32gf
    python -m convstem_jax.main --config configs/regnety.py:1gf,adamw        AdamW
    python -m convstem_jax.main --config configs/regnety.py:4gf,epochs=50    any field

Top-1 error in the paper's Table 2 after 100 epochs: 1GF 23.2, 4GF 19.4, 16GF 17.1, 32GF 16.2.
Not yet run here.
"""

from configs import common


def get_config(arg: str = ""):
    """See the module's docstring for `arg`."""
    sizes = ("4gf", "1gf", "16gf", "32gf")
    return common.imagenet("regnety", arg, sizes=sizes, optimizers=("sgd", "adamw"))
