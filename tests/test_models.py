"""Models against the paper: sizes, numerics (torch.nn), initialisation, errors."""

import dataclasses
import functools
import itertools
import math

from flax import nnx
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest
import torch

from convstem_jax import layouts
from convstem_jax.models import attention, create_model, stems
from convstem_jax.models.vit import VITS, ViT
from convstem_jax.sharding import Sharding
from convstem_jax.step import split_model
from tests.networks import abstract, images_of, random_model, torchvision_network

# Table 1, and the number of parameters that follows from it with 1000 classes.
# fmt: off
TABLE_1 = {  # width, MLP dim, heads, blocks of P and C, parameters of P and C
    "1gf": (192, 576, 3, 12, 11, 4_830_376, 4_567_936),
    "4gf": (384, 1152, 6, 12, 11, 18_507_112, 17_754_136),
    "18gf": (768, 3072, 12, 12, 11, 86_567_656, 81_573_160),
    "36gf": (1024, 4096, 16, 14, 13, 178_364_392, 167_796_008),
    "72gf": (1152, 4608, 18, 22, 22, 352_954_216, 354_949_288),
}
# fmt: on
STEM_18GF = ((64, 128, 128, 256, 256, 512), (2, 2, 1, 2, 1, 2))
STEMS = {  # channels and strides of the 3x3 convolutions
    "1gf": ((24, 48, 96, 192), (2, 2, 2, 2)),
    "4gf": ((48, 96, 192, 384), (2, 2, 2, 2)),
    "18gf": STEM_18GF,
    "36gf": STEM_18GF,
    "72gf": STEM_18GF,
}


def num_params(model):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", TABLE_1)
def test_table_1(size):
    width, mlp_dim, heads, depth_p, depth_c, params_p, params_c = TABLE_1[size]
    p, c = VITS[f"vitp_{size}"], VITS[f"vitc_{size}"]
    for spec in p, c:
        assert (spec.width, spec.mlp_dim, spec.num_heads) == (width, mlp_dim, heads)
        assert (spec.patch_size, spec.image_size) == (16, 224)
    assert (p.depth, c.depth) == (depth_p, depth_c)
    assert (p.stem_channels, p.stem_strides) == ((), ())
    assert (c.stem_channels, c.stem_strides) == STEMS[size]
    assert num_params(abstract(f"vitp_{size}")) == params_p
    assert num_params(abstract(f"vitc_{size}")) == params_c


@pytest.mark.parametrize("size", [*TABLE_1, "tiny"])
def test_both_stems_reach_the_same_grid(size):
    spec = VITS[f"vitp_{size}"]
    images = jnp.zeros((2, spec.image_size, spec.image_size, 3))

    def grid(name):
        stem = lambda: create_model(name, depth=0, rngs=nnx.Rngs(0)).stem(images)  # noqa: E731
        return nnx.eval_shape(stem).shape

    side = spec.image_size // spec.patch_size
    assert grid(f"vitp_{size}") == grid(f"vitc_{size}") == (2, side, side, spec.width)


@pytest.mark.parametrize("size", ["1gf", "4gf", "18gf", "tiny"])
def test_the_convolutional_stem_replaces_one_block_of_about_its_cost(size):
    """Except in 36GF, whose stem is 18GF's, and 72GF, which keeps its 22 blocks."""
    spec = VITS[f"vitc_{size}"]
    d, side = spec.width, spec.image_size
    stem = 0  # multiply-adds
    channels = (3, *spec.stem_channels)
    for (c_in, c_out), stride in zip(itertools.pairwise(channels), spec.stem_strides, strict=True):
        side //= stride
        stem += side**2 * 9 * c_in * c_out
    stem += side**2 * channels[-1] * d
    t = side**2 + 1
    block = t * 4 * d**2 + 2 * t**2 * d + t * 2 * d * spec.mlp_dim
    # The paper's own: 1.29 at 1GF, 1.36 at 4GF, 1.18 at 18GF.
    assert 0.8 < stem / block < 1.4
    assert spec.depth == VITS[f"vitp_{size}"].depth - 1


