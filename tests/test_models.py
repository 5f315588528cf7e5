"""Models against the paper: sizes, numerics (torch.nn), initialisation, errors."""

import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convstem_jax.models import create_model, stems
from convstem_jax.models.vit import VITS

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


def abstract(name, **kwargs):
    """A model of shapes, without arrays."""
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **kwargs))


def num_params(model):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def random_model(name, **kwargs):
    """A model whose every parameter and statistic is random: zeros and ones hide mistakes."""
    model, rng = abstract(name, **kwargs), np.random.default_rng(0)

    def new(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return jnp.array(1.5 * noise / np.sqrt(math.prod(x.shape[:-1]), dtype=np.float32))
        if path[-1].key in ("scale", "var"):
            return jnp.array(1 + 0.5 * np.tanh(noise))
        return jnp.array(0.3 * noise)

    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    nnx.update(model, jax.tree.map_with_path(new, state))
    return model


def images_of(n, size, seed=1):
    return np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


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
    """Not so 36GF, whose stem is 18GF's, and 72GF, which keeps its 22 blocks."""
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


def torch_array(x):
    return torch.from_numpy(np.array(x))


def copy_conv(target, conv):
    target.weight.data = torch_array(conv.kernel[...]).permute(3, 2, 0, 1).contiguous()
    if target.bias is not None:
        target.bias.data = torch_array(conv.bias[...])


def copy_linear(target, linear):
    target.weight.data = torch_array(linear.kernel[...]).T.contiguous()
    target.bias.data = torch_array(linear.bias[...])


def copy_norm(target, norm):
    target.weight.data = torch_array(norm.scale[...])
    target.bias.data = torch_array(norm.bias[...])
    if isinstance(norm, nnx.BatchNorm):
        target.running_mean.copy_(torch_array(norm.mean[...]))
        target.running_var.copy_(torch_array(norm.var[...]))


def torch_stem(spec, stem):
    """Section 3, with the weights of `stem`."""
    if not spec.stem_channels:
        patch = spec.patch_size
        layers = [torch.nn.Conv2d(3, spec.width, patch, stride=patch)]
        copy_conv(layers[0], stem.projection)
        return torch.nn.Sequential(*layers)
    layers, c_in = [], 3
    for i, (c_out, stride) in enumerate(zip(spec.stem_channels, spec.stem_strides, strict=True)):
        conv = torch.nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        norm = torch.nn.BatchNorm2d(c_out, eps=1e-5, momentum=0.1)
        copy_conv(conv, stem.convs[i])
        copy_norm(norm, stem.norms[i])
        layers += [conv, norm, torch.nn.ReLU()]
        c_in = c_out
    layers.append(torch.nn.Conv2d(c_in, spec.width, 1))
    copy_conv(layers[-1], stem.projection)
    return torch.nn.Sequential(*layers)


class TorchBlock(torch.nn.Module):
    def __init__(self, spec, block):
        super().__init__()
        d = spec.width
        self.norm1 = torch.nn.LayerNorm(d, eps=1e-6)
        self.attention = torch.nn.MultiheadAttention(d, spec.num_heads, batch_first=True)
        self.norm2 = torch.nn.LayerNorm(d, eps=1e-6)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(d, spec.mlp_dim), torch.nn.GELU(), torch.nn.Linear(spec.mlp_dim, d)
        )
        copy_norm(self.norm1, block.norm1)
        copy_norm(self.norm2, block.norm2)
        qkv = block.attention.qkv
        self.attention.in_proj_weight.data = torch_array(qkv.kernel[...]).T.contiguous()
        self.attention.in_proj_bias.data = torch_array(qkv.bias[...])
        copy_linear(self.attention.out_proj, block.attention.out)
        copy_linear(self.mlp[0], block.mlp.fc1)
        copy_linear(self.mlp[2], block.mlp.fc2)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TorchViT(torch.nn.Module):
    """The paper's network in torch.nn, with the weights of `model`."""

    def __init__(self, model):
        super().__init__()
        spec = model.spec
        self.stem = torch_stem(spec, model.stem)
        self.class_token = torch_array(model.class_token[...])
        self.position_embedding = torch_array(model.position_embedding[...])
        self.blocks = torch.nn.Sequential(*(TorchBlock(spec, block) for block in model.blocks))
        self.norm = torch.nn.LayerNorm(spec.width, eps=1e-6)
        copy_norm(self.norm, model.norm)
        self.head = torch.nn.Linear(spec.width, model.head.out_features)
        copy_linear(self.head, model.head)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)  # [N, T - 1, d]
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.blocks(x + self.position_embedding)
        return self.head(self.norm(x)[:, 0])


