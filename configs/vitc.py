"""ViT_C, the paper's convolutional stem, on ImageNet-1k.

    python -m convstem_jax.main --config configs/vitc.py                  ViT_C-4GF, AdamW
    python -m convstem_jax.main --config configs/vitc.py:1gf              1gf, 4gf, 18gf, 36gf
    python -m convstem_jax.main --config configs/vitc.py:72gf,lr=6e-4,wd=0.28
    python -m convstem_jax.main --config configs/vitc.py:18gf,sgd         SGD
    python -m convstem_jax.main --config configs/vitc.py:1gf,stability    lr and wd of section 5
    python -m convstem_jax.main --config configs/vitc.py:4gf,epochs=50    any field
    python -m convstem_jax.main --config configs/vitc.py:4gf,s2           S1 to S4 of Table 3
    python -m convstem_jax.main --config configs/vitc.py:4gf,ln           LayerNorm (Figure 7)
    python -m convstem_jax.main --config configs/vitc.py:4gf,deep         47 blocks (Figure 8)

72GF, in the paper only on ImageNet-21k, and 36GF with SGD need lr and wd. The example has
36GF's with AdamW.

Top-1 error in the paper's Table 2 after 100 epochs: 1GF 28.6, 4GF 20.9, 18GF 18.4, 36GF 18.3.
Not yet run here.
"""

from configs import common


def get_config(arg: str = ""):
    """See the module's docstring for `arg`."""
    sizes = ("4gf", "1gf", "18gf", "36gf", "72gf")
    return common.imagenet(
        "vitc", arg, sizes=sizes, variants=("s1", "s2", "s3", "s4", "ln", "deep")
    )
