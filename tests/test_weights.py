"""Weights in and out: round trips, other implementations' layouts, fine-tuning."""

import errno
import json
import os
import pathlib
import pickle

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

import convstem_jax
from convstem_jax import convert, layouts, weights
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.errors import CheckpointError, ConfigError
from convstem_jax.predict import predict
from convstem_jax.step import TrainState, by_name, split_model
from convstem_jax.transfer import resize_position_embedding, transfer
from tests import networks

TINY = ("vitp_tiny", "vitc_tiny", "regnety_tiny")


def random_weights(name, num_classes=10, image_size=32):
    model = networks.random_model(name, num_classes=num_classes, image_size=image_size)
    _, params, batch_stats = split_model(model)
    found = jax.device_get({"params": params, "batch_stats": batch_stats})
    return found, weights.Architecture(name, num_classes, image_size)


def times(factor, found):
    return jax.tree.map(lambda x: jnp.asarray(x) * factor, found)


def write_run(folder, found, architecture, errors):
    """A run with the given error at each step. At the first, its EMA are the given weights.

    N steps later they are 2^N times those; the raw weights are the EMA's negatives.
    """
    checkpoints = Checkpoints(str(folder / "checkpoints"))
    for step, error in errors.items():
        ema = times(2.0 ** (step - min(errors)), found)
        raw = times(-1.0, ema)
        state = TrainState(jnp.int32(step), raw["params"], raw["batch_stats"], {}, ema)
        checkpoints.save(step, state, {}, error and {"top1_error": error})
    checkpoints.close()
    config = {"model": architecture.model, "image_size": architecture.image_size}
    (folder / "config.json").write_text(json.dumps(config))


def assert_same(a, b):
    a, b = traverse_util.flatten_dict(a), traverse_util.flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=str(path))


def run(*args):
    return convert.main([str(arg) for arg in args])


@pytest.mark.parametrize("name", TINY)
def test_every_way_round_is_bit_exact(name, tmp_path, capsys):
    """Each layout in each container, one after the other."""
    original, architecture = random_weights(name)
    weights.save(str(tmp_path / "a.safetensors"), original, architecture)
    model = ["--model", name]
    source = tmp_path / "a.safetensors"
    for layout in ("torchvision", "pycls", "timm")[: 3 if name == "vitp_tiny" else 2]:
        for suffix in ("pt", "safetensors"):
            target = tmp_path / f"{layout}.{suffix}"
            assert run(source, target, "--to", layout) == 0, capsys.readouterr().err
            source = tmp_path / f"from_{layout}_{suffix}.safetensors"
            back = run(target, source, "--from", layout, *model)
            assert back == 0, capsys.readouterr().err
    got, got_architecture = weights.load(str(source))
    assert_same(got, original)
    assert got_architecture == architecture


@pytest.mark.parametrize("name", TINY)
def test_state_dicts_fit_torchvisions_networks(name):
    found, _ = random_weights(name)
    state = layouts.to_torch(found, "torchvision")
    reference = networks.torchvision_network(networks.abstract(name, num_classes=10))
    expected = {key: tuple(x.shape) for key, x in reference.state_dict().items()}
    assert {key: x.shape for key, x in state.items()} == expected


# Names as the other projects' code gives them, of the first and last parts of small networks.
NAMES = {
    ("pycls", "vitc_tiny"): """
        class_token pos_embedding stem.cstem0_conv.weight stem.cstem2_bn.running_var
        stem.cstem_last_conv.bias encoder.block_0.ln_1.weight
        encoder.block_0.self_attention.attn_proj.weight
        encoder.block_2.self_attention.out_proj.bias encoder.block_2.mlp_block.linear_2.weight
        encoder.ln.bias head.head_fc.weight""",
    ("pycls", "vitp_tiny"): "stem.patchify.weight stem.patchify.bias",
    ("pycls", "regnety_tiny"): """
        stem.conv.weight stem.bn.num_batches_tracked s1.b1.proj.weight s1.b1.bn.running_mean
        s1.b1.f.a.weight s2.b4.f.a_bn.bias s3.b3.f.b.weight s3.b3.f.b_bn.weight
        s3.b1.f.se.f_ex.0.weight s3.b1.f.se.f_ex.2.bias s3.b1.f.c.weight s3.b1.f.c_bn.running_var
        head.fc.bias""",
    ("timm", "vitp_tiny"): """
        cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias blocks.0.norm1.weight
        blocks.0.attn.qkv.weight blocks.3.attn.proj.bias blocks.3.norm2.bias
        blocks.3.mlp.fc1.weight blocks.3.mlp.fc2.bias norm.weight head.weight head.bias""",
}