@torch.no_grad()
def test_convolutional_stem_is_torchs_in_training_and_in_evaluation():
    model = random_model("vitc_tiny", depth=0)
    stem, reference = model.stem, torch_stem(model.spec, model.stem)
    before = [(norm.mean[...], norm.var[...]) for norm in stem.norms]
    images = images_of(2, 32)

    def compare(images, mode):
        getattr(stem, mode)()
        getattr(reference, mode)()
        y = nnx.jit(lambda stem, x: stem(x))(stem, images)
        y_torch = reference(torch_array(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        np.testing.assert_allclose(y, y_torch.numpy(), atol=1e-4, err_msg=mode)

    compare(images, "eval")
    compare(images, "train")
    num = 2 * 16 * 16  # values that a mean of the first norm is over
    for norm, (mean, var), norm_torch in zip(stem.norms, before, reference[1::3], strict=True):
        np.testing.assert_allclose(norm.mean[...], norm_torch.running_mean, atol=1e-5)
        # Of the batch, torch takes the unbiased variance: num / (num - 1) as large.
        np.testing.assert_allclose(
            norm.var[...] - 0.9 * var,
            (norm_torch.running_var - 0.9 * torch_array(var)) * (num - 1) / num,
            rtol=1e-3,
        )
        assert np.abs(norm.mean[...] - mean).max() > 1e-3, "the running mean has to move"
        num //= 4
    # Dark images, whose variance is near 1e-5: another epsilon would show.
    compare(np.float32(0.003) * images, "train")


def test_a_new_model_is_for_evaluation():
    """Whoever calls `model(images)` in a notebook must not move the statistics."""
    model, images = random_model("vitc_tiny", depth=0), jnp.array(images_of(4, 32))
    together = model(images)
    np.testing.assert_allclose(model(images[:1]), together[:1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vitp_tiny", "vitc_tiny"])
def test_whole_model_is_torchs(name):
    # Four heads, so that heads and query, key and value cannot be mixed up unnoticed.
    model = random_model(name, depth=2, num_heads=4, num_classes=10)
    model.eval()
    images = images_of(3, 32)
    logits = np.array(nnx.jit(lambda model, x: model(x))(model, images))
    expected = TorchViT(model).eval()(torch_array(images).permute(0, 3, 1, 2)).numpy()
    assert expected.std() > 0.1, "logits this small would agree whatever the model does"
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Tokens of ordinary size do not show LayerNorm's epsilon.
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.LayerNorm)]
    assert {norm.epsilon for norm in norms} == {1e-6}


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
    assert inputs == [{"bfloat16"}] * (4 + 6) + [{"float32"}], "stem and block, then the head"


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
    """Section 2 of the figures: the code of mid-2021."""
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


def test_patchify_initialisation_is_cut_at_2_absolute():
    # A 1x1 patch, where 2 is 3.5 standard deviations: at 16x16 it is 55, and no draw comes there.
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
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        abstract(name, **changes)


def test_images_of_another_size_are_refused():
    model = random_model("vitp_tiny", depth=0)
    with pytest.raises(ValueError, match=r"\(2, 48, 48, 3\).*32, 32, 3"):
        model(jnp.zeros((2, 48, 48, 3)))
