"""Times how fast this machine's processors decode images, augment them and make batches.

    python -m benchmarks.input_speed                                 made-up photographs
    python -m benchmarks.input_speed --config configs/vitc.py        ImageNet, from where it lies
    python -m benchmarks.input_speed --workers 1 8 16 --batch 64

The first lines are of one image after another, the last ones of the input pipeline, which hands
batches to the devices as training does, for each number of worker processes. Made-up photographs
have the commonest size of ImageNet's, 500 x 375, as many bytes as those have on average, and their
spectrum; they lie in a file that the system keeps in memory.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time

import cv2
import jax
import ml_collections
import numpy as np

from benchmarks import arguments
from convstem_jax import build, command_line, files
from convstem_jax.config import load_config
from convstem_jax.data import autoaugment, packed, pipeline, sources
from convstem_jax.data.examples import TrainExamples
from convstem_jax.errors import UserError
from convstem_jax.sharding import Sharding
from convstem_jax.terminal import positive, progress_bar, tell

# With it a made-up photograph has about the 115 kB of ImageNet's average.
_JPEG_QUALITY = 87


def photograph(rng: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    """A JPEG file of noise whose amplitudes fall with the frequency, as photographs' do."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1 / width
    spectrum = np.fft.rfft2(rng.standard_normal((4, height, width))) / frequency
    grey, *colours = np.fft.irfft2(spectrum, s=(height, width))
    image = grey[..., None] + 0.3 * np.moveaxis(np.stack(colours), 0, -1)
    image = 118 + 60 * (image - image.mean()) / image.std()
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    return cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), quality)[1].tobytes()


def made_up(folder: str, num: int) -> ml_collections.ConfigDict:
    """Writes a data set of `num` photographs; returns the paper's configuration for reading it."""
    rng = np.random.default_rng(0)
    records = packed.records([photograph(rng) for _ in range(num)], [0] * num)
    packed.write(os.path.join(folder, "made_up.npz"), {"train": records}, ["noise"])
    return load_config(f"configs/vitc.py:dataset=made_up,data_dir={folder},train_split=train")


def one_by_one(examples: TrainExamples, num: int) -> dict[str, float]:
    """Seconds that each operation on an image takes, on one core."""
    split, rng = examples.split, np.random.default_rng(0)
    crop = dataclasses.replace(examples.transform, auto_augment=False)
    seconds = {"decode": 0.0, "crop, resize, flip": 0.0}
    if examples.transform.auto_augment:
        seconds["AutoAugment"] = 0.0
    for i in progress_bar(range(num), "one by one", "image"):
        times = [time.perf_counter()]
        record = split[i % len(split)]
        times.append(time.perf_counter())
        image = np.ascontiguousarray(crop(record, rng)["image"])
        times.append(time.perf_counter())
        if examples.transform.auto_augment:
            autoaugment.auto_augment(image, rng)
            times.append(time.perf_counter())
        for name, took in zip(seconds, np.diff(times), strict=True):
            seconds[name] += took / num
    return seconds | {"all of it": sum(seconds.values())}


def batches_per_second(
    examples: TrainExamples, batch_size: int, num_workers: int, seconds: float
) -> float:
    """Speed of the input pipeline with training's defaults, measured for so many seconds."""
    reading = pipeline.Reading(num_workers, num_threads=1, read_ahead=1, prefetch=2)
    batches = pipeline.train_batches(
        examples,
        batch_size=batch_size,
        sharding=Sharding(jax.local_devices()).batch,
        reading=reading,
    )
    with contextlib.closing(batches):
        for _ in range(2 * num_workers + reading.prefetch):  # made while the workers started
            jax.block_until_ready(next(batches))
        start, num = time.perf_counter(), 0
        while (took := time.perf_counter() - start) < seconds:
            jax.block_until_ready(next(batches))
            num += 1
    return num / took


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser("input_speed", __doc__)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]",
        help="whose data and augmentation to time (default: the paper's augmentation of made-up "
        "photographs)")  # fmt: skip
    add("--workers", type=positive, nargs="+", default=sorted({1, cores}), metavar="N",
        help="numbers of processes, a line for each (default: 1, and one per core)")  # fmt: skip
    add("--batch", type=positive, default=128,
        help="images of one process's batch (default: %(default)s)")  # fmt: skip
    add("--images", type=positive, default=500,
        help="how many to time one by one (default: %(default)s)")  # fmt: skip
    add("--seconds", type=float, default=20.0,
        help="how long to time each number of workers (default: %(default)g)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"--seconds {args.seconds:g} must be more than 0")
    if args.batch % jax.local_device_count():
        num = jax.local_device_count()
        parser.error(f"--batch {args.batch} is no multiple of the {num} devices here")
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = load_config(args.config) if args.config else made_up(folder, 64)
            split = sources.open_split(config.data_dir, config.dataset, config.train_split)
            examples = build.train_examples(config, split)
            rows = [
                {"what": name, "workers": None, "images_per_second": 1 / took}
                for name, took in one_by_one(examples, args.images).items()
            ]
            for num in progress_bar(args.workers, "batches", "line"):
                speed = args.batch * batches_per_second(examples, args.batch, num, args.seconds)
                rows.append({"what": "batches", "workers": num, "images_per_second": speed})
        except UserError as error:
            return tell(error)
    print(table(rows))
    if args.json:
        about = arguments.made_by(argv) | {"batch": args.batch}
        files.write_json(args.json, [row | about for row in rows])
    return 0


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        (row["what"], row["workers"] or "", f"{1000 / row['images_per_second']:.2f}",
         f"{row['images_per_second']:,.0f}")
        for row in rows
    ]  # fmt: skip
    headers = ("what", "worker processes", "ms an image", "images/s")
    return arguments.table(headers, lines)


if __name__ == "__main__":
    command_line.silence_libraries()
    sys.exit(main())