# What each of several tensors of one shape is here.
PLACES = {
    ("pycls", "vitc_tiny"): """
        stem.cstem2_bn.running_var=batch_stats/stem/norms/2/var
        encoder.block_0.ln_1.weight=params/blocks/0/norm1/scale
        encoder.block_2.ln_2.weight=params/blocks/2/norm2/scale
        encoder.block_1.self_attention.out_proj.bias=params/blocks/1/attention/out/bias
        encoder.block_1.mlp_block.linear_2.bias=params/blocks/1/mlp/fc2/bias
        encoder.ln.bias=params/norm/bias""",
    ("pycls", "regnety_tiny"): """
        s2.b4.f.a_bn.bias=params/stages/1/3/norm1/bias
        s3.b3.f.b_bn.weight=params/stages/2/2/norm2/scale
        s3.b1.f.c_bn.running_var=batch_stats/stages/2/0/norm3/var
        s1.b1.bn.running_mean=batch_stats/stages/0/0/shortcut_norm/mean
        s3.b1.f.se.f_ex.2.bias=params/stages/2/0/se/fc2/bias""",
    ("timm", "vitp_tiny"): """
        blocks.0.norm1.weight=params/blocks/0/norm1/scale
        blocks.3.norm2.bias=params/blocks/3/norm2/bias
        blocks.2.attn.proj.bias=params/blocks/2/attention/out/bias
        blocks.1.mlp.fc2.bias=params/blocks/1/mlp/fc2/bias
        norm.weight=params/norm/scale""",
}


@pytest.mark.parametrize("layout, name", NAMES)
def test_names_of_other_layouts(layout, name):
    found, _ = random_weights(name)
    state = layouts.to_torch(found, layout)
    missing = set(NAMES[layout, name].split()) - state.keys()
    assert not missing, missing
    for pair in PLACES.get((layout, name), "").split():
        theirs, ours = pair.split("=")
        np.testing.assert_array_equal(state[theirs], by_name(found)[ours], err_msg=pair)


@pytest.mark.parametrize(
    "name, first",
    [
        ("vitc_tiny", ("stem.cstem0_conv.weight", "conv_proj.conv_bn_relu_0.0.weight")),
        ("vitp_tiny", ("stem.patchify.weight", "conv_proj.weight")),
        ("regnety_tiny", ("stem.conv.weight", "stem.0.weight")),
    ],
)
def test_pycls_sees_blue_first(name, first):
    found, _ = random_weights(name)
    theirs, torchvisions = (
        layouts.to_torch(found, layout)[key]
        for layout, key in zip(("pycls", "torchvision"), first, strict=True)
    )
    np.testing.assert_array_equal(theirs, torchvisions[:, ::-1])


def test_older_and_newer_names_are_read():
    found, architecture = random_weights("vitc_tiny")
    state = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): x
        for name, x in layouts.to_torch(found, "torchvision").items()
    }
    assert_same(layouts.from_torch(state, architecture.shapes(), "torchvision"), found)

    # The authors' main branch: torch.nn.MultiheadAttention, and tokens before the batch.
    state = {
        name.replace("self_attention.attn_proj.", "self_attention.block.in_proj_").replace(
            "self_attention.out_proj", "self_attention.block.out_proj"
        ): x.transpose(1, 0, 2) if name == "pos_embedding" else x
        for name, x in layouts.to_torch(found, "pycls").items()
    }
    assert state["pos_embedding"].shape == (17, 1, 64)
    assert_same(layouts.from_torch(state, architecture.shapes(), "pycls"), found)


