"""ViT_C, the paper's convolutional stem, on ImageNet-1k.

    python -m convstem_jax.main --config configs/vitc.py                  ViT_C-4GF, AdamW
    python -m convstem_jax.main --config configs/vitc.py:1gf              1gf, 4gf, 18gf or 36gf
    python -m convstem_jax.main --config configs/vitc.py:18gf,sgd         SGD
    python -m convstem_jax.main --config configs/vitc.py:4gf,epochs=50    any field
    python -m convstem_jax.main --config configs/vitc.py --config.lr=5e-4

Top-1 error in the paper's Table 2 after 100 epochs: 1GF 28.6, 4GF 20.9, 18GF 18.4, 36GF 18.3.
Not yet run here; of the paper's recipe AutoAugment, mixup, CutMix and precise BatchNorm statistics
are not there yet.
"""

from configs import common


def get_config(arg: str = ""):
    """See the module's docstring for `arg`."""
    return common.imagenet("vitc", arg)
