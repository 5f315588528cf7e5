"""ViT_P, the patchify stem of the original ViT, on ImageNet-1k: the paper's baseline.

    python -m convstem_jax.main --config configs/vitp.py                  ViT_P-4GF, AdamW
    python -m convstem_jax.main --config configs/vitp.py:1gf              1gf, 4gf, 18gf, 36gf
    python -m convstem_jax.main --config configs/vitp.py:72gf,lr=6e-4,wd=0.28
    python -m convstem_jax.main --config configs/vitp.py:18gf,sgd         SGD
    python -m convstem_jax.main --config configs/vitp.py:1gf,stability    lr and wd of section 5
    python -m convstem_jax.main --config configs/vitp.py:4gf,epochs=50    any field
    python -m convstem_jax.main --config configs/vitp.py:4gf,bn           BN and ReLU (Figure 7)
    python -m convstem_jax.main --config configs/vitp.py:4gf,deep         48 blocks (Figure 8)

72GF, in the paper only on ImageNet-21k, and 36GF with SGD need lr and wd. The example has
36GF's with AdamW.

Top-1 error in the paper's Table 2 after 100 epochs: 1GF 33.2, 4GF 23.3, 18GF 19.9, 36GF 19.9.
Not yet run here.
"""

from configs import common


def get_config(arg: str = ""):
    """See the module's docstring for `arg`."""
    sizes = ("4gf", "1gf", "18gf", "36gf", "72gf")
    return common.imagenet("vitp", arg, sizes=sizes, variants=("bn", "deep"))
