"""Names and axes of the weights in PyTorch implementations of the same networks.

A table maps the path of a module or parameter here to the beginning of the names there; `{i}` and
`{j}` stand for numbers, which some layouts count from one: `{i1}`, `{j1}`. pycls feeds its networks
blue, green, red, so the first convolution's inputs are reversed.
"""

from collections.abc import Iterator
import re
from typing import Any

from flax import traverse_util
import numpy as np

from convstem_jax.errors import CheckpointError
from convstem_jax.step import PyTree
from convstem_jax.weights import listed, misfits

_VIT = {
    "torchvision": {
        "stem/projection": "conv_proj.",
        "stem/convs/{i}": "conv_proj.conv_bn_relu_{i}.0.",
        "stem/norms/{i}": "conv_proj.conv_bn_relu_{i}.1.",
        "class_token": "class_token",
        "position_embedding": "encoder.pos_embedding",
        "blocks/{i}/norm1": "encoder.layers.encoder_layer_{i}.ln_1.",
        "blocks/{i}/attention/qkv": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_",
        "blocks/{i}/attention/out": "encoder.layers.encoder_layer_{i}.self_attention.out_proj.",
        "blocks/{i}/norm2": "encoder.layers.encoder_layer_{i}.ln_2.",
        "blocks/{i}/mlp/fc1": "encoder.layers.encoder_layer_{i}.mlp.0.",
        "blocks/{i}/mlp/fc2": "encoder.layers.encoder_layer_{i}.mlp.3.",
        "norm": "encoder.ln.",
        "head": "heads.head.",
    },
    "pycls": {
        "stem/projection": "stem.patchify.",
        "stem/convs/{i}": "stem.cstem{i}_conv.",
        "stem/norms/{i}": "stem.cstem{i}_bn.",
        "class_token": "class_token",
        "position_embedding": "pos_embedding",
        "blocks/{i}/norm1": "encoder.block_{i}.ln_1.",
        "blocks/{i}/attention/qkv": "encoder.block_{i}.self_attention.attn_proj.",
        "blocks/{i}/attention/out": "encoder.block_{i}.self_attention.out_proj.",
        "blocks/{i}/norm2": "encoder.block_{i}.ln_2.",
        "blocks/{i}/mlp/fc1": "encoder.block_{i}.mlp_block.linear_1.",
        "blocks/{i}/mlp/fc2": "encoder.block_{i}.mlp_block.linear_2.",
        "norm": "encoder.ln.",
        "head": "head.head_fc.",
    },
    "timm": {
        "stem/projection": "patch_embed.proj.",
        "class_token": "cls_token",
        "position_embedding": "pos_embed",
        "blocks/{i}/norm1": "blocks.{i}.norm1.",
        "blocks/{i}/attention/qkv": "blocks.{i}.attn.qkv.",
        "blocks/{i}/attention/out": "blocks.{i}.attn.proj.",
        "blocks/{i}/norm2": "blocks.{i}.norm2.",
        "blocks/{i}/mlp/fc1": "blocks.{i}.mlp.fc1.",
        "blocks/{i}/mlp/fc2": "blocks.{i}.mlp.fc2.",
        "norm": "norm.",
        "head": "head.",
    },
}
# Names of a convolutional stem's last layer where they differ from the patchify stem's.
_CONV_STEM = {"torchvision": "conv_proj.conv_last.", "pycls": "stem.cstem_last_conv."}

