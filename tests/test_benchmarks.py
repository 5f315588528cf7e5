"""The benchmarks run, and write what they promise."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import types

from flax import nnx
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    around_step,
    contenders,
    input_speed,
    jax_contenders,
    population,
    profile_step,
    reading,
    roofline,
    torch_contenders,
    tpu_cycles,
    train_step,
)
from benchmarks.workload import Case
from convstem_jax.complexity import complexity
from convstem_jax.data import autoaugment
from convstem_jax.models import MODELS, create_model
from tests.marks import needs_libtpu

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.usefixtures("shallow")
def test_population(tmp_path, monkeypatch, capsys):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    file = tmp_path / "population.json"
    flags = ["--model=vitp_tiny", "--trials=4", "--batch_size=8", "--steps=2", "--repeats=1"]
    assert population.main([*flags, f"--json={file}"]) == 0
    [row] = json.loads(file.read_text())
    assert (row["trials"], row["trials_at_a_time"]) == (4, 2)
    assert row["ratio"] == pytest.approx(row["population_seconds"] / row["runs_seconds"], rel=0.05)
    assert "ratio" in capsys.readouterr().out


def test_reading(tmp_path, capsys):
    """What docs/data_on_a_pod.md decides by: the installed reader asks anew for every record."""
    preflight = tmp_path / "records.jsonl"
    record = {"spec": "configs/vitc.py", "topology": "v5e:4x4", "hosts": 4}
    records = [record | {"images_per_second": speed} for speed in (8000.0, None)]
    preflight.write_text("".join(json.dumps(r) + "\n" for r in records))
    file = tmp_path / "reading.json"
    flags = ["--records=60", "--reads=30", "--threads", "2", "--latency_ms", "5"]
    flags += [f"--folder={tmp_path}", f"--preflight={preflight}", f"--json={file}"]
    assert reading.main(flags) == 0
    tables = json.loads(file.read_text())
    from_file, from_bucket = tables["reading"]
    assert 0 < from_bucket["records_per_second"] < 2 / 0.005 and from_file["records_per_second"] > 0
    assert from_bucket["requests"] == 1 and from_bucket["bytes_sent_per_byte"] >= 1
    [need] = tables["demand"]
    assert tables["about"]["command"] == flags and tables["about"]["versions"]["jax"]
    assert need["images_per_second_and_host"] == 2000 and need["mb_per_second_and_host"] == 230
    assert "v5e:4x4" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [file, preflight], "it cleans up"


def test_input_speed(tmp_path, monkeypatch, capsys):
    def slow(image, rng):
        time.sleep(0.02)
        return image

    rng = np.random.default_rng(1)
    some = itertools.cycle([input_speed.photograph(rng) for _ in range(3)])
    assert 100_000 < np.mean([len(next(some)) for _ in range(3)]) < 130_000
    monkeypatch.setattr(input_speed, "photograph", lambda rng: next(some))
    monkeypatch.setattr(autoaugment, "auto_augment", slow)
    by_workers, found = input_speed.batches_per_second, []

    def by_threads(examples, batch_size, num_workers, seconds):
        assert num_workers == 3
        found.append(examples[0]["image"])
        return by_workers(examples, batch_size, 0, seconds)

    monkeypatch.setattr(input_speed, "batches_per_second", by_threads)
    file = tmp_path / "input_speed.json"
    flags = ["--workers=3", "--batch=8", "--images=3", "--seconds=0.3", f"--json={file}"]
    assert input_speed.main(flags) == 0
    decode, crop, augment, all_of_it, batches = json.loads(file.read_text())
    seconds = [1 / row["images_per_second"] for row in (decode, crop, augment, all_of_it)]
    assert seconds[2] >= 0.02 and sum(seconds[:3]) == pytest.approx(seconds[3])
    assert batches["workers"] == 3 and 0 < batches["images_per_second"] < 1 / 0.02
    assert "AutoAugment" in capsys.readouterr().out
    assert found[0].shape == (224, 224, 3) and 40 < found[0].std() < 80
    with pytest.raises(SystemExit):
        input_speed.main(["--batch=12"])
    assert "--batch 12 is no multiple of the 8 devices here" in capsys.readouterr().err
    quick = ["--config", "configs/quickstart.py", "--images=3"]
    assert input_speed.main([*quick, *flags[:2], *flags[3:]]) == 0
    whats = [row["what"] for row in json.loads(file.read_text())]
    assert whats == ["decode", "crop, resize, flip", "all of it", "batches"]
    assert input_speed.main(["--config", "configs/vitc.py:data_dir=nowhere"]) == 2
    assert "error: data set 'imagenet2012' is not in nowhere" in capsys.readouterr().err


def test_train_step(tmp_path):
    file = tmp_path / "train_step.json"
    flags = ["--models=vitp_tiny", "--batch=4", "--steps=1", "--repeats=3", f"--json={file}"]
    flags += ["--implementations", "convstem_jax", "torchvision", "timm"]
    flags += ["--xla_options", "xla_unheard_of=1"]
    # As a file, of which the contenders' processes know too, and from anywhere.
    command = [sys.executable, ROOT / "benchmarks/train_step.py", *flags]
    command += ["--torch_mode=eager", "--matmul_size=64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = json.loads(file.read_text())
    assert [row["implementation"] for row in rows] == ["convstem_jax", "torchvision"]
    for row in rows:
        assert row["images_per_second"] > 0 and row["mfu"] > 0 and row["batch"] == 4
    assert rows[0]["speed_over_its"] == 1
    assert done.stdout.count("vitp_tiny") == 2 and "left out: timm" in done.stderr
    assert "left out: convstem_jax xla_unheard_of=1, vitp_tiny: " in done.stderr


@pytest.mark.usefixtures("shallow")
def test_steps_in_one_call_are_the_same_steps(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    same = {"image": images, "label": np.arange(2, dtype=np.int32)}
    two = jax_contenders.Training.of(Case("vitp_tiny", "convstem_jax", 2)).batches
    (a, b), (c, d) = ([next(two)[name] for _ in range(2)] for name in ("image", "label"))
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() and (a != b).any()
    assert c.unsafe_buffer_pointer() != d.unsafe_buffer_pointer()
    monkeypatch.setattr(jax_contenders, "random_batches", lambda case: [same, same])

    def loss_and_step(in_a_call):
        case = Case("vitp_tiny", "convstem_jax", 2, dtype="float32", in_a_call=in_a_call)
        step = jax_contenders.JaxStep(case)
        made = int(step._state.step)
        return step.run(8 - made), made, int(step._state.step)

    (loss, *made), (expected, *made_of_one) = loss_and_step(2), loss_and_step(1)
    assert made == [6, 8] and made_of_one == [3, 8]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_on_gpu_asks_for_a_gpu(tmp_path):
    env = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "benchmarks/on_gpu.sh", tmp_path / "results"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "JAX finds no GPU here" in done.stderr
    done = subprocess.run([command[0], "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("All tests and benchmarks") and "set -uo" not in done.stdout
    assert subprocess.run([command[0], "--jason"], capture_output=True).returncode == 2


def fake_serve(pipe, case):
    """A contender's process that does what its name says."""
    if case.implementation == "plain Flax, bfloat16":
        os._exit(7)  # while it compiles
    pipe.send((0.1, 0))
    pipe.recv()
    if case.implementation == "timm":
        os._exit(8)
    pipe.send((float("nan") if case.implementation == "plain Flax, float32" else 1.0, 0.1))
    pipe.recv()
    pipe.send((1.0, 0.1))


