"""Training steps in PyTorch as its users make them fast.

torch.compile, autocast to bfloat16 unless float32 is asked for, fused attention and optimisers,
channels last.

The networks are torchvision's and timm's own. The step normalises uint8 images, applies lighting,
mixing and label smoothing on the device, updates the parameters, and the EMA at every 32nd step.
Unlike this project's step it has no gradient norm, schedule or principal components of lighting.
"""

from collections.abc import Callable
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import pathlib
import re
import time

import jax
import numpy as np

from benchmarks.workload import (
    EMA_RATE,
    LR,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Case,
    random_batches,
    recipe_of,
)
from convstem_jax.errors import first_line
from convstem_jax.models import MODELS
from convstem_jax.models.vit import ViTSpec


@functools.cache
def declare_torchvision():
    """Lets torchvision for CUDA be imported beside a CPU build of PyTorch.

    Its networks are pure Python, and need none of the compiled operations that are declared here.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    if spec := importlib.util.find_spec("torchvision"):
        folder = pathlib.Path(spec.origin).parent
        for path in folder.glob("_C*.so"):
            with contextlib.suppress(OSError):  # It asks for CUDA's libraries.
                torch.ops.load_library(path)
        declared = re.compile(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"')
        for name in set(declared.findall((folder / "_meta_registrations.py").read_text())):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}() -> Tensor")
    return library  # kept: its declarations end with it


def unavailable(implementation: str) -> str | None:
    """Why this implementation cannot be used here; None if it can."""
    try:
        declare_torchvision()
        importlib.import_module(implementation)
    except (ImportError, OSError, RuntimeError) as error:  # built for another CUDA, or for none
        return first_line(error)
    own, jaxs = device_type(), jax.default_backend()
    if own != {"gpu": "cuda"}.get(jaxs, jaxs):
        return f"PyTorch would run on {own}, and JAX runs on {jaxs}: install another build"
    return None


def device_type() -> str:
    """Where PyTorch computes here: cuda or cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of the packages here that decide the numbers."""
    found = {}
    for name in ("torch", "torchvision", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def torchvision_network(spec, num_classes: int = NUM_CLASSES):
    """torchvision's network of the architecture of `spec`, a value of `MODELS`."""
    declare_torchvision()
    from torchvision.models.regnet import BlockParams, RegNet
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    if not isinstance(spec, ViTSpec):
        num = len(spec.depths)
        blocks = BlockParams(
            depths=list(spec.depths),
            widths=list(spec.widths),
            group_widths=[spec.group_width] * num,
            bottleneck_multipliers=[1.0] * num,
            strides=[2] * num,
            se_ratio=spec.se_ratio,
        )
        return RegNet(blocks, num_classes, stem_width=spec.stem_width)
    configs = [
        ConvStemConfig(channels, 3, stride)
        for channels, stride in zip(spec.stem_channels, spec.stem_strides, strict=True)
    ]
    return VisionTransformer(
        spec.image_size,
        spec.patch_size,
        spec.depth,
        spec.num_heads,
        spec.width,
        spec.mlp_dim,
        num_classes=num_classes,
        conv_stem_configs=configs or None,
    )


