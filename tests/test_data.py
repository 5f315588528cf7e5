"""From a tfds directory to batches: order, exactness, damage."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
from unittest import mock
import zlib

import cv2
import grain
import jax
import numpy as np
import pytest

from convstem_jax import data
from convstem_jax.config import load_config
from convstem_jax.data import augment, pack, packed, pipeline, sources, tfds_directory
from convstem_jax.data.examples import EvalExamples, TrainExamples, TrainTransform, _permutation
from convstem_jax.data.reader import Reader
from convstem_jax.errors import ConfigError, DataError
from convstem_jax.terminal import progress_bar

ROOT = pathlib.Path(__file__).parent.parent
DATASETS = ROOT / "datasets"
NAME = "fashion_mnist_10k"
THREADS = pipeline.Reading(num_workers=0, num_threads=2, read_ahead=2, prefetch=2)
TRANSFORM = TrainTransform(image_size=32, min_area=0.5, flip=True)


@pytest.fixture(scope="module")
def train_split():
    return sources.open_split(str(DATASETS), NAME, "train")


@pytest.fixture(scope="module")
def test_split():
    return sources.open_split(str(DATASETS), NAME, "test")


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded data set to damage."""
    shutil.copytree(DATASETS / NAME, tmp_path / NAME)
    return tmp_path


def sharding(num_devices=1):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        devices=jax.devices()[:num_devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    return jax.NamedSharding(mesh, jax.P("data"))


def train_batches(split, *, seed=0, reading=THREADS, transform=TRANSFORM, **kwargs):
    return pipeline.train_batches(
        TrainExamples(split, transform, seed),
        batch_size=64,
        sharding=sharding(),
        reading=reading,
        **kwargs,
    )


def take(batches, num):
    return [jax.device_get(next(batches)) for _ in range(num)]


def same(a, b):
    return (a["image"] == b["image"]).all() and (a["label"] == b["label"]).all()


def test_embedded_data(train_split, test_split):
    assert (len(train_split), len(test_split)) == (10_000, 2_000)
    assert len(list(sources.open_split("datasets", NAME, "test[:3]"))) == 3  # and then it ends
    assert train_split.num_classes == 10
    record = train_split[7]
    assert record["image"].shape == (28, 28, 3) and record["image"].dtype == np.uint8
    labels = [test_split.records[i]["label"] for i in range(2_000)]
    assert np.bincount(labels).min() > 150, "a class is missing or rare"
    assert "MIT" in (DATASETS / NAME / "LICENSE").read_text()
    size = sum(f.stat().st_size for f in (DATASETS / NAME).rglob("*"))
    assert size <= 8e6, "the embedded data must stay under 8 MB"


def test_every_epoch_is_another_permutation_of_the_whole_split():
    class Numbers:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            return {"image": np.full((4, 4, 3), 0, np.uint8), "label": np.int32(i)}

    plain = TrainTransform(image_size=4, min_area=1.0, flip=False)

    def epochs(seed):
        batches = train_batches(Numbers(), seed=seed, transform=plain)
        labels = np.concatenate([b["label"] for b in take(batches, 32)])[:2000]
        return labels[:1000], labels[1000:]

    first, second = epochs(seed=0)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first != second).mean() > 0.9, "the second epoch repeats the order of the first"
    assert (first != epochs(seed=1)[0]).mean() > 0.9, "the seed does not change the order"
    # A shuffle in a buffer would leave early records early.
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