@pytest.fixture
def processes_of_one(monkeypatch):
    """Contenders' processes are copies of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.mark.usefixtures("processes_of_one")
@pytest.mark.parametrize("together", [1, 2])
def test_train_step_goes_on_without_those_that_fail(tmp_path, monkeypatch, capsys, together):
    monkeypatch.setattr(contenders, "_serve", fake_serve)
    monkeypatch.setattr(train_step, "missing", lambda *_: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    file = tmp_path / "train_step.json"
    flags = ["--models", "vitp_tiny", "vitc_tiny", "--batch", "4", "2", "--repeats=2"]
    flags += ["--matmul_size=64", "--overlap=1", f"--together={together}", f"--json={file}"]
    flags += ["--steps=4", "--steps_in_a_call=2"]
    assert train_step.main([*flags, "--skip", "*:torchvision", "vitc_*:[!c]*"]) == 1
    rows = json.loads(file.read_text())
    assert [(row["model"], row["implementation"], row["batch"]) for row in rows] == [
        (model, name, batch)
        for model, batch in (("vitp_tiny", 4), ("vitc_tiny", 2))
        for name in ("convstem_jax", "convstem_jax (2 steps a call)")
    ]
    error = capsys.readouterr().err
    assert ("(load 99.0): the ratios will be wrong" in error) == (jax.default_backend() == "cpu")
    for name, reason in (
        ("plain Flax, bfloat16", "its process ended with status 7"),
        ("plain Flax, float32", "its loss is nan"),
        ("timm", "its process ended with status 8"),
    ):
        assert f"left out: {name}, vitp_tiny: {reason}" in error
    second_is_compiled = error.index("vitc_tiny: compiled")
    assert (second_is_compiled < error.index("vitp_tiny: its loss is nan")) is (together == 2)


@pytest.mark.usefixtures("processes_of_one")
@pytest.mark.parametrize(("overlap", "most"), [(0, 1), (2, 4)])
def test_so_many_of_each_framework_compile_at_once(monkeypatch, overlap, most):
    busy, peak = [], 0

    class Watched(contenders.Contender):
        def __init__(self, case):
            nonlocal peak
            busy.append(case.implementation)
            peak = max(peak, len(busy))
            num_torch = sum(name in contenders.TORCH for name in busy)
            assert max(num_torch, len(busy) - num_torch) <= max(1, overlap)
            super().__init__(case)

        def compiled(self):
            super().compiled()
            busy.remove(self.case.implementation)

    monkeypatch.setattr(contenders, "_serve", quick_serve)
    monkeypatch.setattr(contenders, "Contender", Watched)
    names = [*contenders.JAX[:2], *contenders.TORCH]
    cases = [Case("vitp_tiny", name, batch=2) for name in names]
    found = contenders.all_compiled(cases, overlap, None)
    assert sorted(contender.case for contender in found) == sorted(cases)
    assert peak == most and not busy


def quick_serve(pipe, case):
    """A contender's process that is compiled at once."""
    pipe.send((0.1, 0))