def test_other_image_and_patch_sizes():
    def logits():
        model = create_model(
            "vitp_1gf", image_size=32, patch_size=4, num_classes=7, rngs=nnx.Rngs(0)
        )
        assert model.position_embedding.shape == (1, 1 + 8 * 8, 192)
        return model(jnp.zeros((2, 32, 32, 3)))

    assert nnx.eval_shape(logits).shape == (2, 7)


# ---------------------------------------------------------------------------------- numerics


def test_keys_are_those_of_flax():
    """`_Keys` counts differently; the keys, and what the stream gives next, must be the same."""
    rngs = nnx.Rngs(3, params=4), nnx.Rngs(3, params=4)
    for _ in range(2):
        ours = create_model("vitc_tiny", depth=1, rngs=rngs[0])
        spec = dataclasses.replace(VITS["vitc_tiny"], depth=1)
        theirs = ViT(spec, num_classes=1000, dtype=jnp.float32, rngs=rngs[1])
        jax.tree.map(
            np.testing.assert_array_equal, nnx.state(ours, nnx.Param), nnx.state(theirs, nnx.Param)
        )
    assert rngs[0].params() == rngs[1].params()


def test_a_new_model_is_for_evaluation():
    """Calling `model(images)` in a notebook must not move the statistics."""
    model, images = random_model("vitc_tiny", depth=0), jnp.array(images_of(4, 32))
    together = model(images)
    np.testing.assert_allclose(model(images[:1]), together[:1], atol=1e-5)


def to_torch(images):
    return torch.tensor(np.array(images)).permute(0, 3, 1, 2)


# Four heads, so that heads and query, key and value cannot be mixed up unnoticed.
NETWORKS = {
    "vitp_tiny": {"depth": 2, "num_heads": 4},
    "vitc_tiny": {"depth": 2, "num_heads": 4},
    "regnety_tiny": {"depths": (1, 2, 2)},
}
# Blocks are alike, and so are pixels: fewer of them take much less time.
SMALLER = {"regnety_1gf": {"image_size": 96}, "vitp_18gf": {"depth": 3}, "vitc_4gf": {"depth": 3}}


# torchvision's networks in widths of the paper, with its conv_stem_configs. The last in double
# precision: with two images, rounding alone changes torch's own float32 gradients by 6 %.
REAL_WIDTHS = [
    ("vitp_18gf", "eval", "float32"),
    ("vitc_4gf", "train", "float32"),
    ("regnety_1gf", "train", "float64"),
]


