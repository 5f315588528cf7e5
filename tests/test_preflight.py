"""The TPU compiler runs on the step that would be trained, and what it says is read correctly.

`make drill` compiles for all generations, and more; without it a short form stands in for them.
"""

import hashlib
import json
import math
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from convstem_jax import hlo, preflight, provenance, tpu
from convstem_jax.complexity import complexity
from convstem_jax.config import load_config
from convstem_jax.errors import ConfigError
from convstem_jax.jaxprs import float32_products
from convstem_jax.models import create_model
from tests.marks import needs_libtpu

ROOT = pathlib.Path(__file__).parent.parent
DRILL = "DRILL" in os.environ


def run(*flags):
    """In a process of its own, without the tests' devices."""
    command = [sys.executable, "-m", "convstem_jax.preflight", *flags]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def json_of(*flags):
    status, output, error = run(*flags, "--format", "json")
    assert output, error
    return status, json.loads(output)


SLICES = {
    "v3:2x2": (4, 1, 31), "v4:2x2x4": (16, 4, 31), "v5e:4x4": (16, 4, 16),
    "v5p:4x4x4": (64, 16, 96), "v6e:4x4": (16, 4, 31),
}  # fmt: skip


def assert_chips_are_those_of(topology, record):
    chips, hosts, gib = SLICES[topology]
    assert record["topology"] == topology
    assert (record["chips"], record["hosts"]) == (chips, hosts)
    assert record["chip_bytes"] / 2**30 == pytest.approx(gib, abs=1)
    assert record["fits"]
    assert record["bytes_per_chip"] == sum(record["parts"].values()) < record["chip_bytes"]


@pytest.fixture(scope="module")
def vitc_1gf():
    """Its records, by topology."""
    flags = ["--quick", "--config", "configs/vitc.py:1gf", "--topology", *SLICES]
    status, records = json_of(*flags)
    assert status == 0
    return {record["topology"]: record for record in records}


@needs_libtpu
@pytest.mark.skipif(not DRILL, reason="make drill runs it")
@pytest.mark.timeout(900)  # the first compiles for all of them
@pytest.mark.parametrize("topology", SLICES)
def test_vitc_1gf_compiles_for_every_generation(topology, vitc_1gf):
    record = vitc_1gf[topology]
    assert_chips_are_those_of(topology, record)
    assert record["largest_batch"] > 2048
    # 1.077 Gflop of the paper forward, twice that backward, two operations each.
    flops = 6 * 1.077e9 * 2048 / record["chips"]
    assert record["flops_per_chip"] == pytest.approx(flops, rel=0.1)
    # The gradients of 4.57 million parameters, in bfloat16 or float32, and little else.
    reduced = record["compiled"]["collectives"]["all-reduce"][1]
    assert record["compiled"]["collectives"].keys() == {"all-reduce"}
    assert 2 < reduced / 4.57e6 < 4.5
    devices = 2 if topology.startswith("v3") else 1
    assert record["collective_bytes"] == devices * reduced


@needs_libtpu
def test_speed_memory_and_the_fields_that_change_them(tmp_path):
    records = str(tmp_path / "records.jsonl")
    flags = ["--num_classes", "10", "--num_examples", "10000", "--records", records]
    flags += ["--topology", "v5e:4x4", "--config", "configs/quickstart.py"]
    flags += ["configs/quickstart.py:state_sharding=fsdp,accumulate=2"]
    status, [whole, split] = json_of(*flags)
    assert status == 0
    for record in (whole, split):
        assert_chips_are_those_of("v5e:4x4", record)
    # Forward and twice that backward, two operations each; less in the last block.
    model = nnx.eval_shape(lambda: create_model("vitc_tiny", num_classes=10, rngs=nnx.Rngs(0)))
    flops = 6 * complexity(model).flops * 64 / 16
    assert 0.8 < whole["flops_per_chip"] / flops < 1
    assert split["flops_per_chip"] == pytest.approx(whole["flops_per_chip"], rel=0.1)
    reduced = whole["compiled"]["collectives"]["all-reduce"][1]
    assert 2 < reduced / (whole["parts"]["params"] / 4) < 4.5, "gradients, and little else"
    cycles, more_cycles = (record["compiled"]["cycles"] for record in (whole, split))
    assert cycles < more_cycles < 2 * cycles
    assert split["parts"]["params"] < 0.7 * whole["parts"]["params"]
    gathered = split["compiled"]["collectives"]["all-gather"]
    assert "all-gather" not in whole["compiled"]["collectives"]
    # Most of the 19 split arrays once or twice, on the way forward and back, in bfloat16; those of
    # query, key and value once.
    size = 16 * (split["parts"]["params"] - 2**10 * 64)
    assert gathered[0] >= 15 and gathered[1] > 0.3 * size
    for record in (whole, split):
        assert 0 < record["mfu"] < 0.5
        steps = 24 * 10_000 // 64
        assert record["hours"] == pytest.approx(steps * record["step_seconds"] / 3600, rel=0.01)
        assert record["images_per_second"] == pytest.approx(64 / record["step_seconds"])
    # What is known is not compiled again, and the table is made from it.
    seconds = [record["compile_seconds"] for record in (whole, split)]
    status, table, _ = run(*flags, "--format", "markdown")
    kept = pathlib.Path(records).read_text().splitlines()
    assert status == 0 and table.count("vitc_tiny") == 2 and "v5e:4x4" in table
    assert [json.loads(line)["compile_seconds"] for line in kept] == seconds