class FakeContender:
    """Takes so many seconds for each step of its turns."""

    def __init__(self, name, seconds, order):
        self.case = Case("vitp_1gf", name, batch=8)
        self.compile_seconds, self.peak_bytes = 1.0, None
        self._seconds, self._order = iter(seconds), order

    def seconds(self, num_steps):
        self._order.append(self.case.name)
        return next(self._seconds)


def test_medians_ratios_and_mfu():
    order = []
    both = [
        FakeContender("convstem_jax", (1.0, 2.0, 9.0), order),
        FakeContender("timm", (4.0, 4.0, 9.0), order),
    ]
    rows = train_step.rows_of("vitp_1gf", train_step.take_turns(both, 5, 3, None), peak=1e9)
    assert order == ["convstem_jax", "timm", "timm", "convstem_jax", "convstem_jax", "timm"]
    assert [row["images_per_second"] for row in rows] == [8 / 2, 8 / 4]
    assert [row["speed_over_its"] for row in rows] == [1, 2], "medians of 4, 2 and 1"
    # Table 1: 1.1 billion multiply-adds, each of them two operations, three times.
    assert rows[0]["mfu"] == pytest.approx(6 * 1.08e9 * 4 / 1e9, rel=0.01)


@pytest.mark.usefixtures("shallow")
def test_on_tpus_contenders_share_the_process(monkeypatch):
    """One process alone can open a TPU. The threads are looked at, on the device here."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "and JAX runs on tpu" in contenders.missing("vitp_tiny", "torchvision")
    cases = [Case("vitp_tiny", name, 2, dtype="float32") for name in contenders.JAX[::2]]
    failed = Case("vitp_tiny", "convstem_jax", 2, xla_options=(("xla_unheard_of", "1"),))
    left_out, before = [], threading.active_count()
    cached = jax.config.jax_enable_compilation_cache
    try:
        found = contenders.all_compiled([*cases, failed], 0, lambda *x: left_out.append(x))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    assert [x.case for x in found] == cases and threading.active_count() == before + 2
    assert left_out[0][0] == failed and "xla_unheard_of" in str(left_out[0][1])
    assert all(x.seconds(2) > 0 for x in found) and not multiprocessing.active_children()
    for contender in found:
        contender.end()
    assert threading.active_count() == before


def test_what_is_out_of_memory_is_told_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "_serve", serve_without_memory)
    flags = ["--models=vitp_tiny", "--implementations=convstem_jax", "--matmul_size=64"]
    assert train_step.main(flags) == 1
    assert "16 GiB (all that take turns share it: lower --batch or" in capsys.readouterr().err


def serve_without_memory(pipe, case):
    """A contender's process for which the device is too small."""
    pipe.send("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16 GiB")


