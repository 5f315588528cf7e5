"""Builds the study's harder data set: garments in colour over crops of photographs.

    apt-get install mate-backgrounds && pip install scikit-image
    python -m convstem_jax.study.colour_set --garments fashion_mnist_10k

It is constructed, not photographed: each grey image of Fashion-MNIST gets a random hue, size and
place on a random crop of a photograph, 32x32 RGB. Every fourth photograph is only for test images.
The result is one file of WebP images that `config.data_dir` finds, the same in every run. The
photographs keep their licences, some of which are copyleft.
"""

import importlib.util
import os
import sys

import cv2
import numpy as np

from convstem_jax.data import packed, sources
from convstem_jax.errors import ConfigError, DataError, UserError
from convstem_jax.terminal import new_parser, progress_bar, tell

SIZE = 32
# All photographs in colour that the package scikit-image has.
SKIMAGE = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"),
    *("ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
MATE = "/usr/share/backgrounds/mate/nature"  # of Debian's package mate-backgrounds
SHORT_SIDE = 384  # of a photograph, so that a crop of 32 pixels still has something in it
WEBP_QUALITY = 90


def place(garment: np.ndarray, photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Puts a garment on a random crop of a photograph.

    Args:
        garment: uint8 `[h, w]`, black around the garment.
        photograph: uint8 `[H, W, 3]`.
        rng: draws the crop, and the garment's hue, saturation, size and place.

    Returns:
        uint8 `[32, 32, 3]`.
    """
    crop = rng.integers(SIZE, min(photograph.shape[:2]) // 2)
    y, x = (rng.integers(side - crop + 1) for side in photograph.shape[:2])
    background = photograph[y : y + crop, x : x + crop]
    background = cv2.resize(background, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    if rng.uniform() < 0.5:
        background = background[:, ::-1]

    size = rng.integers(20, SIZE + 1)
    garment = cv2.resize(garment, (size, size), interpolation=cv2.INTER_AREA)
    grey = np.zeros((SIZE, SIZE), np.uint8)
    y, x = rng.integers(SIZE - size + 1, size=2)
    grey[y : y + size, x : x + size] = garment
    hue, saturation = rng.integers(180), rng.integers(64, 256)  # OpenCV's hue has 180 steps
    hsv = np.stack([np.full_like(grey, hue), np.full_like(grey, saturation), grey], axis=-1)
    colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    opacity = np.minimum(grey / 48, 1)[..., None]  # soft at the dark border
    return np.rint(opacity * colour + (1 - opacity) * background).astype(np.uint8)


def read_photographs(paths: list[str]) -> dict[str, list[np.ndarray]]:
    """Reads and splits photographs: `{"train": [...], "test": [...]}`, uint8 RGB.

    Raises:
        ConfigError: one is missing or cannot be read, or there are fewer than 4.
    """
    files = []
    for path in paths:
        inside = os.listdir(path) if os.path.isdir(path) else [""]
        files += [os.path.join(path, name).rstrip("/") for name in inside]
    photographs = []
    for file in sorted(files, key=os.path.basename):
        image = cv2.imread(file, cv2.IMREAD_COLOR_RGB) if os.path.exists(file) else None
        if image is None or min(image.shape[:2]) < 2 * SIZE + 2:
            raise ConfigError(
                f"{file} is no photograph of at least {2 * SIZE + 2} pixels: "
                "`apt-get install mate-backgrounds`, or give others with --photographs"
            )
        scale = min(1, SHORT_SIDE / min(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        photographs.append(image)
    if len(photographs) < 4:
        raise ConfigError(f"--photographs: {len(photographs)} are too few to part, of 4")
    test = photographs[3::4]
    return {"test": test, "train": [p for i, p in enumerate(photographs) if i % 4 != 3]}


def build(
    split: sources.Split, photographs: list[np.ndarray], seed: tuple[int, ...]
) -> tuple[packed.PackedRecords, np.ndarray]:
    """Places every garment of a split once; returns the records, and all pixels `[N, 32, 32, 3]`.

    Raises:
        DataError: a record is damaged.
    """
    images, encoded, labels = [], [], []
    for i in progress_bar(range(len(split)), split.name, "image"):
        example, rng = split[i], np.random.default_rng((*seed, i))
        photograph = photographs[rng.integers(len(photographs))]
        images.append(place(example["image"][..., 0], photograph, rng))
        bgr = images[-1][..., ::-1]
        found, content = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
        if not found:
            raise DataError("this OpenCV cannot write WebP: install opencv-python-headless")
        encoded.append(content.tobytes())
        labels.append(int(example["label"]))
    return packed.records(encoded, labels), np.stack(images)


def default_photographs() -> list[str]:
    """Where the photographs of the two packages are, installed or not."""
    spec = importlib.util.find_spec("skimage")
    folder = os.path.join(os.path.dirname(spec.origin), "data") if spec else "skimage/data"
    return [MATE, *(os.path.join(folder, name) for name in SKIMAGE)]


def main(argv: list[str] | None = None) -> int:
    """Builds the data set; returns the exit status."""
    parser = new_parser("convstem_jax.study.colour_set", __doc__)
    add = parser.add_argument
    add("--garments", default="fashion_mnist", help="data set of garments (default: %(default)s)")
    add("--data_dir", default="datasets", help="folder that holds it (default: %(default)s)")
    add("--output", default="datasets", help="folder to write to (default: %(default)s)")
    add("--photographs", nargs="+", metavar="PATH", help="files or folders (default: see above)")
    args = parser.parse_args(argv)
    name = args.garments.replace("mnist", "photos")
    name += "_photos" if name == args.garments else ""
    path = os.path.join(args.output, f"{name}.npz")
    try:
        os.makedirs(args.output, exist_ok=True)
        photographs = read_photographs(args.photographs or default_photographs())
        splits = {
            name: sources.open_split(args.data_dir, args.garments, name) for name in photographs
        }
        built = {
            name: build(split, photographs[name], (0, i))
            for i, (name, split) in enumerate(sorted(splits.items()))
        }
        records = {name: records for name, (records, _) in built.items()}
        packed.write(path, records, splits["train"].class_names)
    except (UserError, OSError) as error:
        return tell(error)
    pixels = built["train"][1] / 255
    print(
        f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, {len(photographs['train'])} photographs "
        f"behind the training images, {len(photographs['test'])} others behind the test images\n"
        f"mean {pixels.mean((0, 1, 2)).round(3)}, standard deviation "
        f"{pixels.std((0, 1, 2)).round(3)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