class Lowered:
    """A program that nobody compiles."""

    def lower(self):
        return self

    def as_text(self):
        return "program"

    def compile(self, compiler_options):
        raise AssertionError("compiled")


def test_only_what_the_compiler_said_of_the_same_is_known(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sha256 = hashlib.sha256(b"program").hexdigest()
    known = {"sha256": sha256, "quick": False, "versions": provenance.versions(), "flags": {}}
    known |= {"cycles": 7}
    assert tpu.compile_step(Lowered(), None, False, known) == known
    flags = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=16384"}
    for other in (
        {"sha256": "of an older step"}, {"quick": True}, {"versions": {"jax": "0"}},
        {"flags": flags},
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="compiled"):
            tpu.compile_step(Lowered(), None, False, known | other)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags["LIBTPU_INIT_ARGS"])
    assert tpu.compile_step(Lowered(), None, False, known | {"flags": flags})["cycles"] == 7
    with pytest.raises(AssertionError, match="compiled"):
        tpu.compile_step(Lowered(), None, False, known)


ON_A_CHIP = ["--quick", "--topology", "v5e:1x1", "--config"]
TOO_LARGE = "configs/quickstart.py:batch_size=262144"


@pytest.fixture(scope="module")
def too_large():
    """Its record."""
    status, [record] = json_of(*ON_A_CHIP, TOO_LARGE)
    assert status == 6
    return record


@needs_libtpu
def test_what_does_not_fit_comes_with_the_remedy(too_large):
    assert not too_large["fits"] and too_large["bytes_per_chip"] > too_large["chip_bytes"]
    assert too_large["remedy"].startswith("set config.accumulate=")
    assert too_large["step_seconds"] is None, "the least effort says nothing about speed"
    assert 10_000 < too_large["largest_batch"] < 262144


@needs_libtpu
@pytest.mark.skipif(not DRILL, reason="make drill runs it")
def test_the_remedy_and_the_largest_batch_fit(too_large):
    largest, remedy = too_large["largest_batch"], too_large["remedy"].removeprefix("set config.")
    configs = [f"{TOO_LARGE},{remedy}"]
    configs += [f"configs/quickstart.py:batch_size={n}" for n in (largest, 2 * largest)]
    _, records = json_of(*ON_A_CHIP, *configs)
    assert [record["fits"] for record in records] == [True, True, False]


STEM_ON_V6E = """
from flax import nnx
import jax
import jax.numpy as jnp
from convstem_jax import hlo, tpu
from convstem_jax.models.stems import ConvStem
from convstem_jax.sharding import Sharding
from convstem_jax.step import split_model

def loss(graphdef, params, batch_stats, images):
    return nnx.merge(graphdef, params, batch_stats)(images).sum()

def new():
    sizes = (3, 3, 3), (24, 48, 96), (2, 2, 2), 192
    return ConvStem(*sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

graphdef, params, batch_stats = split_model(nnx.eval_shape(new))
images = jax.ShapeDtypeStruct((32, 224, 224, 3), "float32")
sharding = Sharding(tpu.open_slice("v6e:1x1").devices)
step = sharding.jit(jax.grad(loss, 1), graphdef, in_shardings=sharding.replicated)
step.lower(params, batch_stats, images).compile()
"""


@needs_libtpu
@pytest.mark.skipif(not DRILL, reason="make drill runs it")
def test_the_compiler_survives_the_stem_on_v6e():
    """With the layers' gradients fused it dies of signal 11."""
    command = [sys.executable, "-c", STEM_ON_V6E]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


