"""Options of XLA's compiler, and why: docs/performance_trials.md has the trials."""

from collections.abc import Sequence
import os

import jax

_GPU = {
    # Products only by cuBLAS, which adds a bias on the way; Triton's are as fast, but do not.
    "xla_gpu_enable_triton_gemm": False,
    # Query, key and value would become one product, and three copies out of it.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # XLA's own choice without CONVOLUTION, though each convolution then ends a graph: where the
    # compiler finds in a cache what it would otherwise measure, cuDNN first runs while a graph is
    # recorded, and that failed.
    "xla_gpu_enable_command_buffer": (
        "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"
    ),
    # Conditionals too where little is next to them, such as the EMA's at the end of a step.
    "xla_gpu_graph_min_graph_size": 1,
}


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, str | int | bool]:
    """What to give `jax.jit` as `compiler_options` for steps on these devices.

    Options that the environment's `XLA_FLAGS` set are left out: JAX would override the flags.
    """
    flags = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    options = _GPU if devices[0].platform == "gpu" else {}
    return {name: value for name, value in options.items() if f"--{name}" not in flags}