_REGNET = {
    "torchvision": {
        "stem": "stem.0.",
        "stem_norm": "stem.1.",
        "stages/{i}/{j}/conv1": "trunk_output.block{i1}.block{i1}-{j}.f.a.0.",
        "stages/{i}/{j}/norm1": "trunk_output.block{i1}.block{i1}-{j}.f.a.1.",
        "stages/{i}/{j}/conv2/conv": "trunk_output.block{i1}.block{i1}-{j}.f.b.0.",
        "stages/{i}/{j}/norm2": "trunk_output.block{i1}.block{i1}-{j}.f.b.1.",
        "stages/{i}/{j}/se/fc1": "trunk_output.block{i1}.block{i1}-{j}.f.se.fc1.",
        "stages/{i}/{j}/se/fc2": "trunk_output.block{i1}.block{i1}-{j}.f.se.fc2.",
        "stages/{i}/{j}/conv3": "trunk_output.block{i1}.block{i1}-{j}.f.c.0.",
        "stages/{i}/{j}/norm3": "trunk_output.block{i1}.block{i1}-{j}.f.c.1.",
        "stages/{i}/{j}/shortcut": "trunk_output.block{i1}.block{i1}-{j}.proj.0.",
        "stages/{i}/{j}/shortcut_norm": "trunk_output.block{i1}.block{i1}-{j}.proj.1.",
        "head": "fc.",
    },
    "pycls": {
        "stem": "stem.conv.",
        "stem_norm": "stem.bn.",
        "stages/{i}/{j}/conv1": "s{i1}.b{j1}.f.a.",
        "stages/{i}/{j}/norm1": "s{i1}.b{j1}.f.a_bn.",
        "stages/{i}/{j}/conv2/conv": "s{i1}.b{j1}.f.b.",
        "stages/{i}/{j}/norm2": "s{i1}.b{j1}.f.b_bn.",
        "stages/{i}/{j}/se/fc1": "s{i1}.b{j1}.f.se.f_ex.0.",
        "stages/{i}/{j}/se/fc2": "s{i1}.b{j1}.f.se.f_ex.2.",
        "stages/{i}/{j}/conv3": "s{i1}.b{j1}.f.c.",
        "stages/{i}/{j}/norm3": "s{i1}.b{j1}.f.c_bn.",
        "stages/{i}/{j}/shortcut": "s{i1}.b{j1}.proj.",
        "stages/{i}/{j}/shortcut_norm": "s{i1}.b{j1}.bn.",
        "head": "head.fc.",
    },
}
LAYOUTS = ("torchvision", "pycls", "timm")

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Names of older or newer versions of the same code -> those of the tables.
_ALIASES = {
    "torchvision": [(r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")],
    "pycls": [
        (r"\.self_attention\.block\.in_proj_", ".self_attention.attn_proj."),
        (r"\.self_attention\.block\.out_proj\.", ".self_attention.out_proj."),
    ],
    "timm": [],
}


def to_torch(weights: PyTree, layout: str) -> dict[str, np.ndarray]:
    """Gives weights the names and axes of a PyTorch implementation.

    Args:
        weights: {"params", "batch_stats"}, nested dicts of arrays.
        layout: one of `LAYOUTS`; `pycls` means its branch `vitconfigs`, of the paper's configs.

    Returns:
        A state dict of NumPy arrays.

    Raises:
        CheckpointError: the layout has no such network.
    """
    state = {}
    for path, x, name, kind in _names(weights, layout):
        state[name] = np.ascontiguousarray(_transpose(kind, np.asarray(x)))
        if path[-1] == "var":  # torch counts the batches that went into the statistics
            state[name.removesuffix("running_var") + "num_batches_tracked"] = np.zeros((), np.int64)
    return state


def from_torch(state: dict[str, np.ndarray], like: PyTree, layout: str) -> PyTree:
    """Reads weights from a state dict of a PyTorch implementation.

    Args:
        state: names -> arrays, of any floating type.
        like: weights of the wanted names and shapes, arrays or shapes.
        layout: one of `LAYOUTS`; both layouts of pycls's ViT are read.

    Raises:
        CheckpointError: listing tensors that are missing, unknown, misshaped or not finite.
    """
    wrong, found = [], {}
    for name, x in state.items():
        if (new := _rename(name, layout)) in found:
            wrong.append(f"twice: {new}, once as {name}")
        if not name.endswith("num_batches_tracked"):
            found[new] = np.asarray(x)
    embedding = found.get("pos_embedding")
    if embedding is not None and embedding.ndim == 3 and embedding.shape[1] == 1:
        found["pos_embedding"] = embedding.transpose(1, 0, 2)  # [T, 1, d] in pycls's main branch
    names = [(path, name, kind, x.shape) for path, x, name, kind in _names(like, layout)]
    wanted = {name: _transpose(kind, np.empty(shape, np.bool_)) for _, name, kind, shape in names}
    wrong += misfits(found, wanted)
    if wrong:
        raise CheckpointError(f"these are not {layout} weights of this model; {listed(wrong)}")
    flat = {
        path: _transpose_back(kind, found[name].astype(np.float32)) for path, name, kind, _ in names
    }
    return {"batch_stats": {}} | traverse_util.unflatten_dict(flat)


def num_classes(state: dict[str, np.ndarray], like: PyTree, layout: str) -> int:
    """Number of classes of a state dict's head, 1000 if it has none; arguments as `from_torch`."""
    names = {path: name for path, _, name, _ in _names(like, layout)}
    head = names["params", "head", "bias"]
    return next((x.size for name, x in state.items() if _rename(name, layout) == head), 1000)


def _rename(name: str, layout: str) -> str:
    for pattern, replacement in _ALIASES[layout]:
        name = re.sub(pattern, replacement, name)
    return name


def _names(weights: PyTree, layout: str) -> Iterator[tuple[tuple, Any, str, str]]:
    """Yields (path in `weights`, the array, its name in the layout, its kind) of every array."""
    if _has_conv_stem(weights):
        kernels = [conv["kernel"].shape[0] for conv in weights["params"]["stem"]["convs"].values()]
        if set(kernels) != {3}:
            raise CheckpointError(f"{layout} has 3x3 convolutions in its stem, not {kernels}")
        if not weights["batch_stats"]:
            raise CheckpointError(f"{layout} has BatchNorm in its stem, not LayerNorm")
    rules = _rules(weights, layout)
    for path, x in traverse_util.flatten_dict(weights).items():
        module, leaf = path[1:], ""
        if path[-1] in _LEAVES:
            module, leaf = path[1:-1], _LEAVES[path[-1]]
        for pattern, template in rules:
            if match := pattern.fullmatch("/".join(map(str, module))):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                numbers |= {f"{key}1": value + 1 for key, value in numbers.items()}
                yield path, x, template.format(**numbers) + leaf, _kind(path, x.shape, layout)
                break
        else:
            name = "/".join(map(str, module))
            others = [
                other
                for other in LAYOUTS
                if any(pattern.fullmatch(name) for pattern, _ in _rules(weights, other))
            ]
            hint = f", {' and '.join(others)} have" if others else ""
            raise CheckpointError(f"{layout} has no {name}{hint}: it cannot hold this model")


def _rules(weights: PyTree, layout: str) -> list[tuple[re.Pattern, str]]:
    """The layout's table for this network, empty where it has none."""
    table = dict((_VIT if "class_token" in weights["params"] else _REGNET).get(layout, {}))
    if _has_conv_stem(weights) and layout in _CONV_STEM:
        table["stem/projection"] = _CONV_STEM[layout]
    return [
        (re.compile(re.sub(r"\{(\w)\}", r"(?P<\1>\\d+)", pattern)), template)
        for pattern, template in table.items()
    ]


def _has_conv_stem(weights: PyTree) -> bool:
    return "class_token" in weights["params"] and "convs" in weights["params"]["stem"]


def _kind(path: tuple, shape: tuple[int, ...], layout: str) -> str:
    if path[-1] != "kernel":
        return "plain"
    if len(shape) == 4:
        sees_colours = path[1] == "stem" and shape[2] == 3
        return "conv of BGR" if layout == "pycls" and sees_colours else "conv"
    return "pointwise" if "se" in path else "linear"  # squeeze-and-excitation is 1x1 convolutions


def _transpose(kind: str, x: np.ndarray) -> np.ndarray:
    match kind:
        case "conv":
            return x.transpose(3, 2, 0, 1)
        case "conv of BGR":
            return x.transpose(3, 2, 0, 1)[:, ::-1]
        case "linear":
            return x.T
        case "pointwise":
            return x.T[:, :, None, None]
    return x


def _transpose_back(kind: str, x: np.ndarray) -> np.ndarray:
    match kind:
        case "conv":
            return x.transpose(2, 3, 1, 0)
        case "conv of BGR":
            return x[:, ::-1].transpose(2, 3, 1, 0)
        case "linear":
            return x.T
        case "pointwise":
            return x[:, :, 0, 0].T
    return x