def test_on_gpu_goes_on_and_names_what_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >>"$0.calls"\ncase "$*" in *vitc_18gf*) exit 3 ;; esac\n'
    )
    python.chmod(0o755)
    command = [ROOT / "benchmarks/on_gpu.sh", tmp_path]
    env = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: vitc_18gf\n" in done.stderr
    calls = (tmp_path / "python.calls").read_text()
    batches = re.findall(r"--models (.*) --batch (\d+) --together 2 --torch_mode", calls)
    assert batches[1] == ("vitc_1gf vitp_1gf", "256") and batches[2] == ("regnety_4gf", "128")
    assert len(batches) == 5 and "benchmarks.population" in calls and "benchmarks.roofline" in calls
    assert f"--json {tmp_path}/train_step_vitc_36gf.json\n" in calls
    assert "--implementations convstem_jax --json" in calls
    (tmp_path / "python.calls").unlink()
    env |= {"PARTS": "vitc_1gf around", "TORCH_MODE": "default", "FLAGS": "--repeats 3"}
    subprocess.run(command, env=env, check=True)
    _, train_step, *around = (tmp_path / "python.calls").read_text().splitlines()
    assert "--models vitc_1gf" in train_step and train_step.endswith(".json --repeats 3")
    assert "--torch_mode default" in train_step and all(
        "benchmarks.around_step" in call for call in around
    )
    env["PARTS"] = "vitc_1gf vitc1gf"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "PARTS has 'vitc1gf', which is not one of" in done.stderr


@pytest.mark.parametrize("name", ["vitc_18gf", "vitp_1gf"])
def test_the_plain_model_is_the_same_network(name):
    def sizes(implementation):
        model = nnx.eval_shape(jax_contenders.new_model(implementation, name))
        params = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return sum(x.size for x in params)

    assert sizes("plain Flax, bfloat16") == sizes("convstem_jax")
    assert jax_contenders.new_model("plain Flax, bfloat16", "regnety_1gf") is None


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