@pytest.mark.parametrize(
    "name, mode, dtype",
    [*itertools.product(NETWORKS, ["eval", "train"], ["float32"]), *REAL_WIDTHS],
)
def test_logits_gradients_and_statistics_are_torchvisions(name, mode, dtype):
    num = 8 if name in NETWORKS else 2
    with jax.enable_x64(dtype == "float64"):
        model = random_model(
            name, num_classes=10, dtype=dtype, **(NETWORKS | SMALLER).get(name, {})
        )
        getattr(model, mode)()
        images = images_of(num, model.spec.image_size).astype(dtype)
        labels = np.arange(num)
        graphdef, *arrays = split_model(model)
        params, batch_stats = jax.tree.map(lambda x: x.astype(dtype), arrays)

        def gradients(params, batch_stats):
            def loss(params):
                model = nnx.merge(graphdef, params, batch_stats)
                logits = model(images)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                return losses.mean(), (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

            return jax.grad(loss, has_aux=True)(params)

        gradients = Sharding(jax.devices()[:1]).jit(gradients)  # in the forms of training
        grads, (logits, new_stats) = jax.device_get(gradients(params, batch_stats))
        batch_stats = jax.device_get(batch_stats)
    network = torchvision_network(model).to(getattr(torch, dtype))
    getattr(network, mode)()
    old_state = {key: x.numpy().copy() for key, x in network.state_dict().items()}
    num_values = {}  # over which each BatchNorm computes its statistics
    for key, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output, key=key: num_values.update(
                    {key: output.numel() // output.shape[1]}
                )
            )
    logits_torch = network(to_torch(images))
    torch.nn.functional.cross_entropy(logits_torch, torch.tensor(labels)).backward()

    scale = logits_torch.std().item()
    assert scale > 0.1, "logits this small would agree whatever the model does"
    np.testing.assert_allclose(
        logits / scale, logits_torch.detach().numpy() / scale, atol=1e-4, err_msg="logits"
    )
    shapes = {"params": params, "batch_stats": batch_stats}
    state = {key: x.numpy() for key, x in network.state_dict().items()}
    state |= {key: x.grad.numpy() for key, x in network.named_parameters()}
    for key, num_in_batch in num_values.items():
        # torch takes the unbiased variance of the batch into the running one.
        before = old_state[f"{key}.running_var"]
        state[f"{key}.running_var"] = (
            0.9 * before
            + (state[f"{key}.running_var"] - 0.9 * before) * (num_in_batch - 1) / num_in_batch
        )
    expected = layouts.from_torch(state, shapes, "torchvision")
    for path, grad in jax.tree.leaves_with_path(grads):
        e = functools.reduce(lambda tree, key: tree[key.key], path, expected["params"])
        # Relative to the array, but for the bias of the key, whose exact gradient is 0.
        error = np.linalg.norm(grad - e) / max(np.linalg.norm(e), 1e-3 * scale)
        assert error < 1e-3, f"gradient of {jax.tree_util.keystr(path)}: {error:.1e}"
    if mode == "eval":
        jax.tree.map(np.testing.assert_array_equal, new_stats, batch_stats)
        return
    for path, new in jax.tree.leaves_with_path(new_stats):
        old, e = (
            functools.reduce(lambda tree, key: tree[key.key], path, tree)
            for tree in (batch_stats, expected["batch_stats"])
        )
        assert np.abs(new - old).max() > 1e-4, "the running statistics have to move"
        np.testing.assert_allclose(new, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vitp_18gf", "vitc_4gf"])
def test_all_blocks_are_torchvisions(name):
    """The tenth is not taken for the second, say: numbers tell them apart."""
    model = abstract(name, num_classes=10)
    _, params, batch_stats = split_model(model)
    state = {key: x.numpy() for key, x in torchvision_network(model).state_dict().items()}
    for i in range(model.spec.depth):
        state[f"encoder.layers.encoder_layer_{i}.ln_1.bias"][:] = i
    found = layouts.from_torch(
        state, {"params": params, "batch_stats": batch_stats}, "torchvision"
    )["params"]["blocks"]
    assert [block["norm1"]["bias"][0] for _, block in sorted(found.items())] == list(
        range(model.spec.depth)
    )


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_last_block_is_computed_for_the_class_token_alone(depth):
    """The same logits and gradients as of all tokens, which the paper counts, for less work."""
    model, images = random_model("vitp_tiny", depth=depth, num_classes=5), images_of(2, 32)
    graphdef, params, batch_stats = split_model(model)

    def logits(params, **kwargs):
        return nnx.merge(graphdef, params, batch_stats)(images, **kwargs)

    def gradients(params, **kwargs):
        return jax.grad(lambda p: (logits(p, **kwargs) ** 2).sum())(params)

    for function in logits, gradients:
        function = jax.jit(function, static_argnames="all_tokens")
        ours, full = function(params), function(params, all_tokens=True)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), ours, full
        )
    kernel = model.spec.width, model.spec.mlp_dim
    shapes = [
        eqn.invars[0].aval.shape
        for eqn in products(jax.make_jaxpr(logits)(params).jaxpr)
        if eqn.invars[1].aval.shape == kernel
    ]
    assert shapes == [(2, 17, 64)] * (depth - 1) + [(2, 1, 64)] * (depth > 0)


def test_norms_have_the_papers_epsilons():
    """With tokens and pixels of ordinary size a wrong one would not show."""
    modules = [m for name in NETWORKS for _, m in nnx.iter_modules(abstract(name))]
    assert {m.epsilon for m in modules if isinstance(m, nnx.LayerNorm)} == {1e-6}
    assert {m.epsilon for m in modules if isinstance(m, nnx.BatchNorm)} == {1e-5}
    assert {m.momentum for m in modules if isinstance(m, nnx.BatchNorm)} == {0.9}


