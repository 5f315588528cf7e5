"""Converts weights between this project's and PyTorch's.

SOURCE and TARGET are each a run's folder or a .safetensors file of this project, or a PyTorch state
dict (.pt, .pth, .pyth, .bin, or .safetensors with --from or --to) in the layout of torchvision,
pycls or timm.
"""

import argparse
import os
import sys

import numpy as np
import safetensors
import safetensors.numpy

from convstem_jax import layouts, weights
from convstem_jax.errors import CheckpointError, ConfigError, UserError
from convstem_jax.models import MODELS

_EPILOG = """\
examples:
  python -m convstem_jax.convert runs/quickstart quickstart.safetensors
  python -m convstem_jax.convert runs/vitc_18gf vitc_18gf.pth --to torchvision
  python -m convstem_jax.convert vit_b_16.pth vitp_18gf.safetensors --from torchvision \\
      --model vitp_18gf

The result of the last one starts a training with --config.init_from=vitp_18gf.safetensors, and
convstem_jax.load_model gives a model from it. Torch files are read without running code in them.

exit status:
  0 done · 2 wrong arguments · 4 weights that cannot be read or do not fit
"""


def read_torch(path: str, *, raw: bool = False) -> dict[str, np.ndarray]:
    """Reads a state dict, from PyTorch's format or safetensors.

    Args:
        path: the file. Checkpoints of pycls hold two state dicts beside other things.
        raw: of those two, the one of the last update in place of its moving average.

    Raises:
        CheckpointError: it cannot be read, or holds something else than tensors.
    """
    if path.endswith(".safetensors"):
        try:
            return safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    torch = _import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds more than tensors, such as code "
            f"({str(error).splitlines()[0]})"
        ) from error
    for key in ("model_state", "ema_state") if raw else ("ema_state", "model_state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise CheckpointError(f"{path} holds no state dict: save model.state_dict()")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def write_torch(path: str, state: dict[str, np.ndarray]) -> None:
    """Writes a state dict of contiguous arrays, in PyTorch's format or safetensors."""
    try:
        if path.endswith(".safetensors"):
            safetensors.numpy.save_file(state, path, {"format": "pt"})
        else:
            torch = _import_torch(path)
            torch.save({name: torch.from_numpy(np.array(x)) for name, x in state.items()}, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _import_torch(path: str):
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} needs PyTorch: pip install torch, or use a .safetensors file"
        ) from error
    return torch


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convstem_jax.convert",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layout = {"choices": layouts.LAYOUTS, "metavar": "LAYOUT"}
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="must not exist")
    parser.add_argument(
        "--from", dest="source_layout", **layout,
        help=f"layout of the source: {', '.join(layouts.LAYOUTS)} (default: this project's)",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target_layout", **layout, help="layout of the target, likewise"
    )
    parser.add_argument(
        "--model", choices=MODELS, metavar="NAME",
        help="of a source with --from; one of " + ", ".join(MODELS),
    )  # fmt: skip
    parser.add_argument("--num_classes", type=int, default=1000, help="likewise; default 1000")
    parser.add_argument("--image_size", type=int, help="likewise; default: the model's own")
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the latest)")
    parser.add_argument(
        "--raw", action="store_true", help="the weights of the last update, not their average (EMA)"
    )
    args = parser.parse_args(argv)
    try:
        if os.path.exists(args.target):
            raise ConfigError(f"{args.target} is there already: delete it, or name another target")
        if args.source_layout:
            if not args.model:
                raise ConfigError(f"--from {args.source_layout} needs --model")
            image_size = args.image_size or MODELS[args.model].image_size
            architecture = weights.Architecture(args.model, args.num_classes, image_size)
            state = read_torch(args.source, raw=args.raw)
            converted = layouts.from_torch(state, architecture.shapes(), args.source_layout)
        else:
            converted, architecture = weights.load(args.source, raw=args.raw, step=args.step)
        if args.target_layout:
            write_torch(args.target, layouts.to_torch(converted, args.target_layout))
        else:
            weights.save(args.target, converted, architecture)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    print(f"{args.target}: {architecture.model}, {architecture.num_classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
