"""Converts weights between this project's and PyTorch's.

SOURCE is a run's folder or a .safetensors file of this project, TARGET such a file. Either may also
be a PyTorch state dict (.pt, .pth, .pyth, .bin, or .safetensors with --from or --to) in the layout
of torchvision, pycls or timm.
"""

import argparse
import os
import sys

import numpy as np
import safetensors
import safetensors.numpy

from convstem_jax import command_line, files, layouts, weights
from convstem_jax.errors import CheckpointError, ConfigError, UserError
from convstem_jax.models import MODELS
from convstem_jax.terminal import new_parser, tell, writable

TORCH_SUFFIXES = (".pt", ".pth", ".pyth", ".bin")
_EPILOG = """\
examples:
  python -m convstem_jax.convert runs/quickstart quickstart.safetensors
  python -m convstem_jax.convert runs/vitc_18gf vitc_18gf.pth --to torchvision
  python -m convstem_jax.convert vit_b_16.pth vitp_18gf.safetensors --from torchvision \\
      --model vitp_18gf

Training can start from the last result with --config.init_from=vitp_18gf.safetensors, and
convstem_jax.load_model loads it as a model. Torch files are read without running code in them.

Files for pycls are written as in its branch vitconfigs, and also read as in its main branch. Of
timm's networks with the paper's sizes only vit_base_patch16_224 has the paper's architecture; mind
the mean and standard deviation that its images were normalised with.

exit status:
  0 done · 2 wrong arguments, or no such file · 4 weights that cannot be read or do not fit
  75 storage did not answer: try again
"""


def read_torch(path: str, *, raw: bool = False) -> dict[str, np.ndarray]:
    """Reads a state dict, from PyTorch's format or safetensors.

    Args:
        path: the file. Checkpoints of pycls hold two state dicts besides other things.
        raw: of those two, the one of the last update in place of its moving average.

    Raises:
        ConfigError: it is not there, or is not PyTorch's.
        CheckpointError: it cannot be read, or holds something other than tensors.
    """
    if not os.path.exists(path):
        raise ConfigError(files.not_there(path))
    if path.endswith(".safetensors"):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                is_own = "convstem_jax" in (file.metadata() or {})
            if is_own:
                raise ConfigError(f"{path} is of this project already: leave out --from")
            return safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    torch = _import_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds more than tensors, such as code: save "
            f"model.state_dict() ({type(error).__name__})"
        ) from error
    for key in ("model_state", "ema_state") if raw else ("ema_state", "model_state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    else:
        if raw:
            raise ConfigError(f"--raw is for checkpoints of two states: {path} is one state")
    is_state = isinstance(content, dict) and all(
        isinstance(name, str) and torch.is_tensor(x) and not x.is_complex()
        for name, x in content.items()
    )
    if not is_state:
        raise CheckpointError(f"{path} holds no state dict: save model.state_dict()")
    return {name: tensor.float().numpy() for name, tensor in content.items()}


def write_torch(path: str, state: dict[str, np.ndarray], layout: str) -> None:
    """Writes a state dict of contiguous arrays, in PyTorch's format or safetensors.

    In PyTorch's format, pycls keeps the state dict under the key `model_state`.
    """
    try:
        if path.endswith(".safetensors"):
            files.write(path, safetensors.numpy.save(state, {"format": "pt"}))
        else:
            torch = _import_torch(path)
            tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
            with files.replacing(path, "wb") as file:
                torch.save({"model_state": tensors} if layout == "pycls" else tensors, file)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _import_torch(path: str):
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} needs PyTorch: pip install torch, or use a .safetensors file"
        ) from error
    return torch


def _check(args: argparse.Namespace) -> None:
    """Refuses arguments that would be ignored or do harm."""
    if os.path.exists(args.target):
        raise ConfigError(f"{args.target} is there already: delete it, or name another target")
    try:
        writable(args.target)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(str(error)) from error
    if args.source_layout and not args.model:
        raise ConfigError(f"--from {args.source_layout} needs --model")
    for name in ("model", "num_classes", "image_size"):
        if getattr(args, name) is not None and not args.source_layout:
            raise ConfigError(f"--{name} is for a source with --from: {args.source} has its own")
    is_state = args.source_layout or args.source.endswith(".safetensors")
    if args.step is not None and is_state:
        raise ConfigError(f"--step is for a run's folder: {args.source} is one state")
    has_two = args.source_layout == "pycls" and not args.source.endswith(".safetensors")
    if args.raw and is_state and not has_two:
        raise ConfigError(
            f"--raw is for a run's folder and checkpoints of pycls: {args.source} is one state"
        )
    for path, layout, flag in (
        (args.source, args.source_layout, "--from"),
        (args.target, args.target_layout, "--to"),
    ):
        if path.endswith(TORCH_SUFFIXES) and not layout:
            raise ConfigError(f"{path} is a PyTorch file: say its layout with {flag}")
    if not (args.target_layout or args.target.endswith(".safetensors")):
        raise ConfigError(f"{args.target} must end with .safetensors, or be given a layout by --to")


def main(argv: list[str] | None = None) -> int:
    """Converts; returns the exit status."""
    parser = new_parser("convstem_jax.convert", __doc__, epilog=_EPILOG)
    layout = {"choices": layouts.LAYOUTS, "metavar": "LAYOUT"}
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET", help="must not exist")
    parser.add_argument(
        "--from", dest="source_layout", **layout,
        help=f"layout of the source: {', '.join(layouts.LAYOUTS)} (default: this project's)",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target_layout", **layout, help="layout of the target (default as for --from)"
    )
    parser.add_argument(
        "--model", choices=MODELS, metavar="NAME",
        help="model of a source with --from; one of " + ", ".join(MODELS),
    )  # fmt: skip
    parser.add_argument(
        "--num_classes", type=int, help="of a source with --from (default: its own, or 1000)"
    )
    parser.add_argument(
        "--image_size", type=int, help="of a source with --from (default: the model's own)"
    )
    command_line.add_checkpoint(parser)
    args = parser.parse_args(argv)
    try:
        _check(args)
        if args.source_layout:
            image_size = args.image_size
            if image_size is None:
                image_size = MODELS[args.model].image_size
            state = read_torch(args.source, raw=args.raw)
            num_classes = args.num_classes
            if num_classes is None:
                like = weights.Architecture(args.model, 1, image_size).shapes()
                num_classes = layouts.num_classes(state, like, args.source_layout)
            architecture = weights.Architecture(args.model, num_classes, image_size)
            converted = layouts.from_torch(state, architecture.shapes(), args.source_layout)
        else:
            converted, architecture = weights.load(args.source, raw=args.raw, step=args.step)
        if args.target_layout:
            state = layouts.to_torch(converted, args.target_layout)
            write_torch(args.target, state, args.target_layout)
        else:
            weights.save(args.target, converted, architecture)
    except (UserError, ValueError) as error:
        return tell(error)
    print(f"{args.target}: {architecture.model}, {architecture.num_classes} classes")
    return 0


if __name__ == "__main__":
    command_line.silence_libraries()
    sys.exit(main())
