"""The contenders in PyTorch compute as they are told to."""

from flax import nnx
import pytest

from benchmarks import jax_contenders, torch_contenders
from benchmarks.workload import Case
from convstem_jax.models import MODELS


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_timed_computes_in_the_type_that_is_asked_for(dtype, monkeypatch):
    model = nnx.eval_shape(jax_contenders.new_model("convstem_jax", "vitc_tiny", dtype))
    assert model.dtype == dtype
    found = []
    network = torch_contenders.torchvision_network(MODELS["vitc_tiny"])
    network.register_forward_hook(lambda _, inputs, logits: found.append(str(logits.dtype)))
    monkeypatch.setattr(torch_contenders, "new_network", lambda *_: lambda: network)
    step = torch_contenders.TorchStep(Case("vitc_tiny", "torchvision", 2, dtype=dtype))
    assert set(found) == {f"torch.{dtype}"}
    batches, loss_of = [], step._loss_of
    step._loss_of = lambda *args: (batches.append(args[0].data_ptr()), loss_of(*args))[1]
    step.run(4)
    assert batches[:2] == batches[2:] and batches[0] != batches[1], "two batches in turns"