LARGE_PRODUCT = """
import sys
import jax
from convstem_jax import hlo, tpu

n = 4096
for name in sys.argv[1:]:
    slice_ = tpu.open_slice(name)
    sharding = jax.sharding.SingleDeviceSharding(slice_.devices[0])
    x = jax.ShapeDtypeStruct((n, n), "bfloat16", sharding=sharding)
    program = hlo.read_program(jax.jit(lambda a, b: a @ b).lower(x, x).compile().as_text())
    peak = slice_.chip.flops * slice_.num_chips / len(slice_.devices)
    print(name, 2 * n**3 / (program.cycles / slice_.chip.clock) / peak)
"""


@needs_libtpu
def test_a_large_product_is_estimated_near_the_published_peak():
    """A wrong clock, or cycles read wrongly, would make every step time wrong."""
    names = ["v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"] if DRILL else ["v6e:2x2"]
    command = [sys.executable, "-c", LARGE_PRODUCT, *names]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    shares = {name: float(share) for name, share in map(str.split, done.stdout.splitlines())}
    assert list(shares) == names, done.stderr
    assert all(0.8 < share < 1 for share in shares.values()), shares


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:16", "v99:2x2", "v5e:2x2x2", "v4:4x4", "v5e:0x4", "v5litepod-256"]
)
def test_wrong_topologies_are_refused(name):
    with pytest.raises(ConfigError, match=f"--topology {name} is not one of .* v5e:16x16"):
        tpu.open_slice(name)