def products(jaxpr):
    """All matrix products and convolutions, those of inner functions too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for inner in eqn.params.values():
            if hasattr(inner, "jaxpr"):
                yield from products(inner.jaxpr)


def test_bfloat16_is_for_computing_only():
    images = images_of(2, 32)

    def run():
        model = create_model("vitc_tiny", depth=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        model.train()  # the statistics are new ones
        logits = model(images)
        return logits, nnx.to_pure_dict(nnx.state(model))

    jaxpr, (logits, state) = jax.make_jaxpr(run, return_shape=True)()
    assert logits.dtype == jnp.float32
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32"}
    inputs = [{v.aval.dtype.name for v in eqn.invars} for eqn in products(jaxpr.jaxpr)]
    assert inputs == [{"bfloat16"}] * (4 + 8) + [{"float32"}], "stem and block, then the head"


IMAGES = jnp.zeros((2, 224, 224, 3))

# ---------------------------------------------------------------------------- initialisation


def assert_uniform(x, bound):
    x = np.array(x).ravel()
    assert 0.99 * bound < np.abs(x).max() <= bound * (1 + 1e-6)
    assert abs(x.mean()) < 5 * x.std() / math.sqrt(x.size)
    np.testing.assert_allclose(x.std(), bound / math.sqrt(3), rtol=3 / math.sqrt(x.size))


def assert_normal(x, std):
    x = np.array(x).ravel()
    assert abs(x.mean()) < 5 * std / math.sqrt(x.size)
    np.testing.assert_allclose(x.std(), std, rtol=5 / math.sqrt(2 * x.size))
    if x.size > 10_000:
        assert np.abs(x).max() > 3.2 * std, "tails are missing: uniform, or cut at 2 std?"


def assert_all(x, value):
    np.testing.assert_array_equal(x, value)


@pytest.mark.parametrize("name", ["vitp_1gf", "vitc_1gf"])
def test_initialisation_is_the_authors(name):
    """Their code of mid-2021."""
    d, mlp_dim = 192, 576
    model = create_model(name, depth=2, rngs=nnx.Rngs(0))
    stem = model.stem
    if name == "vitc_1gf":
        c_in = 3
        for conv, norm in zip(stem.convs, stem.norms, strict=True):
            assert conv.bias is None
            assert_uniform(conv.kernel[...], math.sqrt(1 / (9 * c_in)))
            c_in = conv.out_features
            assert_all([norm.scale[...], norm.var[...]], 1)
            assert_all([norm.bias[...], norm.mean[...]], 0)
        assert_normal(stem.projection.kernel[...], math.sqrt(2 / d))
    else:
        assert_normal(stem.projection.kernel[...], math.sqrt(1 / (3 * 16 * 16)))
    assert_all(stem.projection.bias[...], 0)
    assert_normal(model.position_embedding[...], 0.02)
    for block in model.blocks:
        assert_uniform(block.attention.qkv.kernel[...], math.sqrt(6 / (d + 3 * d)))
        assert_uniform(block.attention.out.kernel[...], 1 / math.sqrt(d))
        assert_uniform(block.mlp.fc1.kernel[...], math.sqrt(6 / (d + mlp_dim)))
        assert_uniform(block.mlp.fc2.kernel[...], math.sqrt(6 / (d + mlp_dim)))
        assert_normal(block.mlp.fc1.bias[...], 1e-6)
        assert_normal(block.mlp.fc2.bias[...], 1e-6)
        assert_all(block.attention.qkv.bias[...], 0)
        assert_all(block.attention.out.bias[...], 0)
    for norm in model.norm, *(n for block in model.blocks for n in (block.norm1, block.norm2)):
        assert_all(norm.scale[...], 1)
        assert_all(norm.bias[...], 0)
    for zero in model.class_token, model.head.kernel, model.head.bias:
        assert_all(zero[...], 0)
    a, b = (block.attention.qkv.kernel[...] for block in model.blocks)
    assert not np.array_equal(a, b), "blocks must not share a random key"


def test_later_initialisation_of_the_stem():
    """The authors' code of March 2022: normal, by the number of output channels."""
    stem = create_model("vitc_1gf", depth=0, stem_init="later", rngs=nnx.Rngs(0)).stem
    for conv in stem.convs:
        assert_normal(conv.kernel[...], math.sqrt(2 / conv.out_features))
    assert_normal(stem.projection.kernel[...], math.sqrt(1 / 192))