def test_each_option_draws_anew_for_each_number():
    """Of one image, whose every epoch is another view of it."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)

    def seen(seed=0, **options):
        options = {"min_area": 1.0, "flip": False} | options
        examples = TrainExamples([{"image": image}], TrainTransform(32, **options), seed)
        return [examples[k]["image"].tobytes() for k in range(20)]

    assert len(set(seen())) == 1
    assert len(set(seen(flip=True))) == 2
    for option in ({"min_area": 0.5}, {"auto_augment": True}):
        assert len(set(seen(**option))) > 10, option
        assert seen(**option) != seen(seed=1, **option)


def test_resuming_and_worker_processes_change_no_bit(train_split):
    reference = take(train_batches(train_split), 6)
    resumed = list(map(jax.device_get, train_batches(train_split, numbers=range(4, 6))))
    workers = pipeline.Reading(num_workers=2, num_threads=1, read_ahead=1, prefetch=1)
    worked = train_batches(train_split, numbers=range(3, 6), reading=workers)
    assert same(reference[4], resumed[0]) and same(reference[5], resumed[1])
    assert all(same(a, b) for a, b in zip(reference[3:], worked, strict=True))
    last = train_batches(train_split, numbers=range(5, 6), reading=workers)  # one worker has none
    assert same(reference[5], *last)
    assert not same(reference[0], reference[1])


def test_batches_are_made_before_one_is_asked_for(train_split, monkeypatch):
    made = threading.Event()

    def read(split, number):
        made.set()
        return {"image": np.zeros((32, 32, 3), np.uint8), "label": 0}

    monkeypatch.setattr(type(train_split), "__getitem__", read)
    with contextlib.closing(train_batches(train_split)):
        assert made.wait(60)


@pytest.mark.parametrize("numbers", [range(3, 3), range(3, 4)])
def test_workers_start_if_there_is_a_batch_to_make(numbers, train_split):
    workers = pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)
    before = set(threading.enumerate())
    with contextlib.closing(train_batches(train_split, numbers=numbers, reading=workers)):
        assert bool(set(threading.enumerate()) - before) is bool(numbers)


def test_processes_share_out_each_global_batch_in_order():
    numbers = grain.MapDataset.range(96)
    whole = pipeline.local_batches(numbers, 24, process=0, num_processes=1)
    parts = [pipeline.local_batches(numbers, 24, process=p, num_processes=4) for p in range(4)]
    assert len(parts[0]) == len(whole) == 4
    for k in range(4):
        assert np.concatenate([part[k] for part in parts]).tolist() == whole[k].tolist()


@pytest.mark.parametrize(
    "num_devices, batch_size, in_batch",
    [(1, 300, 300), (8, 7, 8), (8, 500, 504), (1, 3000, 2000), (8, 1997, 2000)],
)
def test_evaluation_covers_every_example_once(test_split, num_devices, batch_size, in_batch):
    batches = pipeline.EvalBatches(
        EvalExamples(test_split, resize=32, image_size=32),
        batch_size=batch_size,
        sharding=sharding(num_devices),
        reading=THREADS,
    )
    expected = [test_split.records[i]["label"] for i in range(2_000)]
    for _ in range(2):  # and again the next time
        seen = [(np.asarray(b["label"]), np.asarray(b["mask"])) for b in batches]
        assert {len(label) for label, _ in seen} == {in_batch}
        assert np.concatenate([label[mask] for label, mask in seen]).tolist() == expected


def test_evaluation_reads_no_more_than_a_small_split(train_split, monkeypatch):
    part = dataclasses.replace(train_split, records=[train_split.records[0]] * 5)
    examples = EvalExamples(part, resize=36, image_size=32)
    monkeypatch.setattr(sources, "decode", None)
    blank = examples[5]
    assert not blank["image"].any() and blank["image"].shape == (32, 32, 3) and not blank["mask"]
    to_devices = mock.Mock()
    monkeypatch.setattr(pipeline, "_to_devices", to_devices)
    for batch_size, num_workers in ((2048, 1), (2, 3), (1, 4)):
        reading = dataclasses.replace(THREADS, num_workers=4)
        batches = pipeline.EvalBatches(
            examples, batch_size=batch_size, sharding=sharding(), reading=reading
        )
        assert to_devices.call_args.args[3].num_workers == num_workers <= len(batches)


def test_random_resized_crop_draws_areas_and_ratios_of_the_paper():
    rng = np.random.default_rng(0)
    # The pixel's value is its position, so that the crop's corners can be read off.
    y, x = np.mgrid[:240, :240].astype(np.float32)
    image = np.stack([y, x, y], axis=-1)
    areas, ratios = [], []
    for _ in range(2000):
        crop = augment.random_resized_crop(image, rng, size=64, min_area=0.08)
        h = (crop[-1, 0, 0] - crop[0, 0, 0]) * 64 / 63
        w = (crop[0, -1, 1] - crop[0, 0, 1]) * 64 / 63
        areas.append(h * w / 240**2)
        ratios.append(w / h)
    assert 0.07 < min(areas) < 0.1 and 0.85 < max(areas) <= 1.02
    assert 0.73 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.36
    # Inverted in half of the cases: otherwise the ratios would be uniform and their mean above 1.
    assert abs(np.mean(np.log(ratios))) < 0.02


def test_flip_mirrors_half_of_the_images():
    rng = np.random.default_rng(0)
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    flipped = [augment.random_flip(image, rng) for _ in range(1000)]
    mirrored = sum((f == image[:, ::-1]).all() for f in flipped)
    assert 450 < mirrored < 550
    assert all((f == image).all() or (f == image[:, ::-1]).all() for f in flipped)


@pytest.mark.parametrize(
    "shape, resized_size",  # height, width; width, height of the short side 256
    [
        ((300, 500), (426, 256)),
        ((500, 300), (256, 426)),
        ((256, 256), (256, 256)),
        ((100, 90), (256, 284)),
        ((103, 206), (512, 256)),
    ],
)
def test_center_crop_is_the_middle_of_the_resized_image(shape, resized_size):
    h, w = shape
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    crop = augment.center_crop(image, resize=256, size=224)
    assert crop.shape == (224, 224, 3)
    resized = cv2.resize(image, resized_size)
    top, left = -(-(resized.shape[0] - 224) // 2), -(-(resized.shape[1] - 224) // 2)
    assert (crop == resized[top : top + 224, left : left + 224]).all()


def test_of_a_strip_only_the_middle_is_resized(monkeypatch):
    resize = mock.Mock(wraps=cv2.resize)  # which readers of other tests may be calling too
    monkeypatch.setattr(cv2, "resize", resize)
    strip = np.tile((np.arange(20_000) // 80).astype(np.uint8)[None, :, None], 3)
    for image in (strip, strip.transpose(1, 0, 2)):
        crop = augment.center_crop(image, resize=256, size=224).astype(int)
        assert np.abs(crop - 125).max() <= 1, "it is not the middle"
    wide = np.zeros((10, 160, 3), np.uint8)
    augment.center_crop(wide, resize=256, size=224)
    sizes = {call.args[0].shape: call.args[1] for call in resize.call_args_list}
    assert sizes[1, 16, 3] == sizes[wide.shape] == (16 * 256, 256)
    assert sizes[16, 1, 3] == (256, 16 * 256) and strip.shape not in sizes


def test_colours_arrive_as_rgb():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    encoded = cv2.imencode(".png", red[..., ::-1])[1].tobytes()
    split = sources.Split("x/train", [{"image": encoded, "label": 0}], "a")
    assert (split[0]["image"] == red).all()


def test_a_label_outside_the_classes_names_split_record_and_label(copied):
    path = copied / NAME / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    label = features["featuresDict"]["features"]["label"]["classLabel"]
    label["numClasses"] = "7"
    path.write_text(json.dumps(features))
    (path.parent / "label.labels.txt").unlink()
    split = sources.open_split(str(copied), NAME, "train")
    assert split.num_classes == 7
    workers = pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)
    for reading in (THREADS, workers):
        with pytest.raises(DataError, match=r"fashion_mnist_10k/train, record \d+: label [789]"):
            take(train_batches(split, reading=reading), 5)


def test_an_image_that_cannot_be_decoded_names_its_record():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)  # OpenCV raises at the size
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    png += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    for content in (b"no image", b"", png):
        assert sources.decode(content) is None
    split = sources.Split("x/train", [{"image": b"no image", "label": 1}], "ab")
    with pytest.raises(DataError, match=r"x/train, record 0: the image cannot be decoded"):
        split[0]


def test_another_decoder_changes_no_fingerprint(test_split, monkeypatch):
    expected = test_split.fingerprint()
    monkeypatch.setattr(sources, "decode", lambda encoded: np.zeros((9, 9, 3), np.uint8))
    assert test_split.fingerprint() == expected


def test_no_more_processes_read_than_there_are_cores():
    config = load_config("configs/vitc.py")
    cores = len(os.sched_getaffinity(0))
    for asked, expected in ((0, 0), (1, 1), (10**6, cores)):
        config.num_workers = asked
        assert pipeline.Reading.of(config).num_workers == expected


def test_workers_do_not_outlive_a_main_process_that_is_killed():
    code = (
        "import os, psutil, signal, sys\n"
        "sys.path.insert(0, '.')\n"
        "from tests import test_data as t\n"
        "workers = t.pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)\n"
        "split = t.sources.open_split(str(t.DATASETS), t.NAME, 'train')\n"
        "batches = t.train_batches(split, reading=workers)  # held: its workers end with it\n"
        "t.take(batches, 1)\n"
        "print(psutil.Process().children(recursive=True), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            # Workers hold the pipe open for as long as they live.
            output, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and b"pid=" in output


def test_a_damaged_record_is_named(copied):
    path = next((copied / NAME).rglob("*test.array_record*"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = bytes(5000)
    path.write_bytes(content)
    split = sources.open_split(str(copied), NAME, "test")
    with pytest.raises(DataError, match=r"fashion_mnist_10k/test, record \d+ cannot be read"):
        for i in range(len(split)):
            split[i]


def test_all_files_of_a_split_may_be_open(monkeypatch):
    """ImageNet's training split has 1,024, and many machines allow 1,024 at first."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        split = sources.open_split(str(DATASETS), NAME, "train")
        assert min(hard, 4000) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= hard
        monkeypatch.setattr(tfds_directory, "LEAST_FILES", hard)
        with pytest.raises(ConfigError, match="1 files to keep open.*raise the hard limit"):
            sources.open_split(str(DATASETS), NAME, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    class Full:
        def __getitem__(self, index):
            raise RuntimeError("open() failed: Too many open files")

        def __len__(self):
            return 1

    with pytest.raises(ConfigError, match="give it more memory or open files"):
        sources.Split(NAME, Full(), split.class_names)[0]


def test_a_file_cut_in_half_is_noticed_before_training(copied):
    path = next((copied / NAME).rglob("*train.array_record*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"train\.array_record.*(10000|cannot be read)"):
        sources.open_split(str(copied), NAME, "train")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_a_file_that_may_not_be_opened_is_not_damaged(code, monkeypatch):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tfds_directory, "open", refuse, raising=False)
    kind = DataError if code == errno.ENOENT else ConfigError
    with pytest.raises(kind, match=rf"train\.array_record.*{os.strerror(code)}"):
        sources.open_split(str(DATASETS), NAME, "train")


def test_another_count_than_described_is_noticed(copied):
    path = copied / NAME / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    split = next(s for s in info["splits"] if s["name"] == "test")
    split["shardLengths"] = ["2001"]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match="holds 2000 records, but dataset_info.json says 2001"):
        sources.open_split(str(copied), NAME, "test")


def test_files_in_another_format_name_the_conversion(copied):
    path = copied / NAME / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
    path.write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="is in tfrecord.*'tfds convert_format'"):
        sources.open_split(str(copied), NAME, "train")


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="launch/prepare_imagenet.py --manual_dir") as error:
        sources.open_split(str(tmp_path), "imagenet2012", "train")
    assert "configs/quickstart.py" in str(error.value)
    with pytest.raises(ConfigError, match="no split 'val': it has test, train"):
        sources.open_split(str(DATASETS), NAME, "val")
    (tmp_path / NAME / "1.0.0").mkdir(parents=True)
    (tmp_path / NAME / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a tfds directory"):
        sources.open_split(str(tmp_path), NAME, "train")


def test_configurations_of_a_data_set(copied, tmp_path):
    (copied / "garments").mkdir()
    (copied / NAME).rename(copied / "garments/small")
    assert len(sources.open_split(str(copied), "garments/small", "test")) == 2_000
    with pytest.raises(ConfigError, match="set config.dataset to one, garments/small$"):
        sources.open_split(str(copied), "garments", "test")
    with pytest.raises(ConfigError, match=r"tfds.builder\('imagenette/320px-v2'"):
        sources.open_split(str(tmp_path), "imagenette/320px-v2", "train")
    with pytest.raises(ConfigError, match="tfds does not know it"):
        sources.open_split(str(tmp_path), "my photos", "train")
    flags = ["--dataset", "garments/small", "--data_dir", str(copied), "--splits", "test[:9]"]
    assert pack.main([*flags, "--output", str(tmp_path / "packed")]) == 0
    assert len(sources.open_split(str(tmp_path / "packed"), "garments/small", "test")) == 9


def test_a_bucket_is_refused():
    with pytest.raises(ConfigError, match=r"data_dir=gs://b/data is not a folder.*launch/data.sh"):
        sources.open_split("gs://b/data", "imagenet2012", "train")


def test_a_part_of_a_split(train_split):
    part = sources.open_split(str(DATASETS), NAME, "train[20:25]")
    assert len(part) == 5
    np.testing.assert_array_equal(part[2]["image"], train_split[22]["image"])
    for wrong, message in (
        ("train[8:x]", "'train.8:x.' is not a part of the split 'train'"),
        ("train[5:5]", "has no split 'train.5:5.'"),
        ("train[90%:80%]", "has no split 'train.90%:80%.'"),
        ("train[:10%]+test[:10%]", "is not a split or a part of one"),
        ("tran[:5]", "has no split"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.open_split(str(DATASETS), NAME, wrong)


def test_the_highest_version_is_taken(copied):
    for decoy in ("1.0.0.bak", "incomplete.X1Y_2.0.0"):
        (copied / NAME / decoy).mkdir()
        (copied / NAME / decoy / "dataset_info.json").write_text("{")
    assert len(sources.open_split(str(copied), NAME, "test")) == 2_000
    (copied / NAME / "10.0.0").mkdir()
    (copied / NAME / "9.0.0").mkdir()
    for version in ("9.0.0", "10.0.0"):
        (copied / NAME / version / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match=r"10\.0\.0 cannot be read"):
        sources.open_split(str(copied), NAME, "test")


def test_reading_model_and_step_need_neither_tensorflow_nor_clu():
    code = (
        "import sys, convstem_jax.step, convstem_jax.data.pipeline\n"
        "from convstem_jax.data import sources\n"
        f"sources.open_split({str(DATASETS)!r}, {NAME!r}, 'test')[0]\n"
        "assert not {'tensorflow', 'clu'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


# ------------------------------------------------------------------- without tfds and Grain


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    flags = ["--dataset", NAME, "--data_dir", str(DATASETS), "--splits", "test,train[:100]"]
    assert pack.main([*flags, "--output", str(folder)]) == 0
    return folder


def test_a_packed_file_is_the_data_set(packed_dir, test_split):
    split = sources.open_split(str(packed_dir), NAME, "test")
    assert len(split) == 2000 and split.num_classes == 10
    assert split.class_names == test_split.class_names and split.class_names[9] == "Ankle boot"
    for i in (0, 1, 1999):
        assert same(split[i], test_split[i])
    assert split.fingerprint() == test_split.fingerprint()
    records = list(split.records)
    others = [records[:-1], [*records[:-2], records[0]], [records[1], *records[1:]]]
    others += [[*records[:1000], *records[999:]], [records[0], *records[:0:-1][1:], records[-1]]]
    splits = [split, *(dataclasses.replace(split, records=other) for other in others)]
    splits += [dataclasses.replace(split, class_names=split.class_names[::-1])]
    assert len({x.fingerprint() for x in splits}) == 7
    part = sources.open_split(str(packed_dir), NAME, "test[50%:1005]")
    assert len(part) == 5 and same(part[0], test_split[1000])
    assert len(sources.open_split(str(packed_dir), NAME, "train")) == 100
    pickled = pickle.dumps(split.records)  # for each worker process
    assert len(pickled) < 0.2 * split.records.content.size
    assert pickle.loads(pickled)[1999] == split.records[1999]
    path = packed_dir / f"{NAME}.npz"
    time_ns = path.stat().st_mtime_ns
    os.utime(path, ns=(time_ns, time_ns + 1))
    with pytest.raises(DataError, match="packed again while it was in use"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    "split, message",
    [
        ("validation", "has no split 'validation': it has test, train"),
        ("test[7:7]", "'test.7:7.' cannot be read: .* has 2000 records"),
        ("test[:2001]", "'test.:2001.' cannot be read: .* has 2000 records"),
        ("test[a:]", "'test.a:.' is not a split"),
    ],
)
def test_what_a_packed_file_does_not_have(packed_dir, split, message):
    with pytest.raises(ConfigError, match=message):
        sources.open_split(str(packed_dir), NAME, split)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_file_gets_few_progress_bars(monkeypatch, is_terminal):
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 0.15).__next__)
    assert list(progress_bar(range(5), "photos", "image")) == list(range(5))
    assert "photos: 100%" in shown.getvalue() and "5/5" in shown.getvalue()
    assert (shown.getvalue().count("\r") > 4) is is_terminal


def test_folders_of_images_are_packed(tmp_path, capsys):
    def put(split, name, grey):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        image = np.full((40, 50, 3), grey, np.uint8)
        cv2.imwrite(str(folder / f"{grey}.PNG"), image)

    flags = ["--images", str(tmp_path / "photos"), "--dataset", "photos", "--output"]
    flags += [str(tmp_path / "data")]
    for split, name, grey in (("train", "b", 10), ("train", "a", 20), ("test", "b", 30)):
        put(split, name, grey)
    assert pack.main(flags) == 0
    assert "2 classes, 2 in train, 1 in test" in capsys.readouterr().out
    split = sources.open_split(str(tmp_path / "data"), "photos", "train")
    assert split.class_names == ["a", "b"]
    found = {(int(x["label"]), int(x["image"][0, 0, 0])) for x in map(split.__getitem__, range(2))}
    assert found == {(0, 20), (1, 10)}, "classes are numbered in the order of their names"
    for grey in range(40):
        put("many", "ab"[grey // 20], grey)
    assert pack.main([*flags, "--splits", "many"]) == 0
    for part in ("many[:50%]", "many[50%:]"):
        half = sources.open_split(str(tmp_path / "data"), "photos", part)
        assert {int(record["label"]) for record in half.records} == {0, 1}, "not shuffled"
    capsys.readouterr()
    for hidden in (".cache/1.jpg", "a/.2.jpg"):  # of file managers
        path = tmp_path / "photos/train" / hidden
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert pack.main(flags) == 0
    assert "2 classes, 2 in train, 1 in test" in capsys.readouterr().out
    file = tmp_path / "file"
    file.touch()
    assert pack.main([*flags[:-1], str(file / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {file}/x cannot be written: ")
    (tmp_path / "photos/test/b/folder.jpg").mkdir()
    assert pack.main(flags) == 2
    assert "b/folder.jpg cannot be read: Is a directory" in capsys.readouterr().err
    (tmp_path / "photos/test/b/folder.jpg").rmdir()
    (tmp_path / "photos/train/empty").mkdir()
    assert pack.main(flags) == 2
    assert "without images: " in (error := capsys.readouterr().err) and "train/empty\n" in error
    (tmp_path / "photos/train/empty").rmdir()
    (tmp_path / "photos/train/stray.jpg").touch()
    assert pack.main(flags) == 2
    assert "move into a class's folder" in (error := capsys.readouterr().err)
    assert "train/stray.jpg\n" in error
    (tmp_path / "photos/train/stray.jpg").unlink()
    put("alone", "b", 10)
    assert pack.main([*flags, "--splits", "alone"]) == 2
    assert "/alone has one class, b: " in capsys.readouterr().err
    for name in ("caf\udce9", "a\nb"):
        (tmp_path / "photos/train/b").rename(unprintable := tmp_path / "photos/train" / name)
        assert pack.main(flags) == 2
        assert f"{name!r}: that is no printable name".lstrip("'") in capsys.readouterr().err
        unprintable.rename(tmp_path / "photos/train/b")
    put("test", "c", 40)
    for name in ("notes.txt", "more.webp"):
        (tmp_path / "photos/train/b" / name).write_text("x")
    for splits, message in (
        ("test,train", "a is of a class that test does not have"),
        ("train", "b/notes.txt\n"),
        ("train", "take away what is none of *.jpg, *.jpeg, *.png: "),
        ("train", "b/more.webp, "),
        ("validation", "validation holds no CLASS/*.jpg"),
        ("test[:1]", "letters and digits"),
        ("test[:1],test[1:]", "names a split twice"),
    ):
        assert pack.main([*flags, "--splits", splits]) == 2
        assert message in capsys.readouterr().err
    for file in ("b/30.PNG", "c/40.png"):
        (tmp_path / "photos/test" / file).write_bytes(b"\x89PNG, cut off")
    assert pack.main([*flags, "--splits", "test"]) == 3
    error = capsys.readouterr().err
    assert "cannot be decoded as an image: " in error
    assert "b/30.PNG, " in error and "c/40.png\n" in error


def test_a_damaged_packed_file(packed_dir, tmp_path, capsys):
    content = (packed_dir / f"{NAME}.npz").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 4] ^= 1
    for damaged in (content[: len(content) // 2], flipped):
        (tmp_path / f"{NAME}.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read.*pack it again"):
            sources.open_split(str(tmp_path), NAME, "test")
    assert pack.main(["--dataset", "none", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "data set 'none' is not in datasets" in error and "nor as none.npz" in error
    assert error.count("\n") == 1


def test_a_packed_file_that_may_not_be_opened_is_not_damaged(packed_dir, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(packed, "open", refuse, raising=False)
    with pytest.raises(ConfigError, match="by this process: give it more memory or open files"):
        sources.open_split(str(packed_dir), NAME, "test")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_gives_the_batches_of_the_pipeline_and_makes_them_once(
    train_split, test_split, num_workers
):
    options = {"num_workers": num_workers, "read_ahead": 3}
    expected = take(train_batches(train_split, seed=3), 5)
    examples = TrainExamples(train_split, TRANSFORM, 3)
    size = 64 * (32 * 32 * 3 + 4)
    reader = Reader(examples, batch_size=64, memory=4 * size, **options)
    for numbers in (range(5), range(2, 5)):
        batches = list(reader.read(numbers, sharding()))
        assert all(same(a, expected[i]) for a, i in zip(batches, numbers, strict=True))
    made = []
    reader._make = lambda *args: made.append(args)
    list(reader.read(range(4), sharding()))
    assert not made, "made again"
    reader.close()

    examples = EvalExamples(test_split, resize=36, image_size=32)
    reader = Reader(examples, batch_size=300, **options)
    batches = list(reader.read(range(reader.num_batches()), sharding()))
    reader.close()
    options = {"batch_size": 300, "sharding": sharding(), "reading": THREADS}
    for a, b in zip(batches, pipeline.EvalBatches(examples, **options), strict=True):
        assert same(a, b) and (a["mask"] == b["mask"]).all()


def test_a_worker_of_a_reader_passes_on_what_is_wrong(train_split):
    records = [train_split.records[i] for i in range(8)]
    examples = TrainExamples(sources.Split("x/train", records, "0123456789"), TRANSFORM, 0)
    reader = Reader(examples, batch_size=4, num_workers=1)
    records[_permutation(0, 0, 8)[-1]] = {"image": b"broken", "label": 0}
    with contextlib.closing(reader), pytest.raises(DataError, match="cannot be decoded"):
        list(reader.read(range(2), sharding()))


def test_without_tfds_the_remedy_is_a_packed_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "convstem_jax.data.tfds_directory", None)
    monkeypatch.delattr(data, "tfds_directory", raising=False)
    with pytest.raises(ConfigError, match="python -m convstem_jax.data.pack"):
        sources.open_split(str(DATASETS), NAME, "test")