def test_the_authors_checkpoints_hold_two_states(tmp_path):
    path, moving, last = str(tmp_path / "a.pyth"), torch.zeros(2), torch.ones(2)
    torch.save({"epoch": 3, "ema_state": {"a": moving}, "model_state": {"a": last}}, path)
    assert (convert.read_torch(path)["a"] == 0).all()
    assert (convert.read_torch(path, raw=True)["a"] == 1).all()


def test_all_tensors_that_do_not_fit_are_listed(tmp_path, capsys):
    found, _ = random_weights("vitc_tiny")
    state = layouts.to_torch(found, "torchvision")
    del state["encoder.ln.weight"]
    state["conv_proj.conv_last.bias"] = np.zeros(7, np.float32)
    state["encoder.extra"] = np.zeros(1, np.float32)
    state["encoder.ln.bias"] = np.full(64, np.nan, np.float32)
    convert.write_torch(str(tmp_path / "a.pt"), state, "torchvision")
    flags = ["--from", "torchvision", "--model", "vitc_tiny", "--num_classes", 10]
    assert run(tmp_path / "a.pt", tmp_path / "b.safetensors", *flags) == 4
    error = capsys.readouterr().err
    assert "4 tensors do not fit" in error
    assert "missing: encoder.ln.weight" in error
    assert "not finite: encoder.ln.bias" in error
    assert "shape: conv_proj.conv_last.bias is (7,) and should be (64,)" in error
    assert "unknown: encoder.extra" in error
    assert not (tmp_path / "b.safetensors").exists()

    state = {"encoder.layers.0.mlp.0.bias": 1, "encoder.layers.0.mlp.linear_1.bias": 2}
    with pytest.raises(CheckpointError, match="twice: encoder.layers.0.mlp.0.bias"):
        layouts.from_torch(state, found, "torchvision")