COUNT, EVEN = "must be a whole number of 1 or more", "must be even: images are mixed in pairs"


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (around_step, "--batch 3", f"--batch: '3' {EVEN}"),
        (around_step, "--steps 0", f"--steps: '0' {COUNT}"),
        (population, "--trials 0", f"--trials: '0' {COUNT}"),
        (population, "--repeats=-1", f"--repeats: '-1' {COUNT}"),
        (reading, "--threads 2 0", f"--threads: '0' {COUNT}"),
        (reading, "--latency_ms 30 -1", "--latency_ms -1 must be 0 or more"),
        (roofline, "--batch 0", f"--batch: '0' {COUNT}"),
        (tpu_cycles, "--batch=many", f"--batch: 'many' {COUNT}"),
        (train_step, "--batch 2 3", f"--batch: '3' {EVEN}"),
        (train_step, "--matmul_size 1.5", f"--matmul_size: '1.5' {COUNT}"),
    ],
)
def test_a_wrong_count_is_refused(program, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        program.main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_train_step_refuses_what_does_not_fit_together(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--models", "vitc_1gf", "vitc_4gf", "vitc_1gf"])
    assert "--models names one twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--models", "vitc_1gf", "vitc_4gf", "--batch", "2", "4", "6"])
    assert "--batch has 3 sizes for 2 models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--xla_options", "xla_gpu_graph_min_graph_size"])
    assert "is not NAME=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--steps", "9", "--steps_in_a_call", "4"])
    assert "--steps 9 is no multiple of 4 in a call" in capsys.readouterr().err


@pytest.mark.usefixtures("shallow")
@needs_libtpu
def test_tpu_cycles(tmp_path, monkeypatch, capsys):
    """Of the compiler itself tests/test_preflight.py has more."""
    compiled = []

    def compile_step(traced, slice_, *, quick, known):
        if known:
            return known
        compiled.append(str(traced.jaxpr))
        return {"cycles": 10**6 * len(compiled)}

    monkeypatch.setattr(tpu_cycles.tpu, "compile_step", compile_step)
    file = tmp_path / "cycles.json"
    names = ["convstem_jax", "plain Flax, bfloat16"]
    flags = ["--models", "vitp_tiny", "--topology", "v5e:1x1", "--batch=8", f"--json={file}"]
    for _ in range(2):  # An estimate is not made again.
        assert tpu_cycles.main([*flags, "--implementations", *names]) == 0
        assert "1.0 | 2.0 | 0.50" in " ".join(capsys.readouterr().out.split())
    assert [row["implementation"] for row in json.loads(file.read_text())] == names
    ours, plain = compiled
    assert ours != plain, "two networks"


def test_tpu_cycles_refuses_a_file_of_something_else(tmp_path, capsys):
    file = tmp_path / "notes.json"
    file.write_text('{"a": 1}')
    with pytest.raises(SystemExit):
        tpu_cycles.main([f"--json={file}"])
    assert "notes.json holds something else" in capsys.readouterr().err
    assert file.read_text() == '{"a": 1}'


@pytest.mark.usefixtures("shallow")
def test_around_step(tmp_path, monkeypatch, capsys):
    in_new_processes, kept = [], []

    def in_this_process(function, *args):
        in_new_processes.append(function)
        jax.clear_caches()
        compilation_cache.reset_cache()  # what is in memory: the files stay
        result = function(*args)
        if function is around_step.compile_seconds:
            kept.append(sorted(os.listdir(args[-1])))
        return result

    monkeypatch.setattr(around_step, "_in_a_new_process", in_this_process)
    file, cache = tmp_path / "around.json", jax.config.jax_compilation_cache_dir
    flags = ["--models=vitp_tiny", "--batch=8", "--steps=2", "--repeats=3", f"--json={file}"]
    try:
        assert around_step.main(flags) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()
    compiling = [around_step.compile_seconds] * 2
    assert in_new_processes == [*compiling, around_step.measure]
    [row] = json.loads(file.read_text())
    assert min(row["mixing_over_step"], row["host_seconds"], row["step_seconds"]) > 0
    assert row["evaluation_over_training_rate"] > 0
    assert row["warm_over_cold"] > 0
    cold, warm = ([x for x in names if x.endswith("-cache")] for names in kept)
    assert cold and cold == warm, "the second compilation found nothing"
    assert np.isfinite(row["save_blocks_seconds"]) and row["save_call_seconds"] > 0
    assert "vitp_tiny" in capsys.readouterr().out


