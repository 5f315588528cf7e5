"""Image operations on the host, on uint8 `[h, w, 3]` arrays (section 4 and the authors' code).

Resizing is OpenCV's bilinear one without anti-aliasing, as in the authors' code. Differs from the
paper: it rounds to uint8, where the authors resize float32.
"""

import math

import cv2
import numpy as np

# The input pipeline has its own threads and processes; OpenCV's would compete with them.
cv2.setNumThreads(0)


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, *, size: int, min_area: float
) -> np.ndarray:
    """Crops a random part with an area of `min_area` to 1 of the image's, resized to a square.

    The aspect ratio is drawn between 3/4 and 4/3, uniformly, then inverted in half of the cases.
    After ten draws that do not fit, the centre crop is taken.
    """
    h, w = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(min_area, 1.0) * h * w
        ratio = rng.uniform(3 / 4, 4 / 3)
        crop_w, crop_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rng.uniform() < 0.5:
            crop_w, crop_h = crop_h, crop_w
        if 0 < crop_h <= h and 0 < crop_w <= w:
            y, x = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
            crop = image[y : y + crop_h, x : x + crop_w]
            return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)
    return center_crop(image, resize=size, size=size)


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right in half of the cases."""
    return image[:, ::-1] if rng.uniform() < 0.5 else image


def center_crop(image: np.ndarray, *, resize: int, size: int) -> np.ndarray:
    """Resizes the short side to `resize` and takes the central `size` x `size` square."""
    # A strip of 1 x 20,000 pixels would be gigabytes: what is far from the middle is cut off first.
    ends = [max(0, (n - 16 * min(image.shape[:2])) // 2) for n in image.shape[:2]]
    image = image[ends[0] : image.shape[0] - ends[0], ends[1] : image.shape[1] - ends[1]]
    h, w = image.shape[:2]
    if min(h, w) != resize:
        w, h = (resize, int(h / w * resize)) if w < h else (int(w / h * resize), resize)
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    y, x = math.ceil((h - size) / 2), math.ceil((w - size) / 2)
    return image[y : y + size, x : x + size]