def test_a_file_that_cannot_be_written_whole_is_not_left(tmp_path, monkeypatch, capsys):
    def save(state, file):
        file.write(b"half")
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(torch, "save", save)
    weights.save(str(tmp_path / "a.safetensors"), *random_weights("vitp_tiny"))
    assert run(tmp_path / "a.safetensors", tmp_path / "b.pt", "--to", "torchvision") == 4
    assert "b.pt cannot be written: [Errno 27] File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda arrays: arrays.pop("params/head/bias"), "missing: params/head/bias"),
        (
            lambda arrays: arrays.update({"params/head/bias": np.zeros(7, np.float32)}),
            "shape: params/head/bias is (7,) and should be (10,)",
        ),
        (lambda arrays: arrays.update({"params/x": np.zeros(7)}), "unknown: params/x"),
        (lambda arrays: arrays["params/head/bias"].fill(np.inf), "not finite: params/head/bias"),
    ],
)
def test_our_own_file_is_checked_too(change, message, tmp_path, capsys):
    weights.save(str(tmp_path / "a.safetensors"), *random_weights("vitp_tiny"))
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors", metadata)
    assert run(tmp_path / "b.safetensors", tmp_path / "c.safetensors") == 4
    error = capsys.readouterr().err
    assert message in error and "1 tensors do not fit" in error
    for described in ("{}", "[]", '"x"'):
        safetensors.numpy.save_file(arrays, tmp_path / "d.safetensors", {"convstem_jax": described})
        assert run(tmp_path / "d.safetensors", tmp_path / "c.safetensors") == 4
        assert "describes no model" in capsys.readouterr().err


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "it_ran",)

    with open(tmp_path / "plain.pt", "wb") as file:
        pickle.dump({"head.weight": Code()}, file)
    torch.save({"head.weight": Code()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        flags = ["--from", "timm", "--model", "vitp_tiny"]
        assert run(tmp_path / name, tmp_path / "out.safetensors", *flags) == 4
        assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "it_ran").exists()
    with open(tmp_path / "plain.pt", "rb") as file:
        pickle.load(file)
    assert (tmp_path / "it_ran").exists(), "the code was harmless: the test tests nothing"


@pytest.mark.parametrize(
    "layout, name, message",
    [
        ("timm", "vitc_tiny", "timm has no stem/convs/0, torchvision and pycls have: it cannot"),
        ("timm", "regnety_tiny", "timm has no .*, torchvision and pycls have: it cannot"),
        ("torchvision", "vitp_4gf_bn", "torchvision has no stem/norm: it cannot"),
        ("pycls", "vitc_4gf_ln", "pycls has BatchNorm in its stem, not LayerNorm"),
        ("pycls", "vitc_4gf_s2", "pycls has 3x3"),
    ],
)
def test_networks_that_a_layout_cannot_hold_are_refused(layout, name, message):
    shapes = weights.Architecture(name, 10, 32 if "tiny" in name else 224).shapes()
    with pytest.raises(CheckpointError, match=message):
        layouts.from_torch({}, shapes, layout)


def test_wrong_files_have_one_line_and_a_status(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    (tmp_path / "folder").mkdir()
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "foreign.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbered.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
    as_pycls = ["--from", "pycls", "--model", "vitp_tiny"]
    (tmp_path / "empty.pt").touch()
    flags = ["--from", "timm", "--model", "vitp_tiny"]
    for source, extra, status, message in (
        ("a.safetensors", [], 4, "is neither a run's folder nor a safetensors file"),
        ("none.safetensors", [], 2, "none.safetensors is not there"),
        ("none.safetensors", flags, 2, "none.safetensors is not there"),
        ("none.pt", flags, 2, "none.pt is not there"),
        ("empty.pt", flags, 4, "is refused: it is damaged"),
        ("numbered.pt", flags, 4, "holds no state dict"),
        ("folder", [], 2, "holds no checkpoint"),
        ("foreign.safetensors", [], 4, "was not written by this project"),
        ("list.pt", flags, 4, "holds no state dict"),
        ("plain.pt", [*as_pycls, "--raw"], 2, "plain.pt is one state"),
    ):
        assert run(tmp_path / source, tmp_path / "out.safetensors", *extra) == status, source
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not list((tmp_path / "folder").iterdir()), "reading makes nothing"
    for arguments, message in (
        (["a.safetensors", "folder"], "is there already"),
        (["list.pt", "out.safetensors"], "say its layout with --from"),
        (["a.safetensors", "out.pth"], "say its layout with --to"),
        (["a.safetensors", "out.npz"], "must end with .safetensors"),
        (["a.safetensors", "out.safetensors", "--model", "vitp_tiny"], "--model is for a source"),
        (["a.safetensors", "out.safetensors", "--raw"], "is one state"),
        (["list.pt", "out.safetensors", *flags, "--step", 7], "is one state"),
        (["list.pt", "out.safetensors", *flags, "--raw"], "is one state"),
        (["a.safetensors", "out.safetensors", *as_pycls, "--raw"], "is one state"),
        (["plain.pt", "out.safetensors", *flags, "--num_classes", 0], "num_classes is 0"),
    ):
        paths = [tmp_path / name for name in arguments[:2]]
        assert run(*paths, *arguments[2:]) == 2, arguments
        assert message in capsys.readouterr().err
    target = tmp_path / "absent" / "out.safetensors"
    weights.save(str(tmp_path / "good.safetensors"), *random_weights("vitp_tiny"))
    assert run(tmp_path / "good.safetensors", target) == 2
    assert "out.safetensors cannot be written: name a file" in capsys.readouterr().err
    again = tmp_path / "again.safetensors"
    assert run(tmp_path / "good.safetensors", again, *flags) == 2
    assert "good.safetensors is of this project already" in capsys.readouterr().err
    assert run(tmp_path / "good.safetensors", again) == 0
    assert again.read_bytes() == (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "plain").touch()
    assert again.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it too"


def test_a_model_is_loaded_with_its_weights(tmp_path):
    model = networks.random_model("vitc_tiny", num_classes=10)
    _, params, batch_stats = split_model(model)
    architecture = weights.Architecture("vitc_tiny", 10, 32)
    write_run(tmp_path, {"params": params, "batch_stats": batch_stats}, architecture, {1: None})
    weights.save(str(tmp_path / "file.safetensors"), *weights.load(str(tmp_path)))
    images = networks.images_of(2, 32)
    expected = nnx.clone(model)(images)
    for path in (tmp_path, tmp_path / "file.safetensors"):
        np.testing.assert_array_equal(convstem_jax.load_model(str(path))(images), expected)
    for step in ("1", 1.0):
        with pytest.raises(ConfigError, match="give a number of updates, or 'best'"):
            convstem_jax.load_model(str(tmp_path), step=step)
    for path in ("checkpoints", "checkpoints/1"):
        with pytest.raises(ConfigError, match=f"holds no checkpoint: name {tmp_path}$"):
            convstem_jax.load_model(str(tmp_path / path))
    config = tmp_path / "config.json"
    for name, message in (
        ("vitp_tiny", "missing: params/blocks/3"),
        ("vitc_5", "no model of this"),
    ):
        config.write_text(json.dumps({"model": name, "image_size": 32}))
        with pytest.raises(CheckpointError, match=message):
            convstem_jax.load_model(str(tmp_path))


def test_predictions_are_those_of_evaluation():
    """Also of a model in training mode, which would use the statistics of the images."""
    model, images = networks.random_model("vitc_tiny"), networks.images_of(3, 32)
    expected = predict(model, images)
    np.testing.assert_allclose(expected, jax.nn.softmax(model(images)), rtol=1e-5)
    model.train()
    np.testing.assert_array_equal(predict(model, images), expected)
    assert not model.stem.norms[0].use_running_average


def test_the_best_checkpoint_is_loaded_by_that_name(tmp_path):
    found, architecture = random_weights("vitc_tiny")
    write_run(tmp_path, found, architecture, {5: None})
    with pytest.raises(CheckpointError, match="no checkpoint in .* was evaluated"):
        weights.load(str(tmp_path), step="best")
    write_run(tmp_path, found, architecture, {10: 20.0, 20: 30.0})
    reader = Checkpoints(str(tmp_path / "checkpoints"), read_only=True)
    assert (reader.latest_step(), reader.best_step()) == (20, 10)
    reader.close()
    assert_same(weights.load(str(tmp_path), step="best")[0], found)
    assert_same(weights.load(str(tmp_path), step="best", raw=True)[0], times(-1.0, found))
    assert_same(weights.load(str(tmp_path))[0], times(2.0**10, found))


def test_another_size_and_other_classes_are_adapted():
    old, _ = random_weights("vitc_tiny", num_classes=10, image_size=32)
    new, _ = random_weights("vitc_tiny", num_classes=3, image_size=64)
    result, table = transfer(old, new)
    assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, new)
    assert_same(result["params"]["head"], new["params"]["head"])
    assert_same(result["params"]["stem"], old["params"]["stem"])
    assert_same(result["batch_stats"], old["batch_stats"])
    assert "position_embedding" in table and "resized" in table
    assert table.count("new: other classes") == 2 and "loaded" in table
    fresh = jax.tree.map(lambda x: x + 1, old)
    result, table = transfer(old, fresh, same_classes=False)
    assert_same(result["params"]["head"], fresh["params"]["head"])
    assert_same(result["params"]["stem"], old["params"]["stem"])
    assert table.count("new: other classes") == 2
    with pytest.raises(CheckpointError, match="belong to another architecture(.|\n)*there"):
        transfer(old, random_weights("vitp_tiny")[0])


def test_position_embedding_is_resized_bicubically():
    rng = np.random.default_rng(0)
    embedding = jnp.array(rng.normal(size=(1, 1 + 14**2, 8)), jnp.float32)
    same = resize_position_embedding(embedding, 1 + 14**2)
    np.testing.assert_allclose(same, embedding, atol=1e-6)
    larger = np.array(resize_position_embedding(embedding, 1 + 24**2))
    np.testing.assert_array_equal(larger[:, 0], embedding[:, 0])
    grid = torch.tensor(np.array(embedding[0, 1:].reshape(14, 14, 8))).permute(2, 0, 1)[None]
    for side in (24, 16, 7):
        expected = torch.nn.functional.interpolate(
            grid, size=(side, side), mode="bicubic", antialias=True
        )
        got = np.array(resize_position_embedding(embedding, 1 + side**2))[0, 1:]
        expected = expected[0].permute(1, 2, 0).reshape(-1, 8)
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=str(side))