def test_what_is_told_around_the_step():
    train, evaluate, mix = np.array([[2.0, 4.0, 3.0], [1.0, 1.0, 1.0], [0.2, 0.2, 0.6]])
    save = np.array([2 * 5 + 1, 4 * 5 + 3, 3 * 5 + 2])
    found = around_step.medians(train, evaluate, mix, train / 2, save / 100, save, num_steps=5)
    assert found == {
        "step_seconds": 3,
        "host_seconds": 1.5,
        "mixing_over_step": pytest.approx(0.1),
        "evaluation_over_training_rate": 3,
        "save_call_seconds": 0.17,
        "save_blocks_seconds": 2,
    }


def test_what_is_measured_has_a_process_of_its_own():
    found = {around_step._in_a_new_process(os.getpid) for _ in range(2)}
    assert len(found) == 2 and os.getpid() not in found


def test_around_step_goes_on_without_a_model_that_fails(tmp_path, monkeypatch, capsys):
    def in_a_new_process(function, model, *_):
        if model == "vitp_tiny" and function is around_step.measure:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED\nmore")
        return {"model": model} if function is around_step.measure else 1.0

    monkeypatch.setattr(around_step, "_in_a_new_process", in_a_new_process)
    monkeypatch.setattr(around_step, "table", str)
    file = tmp_path / "around.json"
    assert around_step.main(["--models", "vitp_tiny", "vitc_tiny", f"--json={file}"]) == 1
    assert [row["model"] for row in json.loads(file.read_text())] == ["vitc_tiny"]
    error = capsys.readouterr().err
    assert "left out: vitp_tiny: RuntimeError: CUDNN_STATUS_EXECUTION_FAILED\n" in error


@pytest.mark.usefixtures("shallow")
def test_the_kernels_of_a_step(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    flags = ["--model=vitp_tiny", "--batch=8", "--top=2", f"--json={file}"]
    assert profile_step.main(flags) == 0
    rows, output = json.loads(file.read_text()), capsys.readouterr().out
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds, reverse=True) and sum(row["times"] for row in rows) > 50
    assert any("fusion" in row["name"] for row in rows)
    assert f"{len(rows) - 2} others" in output and len(output.splitlines()) == 6
    assert f"{1e3 * sum(seconds):.2f} ms of all threads in" in output
    assert profile_step.main([*flags, "--host"]) == 0
    found = {row["name"]: row["times"] for row in json.loads(file.read_text())}
    assert found["PjitFunction(jit(train_step))"] >= 1
    assert not [name for name in found if name.startswith(("while", "call", "conditional"))]
    assert not found.keys() & {row["name"] for row in rows}
    with pytest.raises(SystemExit):
        profile_step.main(["--model=regnety_tiny", "--implementation=plain Flax, bfloat16"])
    assert "plain Flax, bfloat16 has no regnety_tiny" in capsys.readouterr().err


def test_what_lasts_as_long_as_its_parts_counts_for_the_rest():
    times = [(0, 10), (20, 5), (1, 3), (2, 1), (5, 5), (10, 4)]
    events = [types.SimpleNamespace(start_ns=start, duration_ns=ns) for start, ns in times]
    assert profile_step._own_ns(events) == [2, 5, 2, 1, 5, 4]