def test_initialisation_of_regnety_is_the_authors():
    model = create_model("regnety_tiny", widths=(96, 192), depths=(1, 2), rngs=nnx.Rngs(0))
    convs = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)]
    assert len(convs) == 1 + 4 + 4 + 3
    for conv in convs:
        fan_out = math.prod(conv.kernel_size) * conv.out_features  # whatever the groups
        assert conv.bias is None
        assert_normal(conv.kernel[...], math.sqrt(2 / fan_out))
    for block in (block for stage in model.stages for block in stage):
        assert_normal(block.se.fc1.kernel[...], math.sqrt(2 / block.se.fc1.out_features))
        assert np.abs(block.se.fc2.bias[...]).max() <= 1 / math.sqrt(block.se.fc2.in_features)
        assert block.se.fc1.out_features == round(0.25 * block.conv1.in_features)
        assert_all(block.norm3.scale[...], 1)  # no zero-gamma
    assert_normal(model.head.kernel[...], 0.01)
    assert_all(model.head.bias[...], 0)


@pytest.mark.parametrize(
    "name, kernels, norm",
    [
        ("vitc_4gf_s1", [3, 3, 3, 2], nnx.BatchNorm),
        ("vitc_4gf_s2", [3, 3, 3, 4], nnx.BatchNorm),
        ("vitc_4gf_s3", [3, 3, 3, 8], nnx.BatchNorm),
        ("vitc_4gf_s4", [3, 3, 3, 16], nnx.BatchNorm),
        ("vitc_4gf_ln", [3, 3, 3, 3], nnx.LayerNorm),
        ("vitp_4gf_bn", [], nnx.BatchNorm),
    ],
)
def test_variants_of_the_stems(name, kernels, norm):
    stem = abstract(name).stem
    norms = [m for _, m in nnx.iter_modules(stem) if isinstance(m, nnx.BatchNorm | nnx.LayerNorm)]
    assert {type(m) for m in norms} == {norm} and len(norms) == (len(kernels) or 1)
    if kernels:
        assert [conv.kernel_size[0] for conv in stem.convs] == kernels
        assert [conv.padding[0] for conv in stem.convs] == [(k == 3, k == 3) for k in kernels]
    shape = nnx.eval_shape(lambda: create_model(name, depth=0, rngs=nnx.Rngs(0)).stem(IMAGES)).shape
    assert shape == (2, 14, 14, 384)


def test_patchify_stem_with_norm_ends_in_relu():
    model = random_model("vitp_tiny", depth=0, stem_norm="batch")
    x = np.array(model.stem(jnp.array(images_of(2, 32))))
    assert x.min() == 0 and 0.2 < (x == 0).mean() < 0.8