def timm_network(spec: ViTSpec):
    """timm's VisionTransformer, as in its `vit_base_patch16_224`, with the sizes of `spec`.

    It has no convolutional stem, and is given torchvision's.
    """
    declare_torchvision()
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    class Stem(nn.Module):
        num_patches = (spec.image_size // spec.patch_size) ** 2

        def __init__(self, **_):
            super().__init__()
            self.layers = torchvision_network(spec).conv_proj

        def forward(self, images):
            return self.layers(images).flatten(2).transpose(1, 2)

    return VisionTransformer(
        spec.image_size,
        spec.patch_size,
        num_classes=NUM_CLASSES,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_dim / spec.width,
        **({"embed_layer": Stem} if spec.stem_channels else {}),
    )


def new_network(implementation: str, model: str) -> Callable | None:
    """A function that makes the network; None where this implementation has no such network."""
    spec = MODELS[model]
    is_vit = isinstance(spec, ViTSpec)
    if is_vit and (spec.stem_kernels or spec.stem_norm):
        return None
    if implementation == "torchvision":
        return lambda: torchvision_network(spec)
    return (lambda: timm_network(spec)) if is_vit else None


class TorchStep:
    """A compiled training step with its state and batch on the GPU, or on the CPU without one."""

    def __init__(self, case: Case):
        """Compiles the step and makes the first ones; `compile_seconds` includes both."""
        import torch
        from torch.nn import functional

        recipe, batches = recipe_of(case.optimizer), random_batches(case)
        self._torch = torch
        device = torch.device(device_type())
        self._cuda = device.type == "cuda"
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        network = new_network(case.implementation, case.model)()
        network = network.to(device, memory_format=torch.channels_last).train()
        decayed = [p for p in network.parameters() if p.ndim > 1]
        others = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if case.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(groups, LR, weight_decay=WEIGHT_DECAY, fused=True)
        else:
            self._optimizer = torch.optim.SGD(
                groups, LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
            )
        tensors = [*network.parameters(), *network.buffers()]
        self._weights = [x for x in tensors if x.is_floating_point()]
        self._ema = [x.detach().clone() for x in self._weights]
        mean = torch.tensor(recipe.mean, device=device)[:, None, None]
        std = torch.tensor(recipe.std, device=device)[:, None, None]
        on_device = [
            (
                torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2),
                torch.from_numpy(batch["label"]).long().to(device),
            )
            for batch in batches
        ]
        self._batches = itertools.cycle(on_device)
        height, width = batches[0]["image"].shape[1:3]
        smoothing, in_bfloat16 = recipe.label_smoothing, case.dtype == "bfloat16"

        def loss_of(images, labels, mask, light):
            x = (images.float() / 255 + light[:, :, None, None] - mean) / std
            targets = functional.one_hot(labels, NUM_CLASSES).float()
            targets = (1 - smoothing) * targets + smoothing / NUM_CLASSES
            share = mask.mean()
            x = (mask * x + (1 - mask) * x.flip(0)).contiguous(memory_format=torch.channels_last)
            targets = share * targets + (1 - share) * targets.flip(0)
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
                logits = network(x)
            return functional.cross_entropy(logits.float(), targets)

        def draw():
            if np.random.rand() < 0.5:
                share = np.random.beta(recipe.mixup_alpha, recipe.mixup_alpha)
                mask = torch.full((height, width), share, device=device)
            else:
                mask = torch.ones((height, width), device=device)
                share = np.random.beta(recipe.cutmix_alpha, recipe.cutmix_alpha)
                half = int(height * (1 - share) ** 0.5) // 2
                y, x = np.random.randint(height), np.random.randint(width)
                mask[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
            return mask, recipe.lighting_std * torch.randn(case.batch, 3, device=device)

        self._draw = draw
        self._loss_of = loss_of
        if case.torch_mode != "eager":
            self._loss_of = torch.compile(loss_of, mode=case.torch_mode, dynamic=False)
        self._steps, self._ema_every = 0, recipe.ema_every
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        self.run(3)  # graphs are recorded at the second and third call
        self.compile_seconds = time.perf_counter() - start
        # Weights and EMA; the optimiser made its own after `before`.
        state = sum(x.nbytes for x in self._weights) * 2 + on_device[0][0].nbytes
        self.peak_bytes = torch.cuda.max_memory_allocated() - before + state if self._cuda else None

    def run(self, num_steps: int) -> float:
        """Makes so many steps and waits for them; returns the last loss."""
        torch = self._torch
        for _ in range(num_steps):
            loss = self._loss_of(*next(self._batches), *self._draw())
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._steps += 1
            if self._steps % self._ema_every == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(self._ema, self._weights, EMA_RATE)
        return loss.item()