def test_kernels_of_a_small_program_by_hand():
    """relu(x w) is one kernel with the product, the two sums of its result are one more."""

    @jax.jit
    def program(x, w, v):
        y = jax.nn.relu(x @ w)  # [8, 32]
        full = y.astype(jnp.float32)
        return jnp.transpose(y) @ v, full.sum(axis=0), (full * full).sum(axis=0)

    shapes = ((8, 16), (16, 32), (8, 4))
    jaxpr = jax.make_jaxpr(program)(*(jnp.zeros(shape, jnp.bfloat16) for shape in shapes)).jaxpr
    found = sorted(roofline.kernels(jaxpr), key=lambda kernel: -kernel.flops)
    assert [kernel.flops for kernel in found] == [2 * 8 * 16 * 32, 2 * 32 * 8 * 4, 0]
    x, w, v, y, out, one_sum = 8 * 16, 16 * 32, 8 * 4, 8 * 32, 32 * 4, 32
    assert [kernel.bytes for kernel in found] == [
        2 * (x + w + y), 2 * (y + v + out), 2 * y + 2 * one_sum * 4
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "least", "most"),
    # No gradient of the images is needed, and a multiplication and an addition are two. Of a ViT's
    # last block nearly all is left out.
    [("vitc_4gf", 5.4, 5.7), ("vitp_1gf", 5.4, 5.7), ("regnety_4gf", 5.9, 6.1)],
)
def test_the_roofline_counts_three_forward_passes(monkeypatch, name, least, most):
    one_block_a_stage = dataclasses.replace(MODELS["regnety_4gf"], depths=(1, 1, 1, 1))
    monkeypatch.setitem(MODELS, "regnety_4gf", one_block_a_stage)
    forward = complexity(nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0)))).flops
    flops = sum(kernel.flops for kernel in roofline.step_kernels(name, 64, "NVIDIA H200")) / 64
    assert least * forward < flops < most * forward


def test_on_gpus_attention_weights_stay_on_the_chip():
    kinds = "cpu", "NVIDIA H200", "TPU v5 lite"
    found = [roofline.step_kernels("vitp_1gf", 64, kind) for kind in kinds]
    here, on_gpu, on_tpu = [(sum(k.flops for k in x), sum(k.bytes for k in x)) for x in found]
    assert on_gpu[0] == pytest.approx(here[0], rel=0.02)
    assert on_tpu == pytest.approx(here, rel=0.1), "pinned layouts are no kernels"
    assert 0.7 * here[1] < on_gpu[1] < 0.95 * here[1]


def test_roofline(tmp_path, capsys):
    measured, file = tmp_path / "train_step.json", tmp_path / "roofline.json"
    row = {"model": "vitc_tiny", "implementation": "convstem_jax", "batch": 4}
    row |= {"device": jax.devices()[0].device_kind, "commit": "abc", "optimizer": "adamw"}
    measured.write_text(json.dumps([row | {"images_per_second": 10.0}]))
    flags = [f"--measured={measured}", "--flops=1e9", "--bandwidth=1e9", f"--json={file}"]
    assert roofline.main(flags) == 0
    [row] = json.loads(file.read_text())
    seconds = row["batch"] / row["bound_images_per_second"]
    ceilings = row["flops"] / 1e9, row["bytes"] / 1e9
    assert max(ceilings) <= seconds <= sum(ceilings)
    assert row["reached"] == pytest.approx(10 / row["bound_images_per_second"])
    assert row["measured_at"] == "abc" != row["commit"]
    assert row["command"] == flags and row["versions"]["jax"] == jax.__version__
    assert "vitc_tiny" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        roofline.main([f"--measured={tmp_path}/none.json"])
    [other] = json.loads(measured.read_text())
    measured.write_text(json.dumps([other | {"device": "NVIDIA H200"}]))
    with pytest.raises(SystemExit):  # its ceilings are not this machine's
        roofline.main([f"--measured={measured}", "--flops=1e9"])
    assert "the bound of NVIDIA H200 is wanted, and this is" in capsys.readouterr().err
    for wrong, message in (
        ({"dtype": "float32"}, "has float32 and adamw: the bound is of bfloat16 and adamw"),
        ({"model": "vit_huge"}, "has vit_huge, which is no model of this version"),
    ):
        measured.write_text(json.dumps([other | wrong]))
        with pytest.raises(SystemExit):
            roofline.main([f"--measured={measured}"])
        assert message in capsys.readouterr().err