def test_patchify_initialisation_is_cut_at_2_absolute():
    # A 1x1 patch, where 2 is 3.5 standard deviations: at 16x16 it is 55, and no draw gets there.
    stem = stems.PatchifyStem(1, 100_000, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = np.array(stem.projection.kernel[...])
    assert 1.97 < np.abs(kernel).max() <= 2
    np.testing.assert_allclose(kernel.std(), math.sqrt(1 / 3), rtol=0.01)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vitc_5gf", {}, "'vitc_5gf'.*vitc_4gf"),
        ("vitc_1gf", {"patch_size": 8}, r"multiply to 16.*patch size is 8"),
        ("vitc_1gf", {"stem_strides": (2, 2, 2, 1)}, r"multiply to 8.*patch size is 16"),
        ("vitp_1gf", {"image_size": 230}, "230.*16.*224"),
        ("vitc_tiny", {"stem_strides": (2, 4)}, r"\(16, 32, 64\).*\(2, 4\)"),
        ("vitc_tiny", {"num_heads": 3}, "64.*3 heads"),
        ("vitc_tiny", {"patch_size": 0}, "patch_size is 0"),
        ("vitp_tiny", {"stem_strides": (2, 4)}, r"\(2, 4\).*without channels"),
        ("vitp_tiny", {"img_size": 64}, "no field 'img_size'.*image_size"),
        ("vitc_tiny", {"stem_norm": "group"}, "stem_norm is 'group'.*batch.*layer"),
        ("vitc_tiny", {"stem_init": "new"}, "stem_init is 'new'.*paper.*later"),
        ("vitc_tiny", {"stem_kernels": (3, 3)}, r"kernels \(3, 3\), channels"),
        ("vitp_tiny", {"stem_init": "later"}, "is of the convolutional stem"),
        ("vitc_tiny", {"stem_kernels": (3, 3, 5)}, "neither 3 nor at most its strides"),
        ("vitc_tiny", {"stem_channels": (16, 0, 64)}, r"stem_channels are \(16, 0, 64\)"),
        ("vitc_tiny", {"stem_strides": (-2, -2, 2)}, r"stem_strides are \(-2, -2, 2\)"),
        ("vitc_tiny", {"num_classes": 0}, "num_classes is 0"),
        ("regnety_tiny", {"depths": (1, 1)}, "the same number of stages"),
        ("regnety_tiny", {"group_width": 24}, "width 32 is not a multiple of the group width 24"),
        ("regnety_tiny", {"depths": (1, 0, 1)}, "must be 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        abstract(name, **changes)


def test_what_are_no_such_images_is_refused():
    vit, cnn = random_model("vitp_tiny", depth=0), random_model("regnety_tiny")
    for height, width in ((48, 48), (32, 35), (35, 32)):
        with pytest.raises(ValueError, match=rf"\(2, {height}, {width}, 3\).*32, 32, 3"):
            vit(jnp.zeros((2, height, width, 3)))
    for model in (vit, cnn):
        with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\); this model takes \[N, "):
            model(jnp.zeros((2, 3, 32, 32)))
        with pytest.raises(ValueError, match=r"\(32, 32, 3\); this model takes \[N, "):
            model(jnp.zeros((32, 32, 3)))
        with pytest.raises(ValueError, match="uint8: normalise"):
            model(jnp.zeros((2, 32, 32, 3), jnp.uint8))


@pytest.mark.parametrize("name", ["vitp_tiny", "vitc_tiny", "regnety_tiny"])
def test_models_do_what_others_of_flax_do(name):
    """Any number of images in an exported program, none at all, a summary of the layers."""
    model, images = random_model(name), jnp.array(images_of(3, 32))
    assert "head" in nnx.tabulate(model, images)
    assert model(images[:0]).shape == (0, 1000)
    [num] = export.symbolic_shape("n")
    program = export.export(jax.jit(lambda images: model(images)))(
        jax.ShapeDtypeStruct((num, 32, 32, 3), jnp.float32)
    )
    np.testing.assert_allclose(program.call(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["vitp_tiny", "vitc_tiny", "regnety_tiny"])
def test_models_in_a_mesh_of_the_users(name, axis_type):
    model, images = random_model(name), jnp.array(images_of(4, 32))
    expected = model(images)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        images = jax.device_put(images, jax.NamedSharding(mesh, jax.P("data")))
        found = nnx.jit(lambda model, images: model(images))(model, images)
    assert found.sharding.spec[0] == "data"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


def test_the_class_token_alone_attends_as_among_all():
    """Also with padding tokens, which no token attends to."""
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.normal(size=shape) for shape in ((2, 9, 32), (32, 96), (96,)))

    def loss(attend, x, kernel, bias, **num):
        return (attend(x, kernel, bias, num_heads=4, **num)[:, 0] ** 2).sum()

    filled = np.concatenate([x, 9 * np.ones((2, 1, 32))], axis=1)
    of_one = functools.partial(loss, attention.of_class_token, num_tokens=9)
    of_all = functools.partial(loss, attention.of_all_tokens, num_tokens=9)
    found = jax.value_and_grad(of_one, (0, 1, 2))(*map(jnp.float32, (filled, kernel, bias)))
    expected = jax.value_and_grad(of_all, (0, 1, 2))(*map(jnp.float32, (x, kernel, bias)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    grad_x, *grads = found[1]
    assert not grad_x[:, 9:].any()
    for grad, wanted in zip((grad_x[:, :9], *grads), expected[1], strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-4 * np.abs(wanted).max())
