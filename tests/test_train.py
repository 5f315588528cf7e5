"""Whole runs: interrupted and not, finite and not, on embedded data and on a tiny ImageNet."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from unittest import mock

import cv2
import jax
from jax._src.array import ArrayImpl
import jax.numpy as jnp
import numpy as np
import pytest

from convstem_jax import evaluate, evaluation, predict
from convstem_jax import train as train_module
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.config import load_config, set_field
from convstem_jax.data import pipeline, sources
from convstem_jax.errors import ConfigError, NotFiniteError, Preempted
from convstem_jax.lead import AHEAD, Lead
from convstem_jax.metrics import read_jsonl
from convstem_jax.models import MODELS
from tests.profiles import profiled_steps

ROOT = pathlib.Path(__file__).parent.parent
# 31 steps with evaluations at 16 and 31, and checkpoints at every tenth step too; all that can be
# drawn at random is.
FIELDS = {
    "epochs": "0.2",
    "warmup_epochs": "0.05",
    "eval_every_epochs": "0.1",
    "checkpoint_every_steps": "10",
    "log_every_steps": "4",
    "ema_every": "4",
    "ema_alpha": "1e-4",  # a rate of 0.13
    "eval_resize": "36",
}
PART = "test[:500]"
RECIPE = {
    "auto_augment": "true",
    "mixup_alpha": "0.8",
    "cutmix_alpha": "1.0",
    "lighting_std": "0.1",
    "precise_bn_examples": "128",
    "profile_step": "20",
}


@pytest.fixture(autouse=True)
def few_devices(train_on):
    """Programs for 8 devices take three times as long to compile."""
    train_on(1)


def config(**fields):
    config = load_config("configs/quickstart.py")
    for name, text in (FIELDS | {"eval_split": "test[:256]"} | fields).items():
        set_field(config, name, text)
    return config


def run(workdir, *flags, signal_at=None, signal_number=None):
    """Runs the command with two devices, until a step or the end.

    The signal goes to the whole group, as a terminal's and a scheduler's do: to the input's worker
    processes too.
    """
    command = [sys.executable, "-m", "convstem_jax.main", "--config", "configs/quickstart.py"]
    command += [
        f"--config.{name}={text}" for name, text in (FIELDS | RECIPE | {"eval_split": PART}).items()
    ]
    command += ["--workdir", str(workdir), "--compilation_cache", str(workdir.parent / "cache")]
    command += flags
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        output = ""
        try:
            for line in process.stdout:
                output += line
                step = int(line.split()[1].split("/")[0]) if line.startswith("step") else 0
                if signal_at and step >= signal_at:
                    os.killpg(process.pid, signal_number)
                    signal_at = None
        except BaseException:  # it hangs, and the test's time is over
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run of the whole recipe: its folder, its result and what it printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, output = run(workdir)
    assert status == 0, output
    return workdir, json.loads((workdir / "result.json").read_text()), output


def restore_latest(workdir):
    """The latest checkpoint's arrays by name."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    step = checkpoints.latest_step()
    checkpoints.close()
    path = workdir / "checkpoints" / str(step) / "state"
    arrays = jax.tree.leaves_with_path(ocp.StandardCheckpointer().restore(path))
    return step, {jax.tree_util.keystr(name): np.asarray(array) for name, array in arrays}


def without_time(records):
    return [
        {k: v for k, v in r.items() if k not in ("images_per_second", "starved")} for r in records
    ]