@needs_libtpu
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--topology", "v5e:2x2", "v5e:foo"], "v5e:foo"),
        (
            ["--topology", "v5e:2x2", "--records", "pyproject.toml"],
            "--records pyproject.toml holds",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_compiled(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "preflight", lambda *args, **kwargs: pytest.fail("it compiled"))
    assert preflight.main(["--config", "configs/vitc.py", *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/x.jsonl", "link", "pipe"])
def test_records_that_cannot_be_written_are_refused(name, tmp_path, capsys):
    """The file is replaced by a new one, which must not happen to a link or a device."""
    (tmp_path / "link").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as error:
        preflight.main(["--config", "configs/vitc.py", "--records", str(tmp_path / name)])
    assert error.value.code == 2
    assert f"{name} cannot be written: name a file" in capsys.readouterr().err


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tpu.os, "environ", {})
    with pytest.raises(ConfigError, match=r"-r requirements.lock -r requirements-tpu.lock"):
        tpu.open_slice("v5e:2x2")


@pytest.mark.parametrize(
    "rest, images, accumulate, sharding, remedy",
    [
        # A state of 8 in a memory of 20: 12 are free.
        (14, 8, 1, "replicated", "set config.state_sharding=fsdp"),
        (14, 8, 1, "fsdp", "set config.accumulate=2"),
        (30, 8, 1, "replicated", "set config.accumulate=4"),
        (36, 4, 1, "replicated", "set config.accumulate=2 and config.state_sharding=fsdp"),
        (36, 8, 2, "fsdp", "take more chips, or set a smaller config.batch_size"),
        (14, 2, 1, "fsdp", "take more chips, or set a smaller config.batch_size"),
    ],
)
def test_the_remedy_changes_the_numbers_as_little_as_it_can(
    rest, images, accumulate, sharding, remedy
):
    config = load_config("configs/vitc.py")
    config.batch_size, config.accumulate = 16 * images, accumulate
    config.state_sharding = sharding
    parts = {"params": 2, "opt_state": 4, "ema": 2, "input": 1}
    assert preflight._remedy(config, 16, rest, 12, parts) == remedy


def test_other_files_are_not_taken_for_records(tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    for text in ("{", '{"a": 1}'):
        file.write_text(text)
        flags = ["--config", "configs/vitc.py", "--topology", "v5e:2x2", "--records", str(file)]
        assert preflight.main(flags) == 2
        assert "holds something else" in capsys.readouterr().err


def test_a_quick_answer_replaces_no_whole_one(tmp_path, monkeypatch, capsys):
    def answer(config, topology, *, quick, known, **unused):
        return known or {"topology": topology, "quick": quick, "fits": True}

    monkeypatch.setattr(preflight, "preflight", answer)
    file = tmp_path / "records.jsonl"
    flags = ["--config", "configs/vitc.py", "--topology", "v5e:2x2", "--records", str(file)]
    for more in ([], ["--quick"], []):
        assert preflight.main([*flags, *more, "--format", "json"]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["quick"] for record in records] == [False, True]


HLO = """HloModule jit_step, is_scheduled=true

%inner (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"7"}
}

%body (p: f32[8]) -> f32[8] {
  %f = f32[8]{0} fusion(%p), calls=%inner, backend_config={"estimated_cycles":"100"}
  %r = f32[1000]{0} all-reduce(%f), to_apply=%sum
}

%cond (p: f32[8]) -> pred[] {
  %n = s32[]{:T(256)} constant(4)
  ROOT %lt = pred[]{:T(1024)} compare(%i, %n), direction=LT
}

%until (p: f32[8]) -> pred[] {
  %n = f32[1]{0} constant({0.5})
  ROOT %lt = pred[]{:T(1024)} compare(%p, %n), direction=LT
}

%short (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1"}
}

%long (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"50"}
}

%begin (p: bf16[4]) -> f32[8] {
  %h = bf16[32]{0} all-gather(%p), channel_id=7, backend_config={"estimated_cycles":"9"}
}

%end (p: bf16[4]) -> f32[8] {
  %h = bf16[32]{0} all-gather(%p), channel_id=7, backend_config={"estimated_cycles":"9"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (f32[8]{0}, s32[]) while(%t), condition=%cond, body=%body
  %e = (f32[8]{0}, s32[]) while(%t), condition=%until, body=%short
  %i = f32[8]{0} conditional(%x, %p, %p), branch_computations={%short, %long}
  %g = (bf16[4]{0}, bf16[64]{0}) all-gather-start(%p), dimensions={0}
  %d = bf16[64]{0} all-gather-done(%g)
  %y = f32[8]{0} fusion(%p), calls=%begin, backend_config={"estimated_cycles":"10"}
  %x = f32[8]{0} fusion(%y), calls=%end, backend_config={"estimated_cycles":"20"}
  %k = (f32[24]{0:T(128)S(1)}, bf16[192,576]{1,0}) all-reduce(%p, %q), to_apply=%sum
  %z = f32[8]{0} fusion(%p), calls=%inner, backend_config={"estimated_cycles":"1000"}
}
"""


def test_loops_and_branches_are_counted_as_they_run():
    program = hlo.read_program(HLO)
    assert program.cycles == 4 * 100 + 1 + 50 + 1000 + 10 + 20
    assert program.collectives == {
        "all-gather": (2, 64 * 2 + 32 * 2),  # one of them in two fusions
        "all-reduce": (5, 4 * 4000 + 24 * 4 + 192 * 576 * 2),
    }


@pytest.mark.parametrize(
    "topology, links", [("v5e:16x16", 4), ("v5e:4x4", 2), ("v4:2x2x4", 3), ("v4:4x4x4", 6)]
)
def test_a_chip_sends_along_each_axis_and_twice_along_a_ring(topology, links):
    generation, _, shape = topology.partition(":")
    n = math.prod(map(int, shape.split("x")))
    slice_ = tpu.Slice(topology, tpu.CHIPS[generation], list(range(n)), n, 1)
    seconds = tpu.collective_seconds(slice_, {"all-reduce": (3, 10**9)})
    assert seconds == pytest.approx(2 * 1e9 * (n - 1) / n / links / 45e9)


def test_another_form_of_program_is_not_read_as_an_empty_one():
    with pytest.raises(ValueError, match="no entry"):
        hlo.read_program(HLO.replace("ENTRY", "START"))


def test_the_memory_that_lacks_is_read_from_the_error():
    text = "the total memory required for HLO temporaries (2.00T) exceeds available HBM (15.75G)."
    assert tpu.out_of_memory(RuntimeError(text)) == (2 * 2**40, round(15.75 * 2**30))
    text = "Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded"
    assert tpu.out_of_memory(RuntimeError(text)) == (round(21.5 * 2**30), round(15.75 * 2**30))
    assert tpu.out_of_memory(RuntimeError("INVALID_ARGUMENT")) is None


def test_float32_products_are_found_inside_loops_and_jits():
    half, full = jnp.zeros((4, 4), jnp.bfloat16), jnp.zeros((4, 4))

    def step(x, y):
        x, _ = jax.lax.scan(lambda c, _: (c @ x, None), x, length=2)
        return jax.jit(lambda y: y @ y)(y), x @ x

    found = float32_products(jax.make_jaxpr(step)(half, full).jaxpr)
    assert found == {"float32[4, 4] x float32[4, 4]": 1}