def test_a_run_is_evaluated_as_it_was_in_training(uninterrupted, capsys):
    workdir, result, _ = uninterrupted
    assert evaluate.main([str(workdir), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("top1_error", "top5_error", "examples")} == {
        name: result[name] for name in ("top1_error", "top5_error", "examples")
    }
    assert evaluate.main([str(workdir), "--raw", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1_error"] == result["raw_top1_error"]
    assert result["raw_top1_error"] != result["top1_error"], "the weights are the same"
    metrics = json.loads((workdir / "checkpoints/31/metrics/metrics").read_text())
    assert metrics["top1_error"] == result["top1_error"], "what the best checkpoint goes by"
    flags = ["--step", "30", f"--config.eval_split={PART[:-4]}100]"]
    assert evaluate.main([str(workdir), *flags]) == 0
    assert f"on the 100 images of {result['dataset'][:-4]}100]" in capsys.readouterr().out
    for path, flags, status, message in (
        (workdir, ["--step", "17"], 4, "has no checkpoint 17"),
        (workdir, ["--config", "configs/quickstart.py:vitp"], 2, "of a vitp_tiny"),
        (workdir, ["--config.eval_split=absent"], 2, "absent"),
        (workdir / "config.json", [], 2, "give --config"),
        (workdir / "nothing", [], 2, "nothing is not there"),
        (workdir / "checkpoint", [], 2, f"is not there: is it {workdir}/checkpoints?"),
        (workdir / "checkpoints", [], 2, "is not a run's folder: it has no config.json"),
    ):
        assert evaluate.main([str(path), *flags]) == status
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_run_does_not_go_on_with_other_images(uninterrupted, monkeypatch):
    monkeypatch.setattr(sources.Split, "fingerprint", lambda self: "other")
    with pytest.raises(ConfigError, match="the data have changed since"):
        train_module.train(config(**RECIPE, eval_split=PART), str(uninterrupted[0]))


def test_another_network_of_the_same_name_is_noticed(uninterrupted, monkeypatch, capsys):
    workdir, result, _ = uninterrupted
    train_module.train(config(**RECIPE, eval_split=PART), str(workdir))
    by = f" (commit {result['commit']})" if result["commit"] else ""  # none outside git
    assert f"this run is finished{by}; its result" in capsys.readouterr().out
    other = dataclasses.replace(MODELS["vitc_tiny"], stem_strides=(1, 2, 4))  # weights would fit
    monkeypatch.setitem(MODELS, "vitc_tiny", other)
    with pytest.raises(ConfigError, match=r"stem_strides was \[2, 2, 2\] and is \[1, 2, 4\]"):
        train_module.train(config(**RECIPE, eval_split=PART), str(workdir))
    assert evaluate.main([str(workdir)]) == 4
    assert "another vitc_tiny (stem_strides was [2, 2, 2] and is" in capsys.readouterr().err


def test_other_classes_of_the_same_number_are_noticed(uninterrupted, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    lines = (workdir / "classes.txt").read_text().splitlines()
    (workdir / "classes.txt").write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert evaluate.main([str(workdir)]) == 0
    message = f"the classes have other names: class 1 is {lines[-1]} for {workdir}, and {lines[1]}"
    assert message in capsys.readouterr().err

    monkeypatch.setattr(train_module.metrics, "Records", stop)  # the table is printed before
    for path, num_new in ((workdir, 2), (uninterrupted[0], 0)):
        with pytest.raises(Stop):
            train_module.train(config(init_from=str(path)), str(tmp_path / str(num_new)))
        assert capsys.readouterr().out.count("new: other classes") == num_new

    (workdir / "classes.txt").write_text("\n".join(lines[:3]))
    assert evaluate.main([str(workdir)]) == 2
    assert "classes.txt has 3 lines for 10 classes" in capsys.readouterr().err


def test_images_are_classified_as_in_evaluation(uninterrupted, tmp_path, capfd, monkeypatch):
    workdir, result, _ = uninterrupted
    split = sources.open_split("datasets", "fashion_mnist_10k", PART)
    paths = [str(tmp_path / f"{i}.png") for i in range(len(split))]
    for i, path in enumerate(paths):
        cv2.imwrite(path, split[i]["image"][:, :, ::-1])
    monkeypatch.setattr(predict, "BATCH_SIZE", 200)  # the last batch is filled up
    auto = (jax.sharding.AxisType.Auto,)  # README's mesh for one's own code disturbs nothing
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)):
        assert predict.main([str(workdir), *paths, "--top", "5", "--format", "json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["image"] for row in rows] == paths
    assert all(row["classes"] == sorted(row["classes"], key=lambda x: -x[1]) for row in rows)
    for top, error in ((1, "top1_error"), (5, "top5_error")):
        wrong = sum(
            split.class_names[split[i]["label"]] not in [name for name, _ in row["classes"][:top]]
            for i, row in enumerate(rows)
        )
        assert 100 * wrong / len(split) == pytest.approx(result[error], abs=0.41)  # two images

    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(10)))
    assert predict.main([str(workdir), paths[0], "--names", str(names), "--top", "1"]) == 0
    best = split.class_names.index(rows[0]["classes"][0][0])
    assert f"class {best}" in capfd.readouterr().out
    missing = str(tmp_path / "0.jpg")
    assert predict.main([str(workdir), missing, *paths[:2], str(names), "--format", "json"]) == 3
    output, said = capfd.readouterr()
    assert [row["image"] for row in json.loads(output)] == paths[:2]
    assert [line.partition("cannot")[0] for line in said.splitlines()] == [
        f"error: {missing} ", f"error: {names} ",
    ]  # fmt: skip
    for argv, status, message in (
        ([str(names)], 3, "names.txt cannot be decoded as an image"),
        ([missing], 2, "0.jpg cannot be read: No such file"),
        ([paths[0], "--names", paths[0] + "x"], 2, "0.pngx, cannot be read"),
        ([paths[0], "--names", "README.md"], 2, "lines for 10 classes: see --names"),
        ([paths[0], "--config", "configs/quickstart.py:vitp"], 2, "of a vitp_tiny"),
        ([paths[0], "--config", "configs/quickstart.py:eval_resize=20"], 2, "eval_resize=20"),
    ):
        assert predict.main([str(workdir), *argv]) == status
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1


def test_a_run_leaves_its_records(uninterrupted):
    workdir, result, output = uninterrupted
    for key in (
        "top1_error", "top5_error", "raw_top1_error", "examples", "steps", "seconds",
        "images_per_second", "device", "versions", "commit",
    ):  # fmt: skip
        assert key in result
    assert result["examples"] == 500 and result["steps"] == 31
    assert re.fullmatch(r"\d x cpu \(.+, \d+ cores\)", result["device"])
    assert 5 < result["top1_error"] < 85, "31 steps must learn something, and not everything"
    assert json.loads((workdir / "config.json").read_text())["lr"] == config().lr
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("events.out.tfevents.*")), "no TensorBoard file"
    assert profiled_steps(workdir) == [20, 21, 22, 23, 24]
    overview = (workdir / "parameters.txt").read_text()
    assert "Total: 154,970" in overview
    assert "yes position_embedding" in overview and "no  norm/scale" in overview

    records = read_jsonl(str(workdir / "metrics.jsonl"))
    steps = {kind: [r["step"] for r in records if r["kind"] == kind] for kind in ("train", PART)}
    assert steps["train"] == [1, *range(4, 31, 4), 31]
    assert steps[PART] == [16, 31]
    assert records[-1]["ema_top1_error"] == result["top1_error"]

    assert re.search(
        r"step 28/31  epoch 0\.2  loss \d\.\d+  [\d,]+ images/s  \d min \d\d s left", output
    )
    assert f"top-1 error {result['top1_error']:.2f} %" in output
    for name in ("result.json", "metrics.jsonl", "curves.png", "checkpoints"):
        assert f"{workdir}/{name}" in output


def test_an_interrupted_run_ends_the_same_to_the_last_bit(uninterrupted, tmp_path):
    worker = "--config.num_workers=1"
    status, output = run(tmp_path, worker, signal_at=8, signal_number=signal.SIGTERM)
    assert status == 75 and "Traceback" not in output, output
    assert "the same command goes on from there" in output
    status, output = run(tmp_path, worker, signal_at=12, signal_number=signal.SIGKILL)
    assert list((tmp_path.parent / "cache").iterdir()), "compiled programs are not kept"
    assert status == -signal.SIGKILL and "resumed from step" in output, output
    status, output = run(tmp_path)  # without workers now
    assert status == 0 and "resumed from step" in output, output

    workdir, result, _ = uninterrupted
    step, expected = restore_latest(workdir)
    resumed_step, resumed = restore_latest(tmp_path)
    assert step == resumed_step == result["steps"]
    assert expected.keys() == resumed.keys() and len(expected) > 200
    differ = [name for name in expected if (expected[name] != resumed[name]).any()]
    assert not differ, f"{len(differ)} arrays differ, first {differ[:3]}"
    records = read_jsonl(str(tmp_path / "metrics.jsonl"))
    assert without_time(records) == without_time(read_jsonl(str(workdir / "metrics.jsonl")))
    resumed_result = json.loads((tmp_path / "result.json").read_text())
    assert resumed_result["top1_error"] == result["top1_error"]


class Stop(Exception):
    pass


def stop(*args, **fields):
    raise Stop


def test_a_finished_run_is_not_trained_again(uninterrupted, capsys):
    workdir, result, _ = uninterrupted
    records = (workdir / "metrics.jsonl").read_text()
    assert train_module.train(config(**RECIPE, eval_split=PART), str(workdir)) == result
    assert "this run is finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == records


def test_a_run_stopped_before_its_result_is_evaluated_again(uninterrupted, tmp_path):
    """On another number of devices, too: 1 here, 2 there."""
    workdir, result, _ = uninterrupted
    shutil.copytree(workdir, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    again = train_module.train(config(**RECIPE, eval_split=PART), str(tmp_path / "copy"))
    assert again["top1_error"] == pytest.approx(result["top1_error"], abs=0.1)
    assert again["steps"] == 31
    assert again["images_per_second"] == result["images_per_second"], "nothing was trained here"


def test_a_run_starts_from_the_weights_of_another(uninterrupted, tmp_path, capsys, monkeypatch):
    workdir, result, _ = uninterrupted
    fields = {"init_from": str(workdir), "lr": "1e-9", "epochs": "0.0128", "warmup_epochs": "0"}
    fields["ema_alpha"] = "1e-12"  # the EMA stays what it starts from
    again = train_module.train(config(**fields, eval_split=PART), str(tmp_path / "same"))
    # Two steps without a learning rate move only BatchNorm's statistics.
    assert again["top1_error"] == pytest.approx(result["top1_error"], abs=0.41)  # two images
    assert again["raw_top1_error"] == pytest.approx(result["top1_error"], abs=3)
    assert re.search(r"the other \d+ +loaded", capsys.readouterr().out)

    # Other weights than those of the folder's run: not the same run any more.
    with pytest.raises(ConfigError, match="init_from is"):
        others = config(**(fields | {"init_from": ""}), eval_split=PART)
        train_module.train(others, str(tmp_path / "same"))
    nowhere = config(**(fields | {"init_from": "nowhere"}), eval_split=PART)
    with pytest.raises(ConfigError, match="config.init_from: nowhere is not there"):
        train_module.train(nowhere, str(tmp_path / "other"))

    monkeypatch.setattr(train_module.metrics, "Records", stop)  # the table is printed before
    fields |= {"image_size": "64", "eval_resize": "64"}
    fields |= {"train_split": "train[:40]", "epochs": "3.2"}
    with pytest.raises(Stop):
        train_module.train(config(**fields), str(tmp_path / "larger"))
    output = capsys.readouterr().out
    assert "position_embedding  (1, 17, 64)  (1, 65, 64)  resized" in output
    assert "each batch has images more than once: config.batch_size=64" in output


@pytest.mark.usefixtures("shallow")
def test_precise_statistics_are_what_is_evaluated_and_saved(tmp_path, capsys, monkeypatch):
    """After two steps the running statistics are mostly what they began with: 0 and 1."""
    errors, rooms = {}, []

    def new_checkpoints(*args, room, **kwargs):
        rooms.append((room, room()))
        return Checkpoints(*args, room=room, **kwargs)

    monkeypatch.setattr(train_module, "room_left", lambda: 1e9)
    monkeypatch.setattr(train_module, "Checkpoints", new_checkpoints)
    for num in ("0", "256"):
        fields = {"epochs": "0.0128", "warmup_epochs": "0", "precise_bn_examples": num}
        fields |= {"ema_alpha": "1e-3"} if num == "256" else {}
        errors[num] = train_module.train(config(**fields), str(tmp_path / num))
        said = capsys.readouterr().out
        assert said.count("256 training images give BatchNorm's statistics") == (num == "256")
        assert "whose last update is 1 steps before the end of 2: lower config.ema_every" in said
        assert ("at the end the EMA is still 37% what it was" in said) == (num == "0")
    assert [(1e9 - before, 1e9 - room()) for room, before in rooms] == [
        (0, 0), (256 * 32 * 32 * 3, 0),
    ], "what the images will take of the device, until they are there"  # fmt: skip
    _, plain = restore_latest(tmp_path / "0")
    _, precise = restore_latest(tmp_path / "256")
    name = "['batch_stats']['stem']['norms']['0']['mean']"
    assert np.abs(precise[name]).max() > 3 * np.abs(plain[name]).max()
    assert errors["0"]["top1_error"] != errors["256"]["top1_error"]
    ema = precise["['ema']['batch_stats']['stem']['norms']['0']['mean']"]
    assert np.abs(ema).max() > 3 * np.abs(plain[name]).max()


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "log_every_steps, message",
    [("4", "the training loss is nan at step 4"), ("100", "not finite after step 10")],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(
    tmp_path, log_every_steps, message, monkeypatch
):
    before, at_end, close = signal.getsignal(signal.SIGTERM), [], Checkpoints.close

    def note_and_close(checkpoints):
        at_end.append(signal.getsignal(signal.SIGTERM))
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", note_and_close)
    fields = {"lr": "1e20", "optimizer": "sgd", "log_every_steps": log_every_steps}
    with pytest.raises(NotFiniteError, match=f"{message}.*: lower config.lr"):
        train_module.train(config(**fields), str(tmp_path))
    assert not list((tmp_path / "checkpoints").glob("[0-9]*")), "a broken state was saved"
    assert len(at_end) == 1 and before not in at_end, "SIGTERM would kill the last save"


@pytest.mark.usefixtures("shallow")
def test_the_host_is_few_steps_ahead(tmp_path, monkeypatch):
    """The last checkpoint comes after all steps under way; JAX would let it be 32 ahead."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: y @ x, x))
    x, lead, results, under_way = jnp.eye(512), Lead(), [], []
    for _ in range(16):
        results.append(slow(x))
        lead.add(results[-1])
        under_way.append(sum(not result.is_ready() for result in results))
    assert 1 < max(under_way) <= AHEAD

    added = []
    for module in (train_module, evaluation):
        monkeypatch.setattr(module, "Lead", lambda: mock.Mock(add=added.append))
    result = train_module.train(config(eval_split=PART), str(tmp_path))
    assert len(added) > result["steps"]
    assert sum("grad_norm" in metrics for metrics in added) == result["steps"]


@pytest.mark.usefixtures("shallow")
def test_the_loop_fetches_nothing_between_log_points(tmp_path, monkeypatch, train_on):
    """On the CPU JAX's guard sees only transfers to the device, so fetches are counted as well.

    On two devices, since NumPy reads an array on one CPU device where it lies.
    """
    train_on(2)
    monkeypatch.setattr(train_module, "print_overview", lambda *args: None)  # fetches
    monkeypatch.setattr(train_module.Checkpoints, "save", lambda *args: None)  # fetches too
    fetches, fetch, value = [], jax.device_get, ArrayImpl._value

    def device_get(x):
        num = len(fetches)
        result = fetch(x)
        fetches[num:] = ["device_get"]  # in place of its arrays
        return result

    def read(array):  # by float(), bool(), np.asarray(), print() and device_get()
        fetches.append(array.shape)
        return value.fget(array)

    monkeypatch.setattr(jax, "device_get", device_get)
    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    fields = {"log_every_steps": "10", "checkpoint_every_steps": "1000", "eval_every_epochs": "9"}
    train_module.train(config(**fields), str(tmp_path / "a"))
    # Log points 1, 10, 20, 30 and 31, and one evaluation.
    assert fetches == ["device_get"] * 6

    jit = jax.jit

    def leaky_jit(function, **options):
        step = jit(function, **options)
        if "donate_argnums" not in options:
            return step
        return lambda state, batch, hparams: step(state, fetch(batch), hparams)

    monkeypatch.setattr(jax, "jit", leaky_jit)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_module.train(config(**fields), str(tmp_path / "b"))


def make_imagenet_tars(folder, num_train, val_numbers):
    """The two official tar files with a few small random JPEGs each."""
    rng = np.random.default_rng(0)

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    def jpeg():
        shape = (*rng.integers(40, 80, 2), 3)
        return cv2.imencode(".jpg", rng.integers(0, 256, shape, dtype=np.uint8))[1].tobytes()

    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for synset in ("n01440764", "n01443537"):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for i in range(num_train // 2):
                    add(inner, f"{synset}_{i}.JPEG", jpeg())
            add(tar, f"{synset}.tar", inner_file.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in val_numbers:
            add(tar, f"ILSVRC2012_val_{number:08}.JPEG", jpeg())


@pytest.mark.usefixtures("shallow")
def test_a_request_to_stop_during_an_evaluation_is_met_after_it(tmp_path, monkeypatch):
    def asked_to_stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluation.evaluate(*args)

    closed = []
    for kind in (Checkpoints, pipeline.EvalBatches):

        def note_and_close(self, close=kind.close):
            closed.append(type(self))
            close(self)

        monkeypatch.setattr(kind, "close", note_and_close)
    monkeypatch.setattr(train_module, "evaluate", asked_to_stop)
    fields = {"epochs": "0.0256", "warmup_epochs": "0", "eval_every_epochs": "0.0128"}
    with pytest.raises(Preempted, match="stopped at step 2 of 4"):
        train_module.train(config(**fields), str(tmp_path / "run"))
    assert closed == [Checkpoints, pipeline.EvalBatches], "saving waits for the workers' end"
    assert restore_latest(tmp_path / "run")[0] == 2


@pytest.mark.usefixtures("shallow")
def test_a_run_whose_folder_another_has_taken_saves_nothing_more(tmp_path, monkeypatch):
    """As where locks hold only on one machine."""
    saved, save = [], Checkpoints.save

    def then_another_begins(self, step, *args):
        save(self, step, *args)
        saved.append(step)
        if step == 2:
            (tmp_path / "run" / ".owner").write_text("another's")

    monkeypatch.setattr(Checkpoints, "save", then_another_begins)
    fields = {"epochs": "0.0256", "warmup_epochs": "0", "checkpoint_every_steps": "1"}
    with pytest.raises(ConfigError, match="another run saves in"):
        train_module.train(config(**fields), str(tmp_path / "run"))
    assert saved == [1, 2]


@pytest.mark.usefixtures("shallow")
def test_imagenet_is_prepared_and_trained_on(tmp_path, capsys):
    """With the whole recipe."""
    make_imagenet_tars(tmp_path / "tars", num_train=24, val_numbers=range(1, 8))
    command = [sys.executable, "launch/prepare_imagenet.py", "--any_content"]
    command += ["--manual_dir", str(tmp_path / "tars"), "--data_dir", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "train: 24 images\nvalidation: 7 images" in done.stdout

    config = load_config("configs/vitc.py:sgd")
    for name, value in {
        "data_dir": str(tmp_path / "data"),
        "model": "vitc_tiny",
        "dtype": "float32",
        "image_size": 32,
        "eval_resize": 36,
        "batch_size": 32,
        "precise_bn_examples": 64,
        "eval_batch_size": 5,
        "epochs": 6.0,
        "num_workers": 2,
    }.items():
        config[name] = value
    result = train_module.train(config, str(tmp_path / "run"))
    assert (result["steps"], result["examples"]) == (4, 7)
    assert "0.53 is the paper's for 24" in capsys.readouterr().out  # the share of all examples
    _, arrays = restore_latest(tmp_path / "run")
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_preparing_imagenet_needs_folders_and_for_help_only_python():
    script = [sys.executable, "-S", "launch/prepare_imagenet.py"]  # without installed packages
    done = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--manual_dir" in done.stdout
    done = subprocess.run([*script, "--manual_dir=gs://b"], capture_output=True, text=True)
    assert done.returncode == 2 and "gs://b is not a folder" in done.stderr


def test_tar_files_of_the_wrong_form_are_refused(tmp_path):
    make_imagenet_tars(tmp_path / "tars", num_train=2, val_numbers=[1])
    with tarfile.open(tmp_path / "tars" / "ILSVRC2012_img_val.tar", "a") as tar:
        folder = tarfile.TarInfo("val/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    command = [sys.executable, "launch/prepare_imagenet.py", "--manual_dir", str(tmp_path / "tars")]
    command += ["--data_dir", str(tmp_path / "data")]
    for flags, message in ((["--any_content"], "holds 'val'"), ([], "has MD5")):
        done = subprocess.run(command + flags, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 3 and message in done.stderr
    make_imagenet_tars(tmp_path / "gap", num_train=2, val_numbers=[1, 3])
    command[-3] = str(tmp_path / "gap")
    done = subprocess.run([*command, "--any_content"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and "without a gap" in done.stderr
    train = tmp_path / "gap" / "ILSVRC2012_img_train.tar"
    train.write_bytes(train.read_bytes()[:1000])
    done = subprocess.run([*command, "--any_content"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3 and f"{train} is cut off" in done.stderr
    assert not (tmp_path / "data").exists()
