"""AutoAugment with the authors' ImageNet policy (section 4), on uint8 `[h, w, 3]` arrays.

The policy is "v0" of the AutoAugment code, with at least one bit left by posterize. The operations
follow Pillow's, in NumPy and OpenCV: tables exactly, geometry to about one grey level.
"""

import math

import cv2
import numpy as np

_GREY = (128, 128, 128)  # fills what geometry brings in from outside
_LEVELS = np.arange(256)


def auto_contrast(image: np.ndarray, unused_value: float) -> np.ndarray:
    """Stretches each channel to the full range."""

    def table(histogram):
        used = np.flatnonzero(histogram)
        low, high = used[0], used[-1]
        if low == high:
            return _LEVELS
        scale = 255 / (high - low)
        return (_LEVELS * scale - low * scale).clip(0, 255)

    return _per_channel(image, table)


def equalize(image: np.ndarray, unused_value: float) -> np.ndarray:
    """Makes each channel's histogram flat."""

    def table(histogram):
        used = histogram[histogram > 0]
        step = (used.sum() - used[-1]) // 255
        if step == 0:
            return _LEVELS
        below = np.concatenate([[0], np.cumsum(histogram)[:-1]])
        return ((below + step // 2) // step).clip(0, 255)

    return _per_channel(image, table)


def invert(image: np.ndarray, unused_value: float) -> np.ndarray:
    """Turns light into dark."""
    return 255 - image


def posterize(image: np.ndarray, value: float) -> np.ndarray:
    """Keeps the `value` highest bits, at least one."""
    return image & np.uint8(256 - 2 ** (8 - max(1, int(value))))


def solarize(image: np.ndarray, value: float) -> np.ndarray:
    """Inverts levels of `value` and above."""
    return cv2.LUT(image, _to_uint8(np.where(int(value) > _LEVELS, _LEVELS, 255 - _LEVELS)))


def solarize_add(image: np.ndarray, value: float) -> np.ndarray:
    """Brightens levels below 128 by `value`."""
    return cv2.LUT(
        image, _to_uint8(np.where(_LEVELS < 128, (_LEVELS + value).clip(0, 255), _LEVELS))
    )


def color(image: np.ndarray, value: float) -> np.ndarray:
    """Moves from the grey image (0) through the image itself (1) to stronger colours."""
    # Pillow's 16-bit integers for the luma; the sums stay below 2^24, exact in float32.
    weights = np.array([[19595, 38470, 7471, 2**15]], np.float32)
    image = image.astype(np.float32)
    grey = np.floor(cv2.transform(image, weights) / 2**16)[..., None]
    image -= grey
    image *= np.float32(value)
    image += grey
    return _to_uint8(image.clip(0, 255, out=image))


def rotate(image: np.ndarray, value: float) -> np.ndarray:
    """Rotates counter-clockwise by `value` degrees about the centre."""
    h, w = image.shape[:2]
    cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
    x, y = w / 2, h / 2
    return _warp(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def shear_x(image: np.ndarray, value: float) -> np.ndarray:
    """Shifts each row by `value` times its distance from the top."""
    return _warp(image, [[1, value, 0], [0, 1, 0]])


def shear_y(image: np.ndarray, value: float) -> np.ndarray:
    """Shifts each column by `value` times its distance from the left."""
    return _warp(image, [[1, 0, 0], [value, 1, 0]])


def translate_y(image: np.ndarray, value: float) -> np.ndarray:
    """Shifts by `value` times the height."""
    return _warp(image, [[1, 0, 0], [0, 1, value * image.shape[0]]])


def _per_channel(image: np.ndarray, table) -> np.ndarray:
    histograms = [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel() for c in range(3)]
    tables = [table(histogram.astype(int)) for histogram in histograms]
    return cv2.LUT(image, _to_uint8(np.stack(tables, axis=-1))[None])


def _to_uint8(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint8)  # Pillow cuts off the fraction, too


def _warp(image: np.ndarray, source: list[list[float]]) -> np.ndarray:
    """Bilinear warp; `source` gives the source of each output pixel, with centres at 0.5."""
    source = np.array(source)
    source[:, 2] += source[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV's centres are at 0
    h, w = image.shape[:2]
    return cv2.warpAffine(
        image,
        source,
        (w, h),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_GREY,
    )


# operation, its value at magnitude 0 and at magnitude 1, whether the sign is drawn
_OPERATIONS = {
    "auto_contrast": (auto_contrast, 0, 0, False),
    "equalize": (equalize, 0, 0, False),
    "invert": (invert, 0, 0, False),
    "posterize": (posterize, 0, 4, False),
    "solarize": (solarize, 0, 256, False),
    "solarize_add": (solarize_add, 0, 110, False),
    "color": (color, 0.1, 1.9, False),
    "rotate": (rotate, 0, 30, True),
    "shear_x": (shear_x, 0, 0.3, True),
    "shear_y": (shear_y, 0, 0.3, True),
    "translate_y": (translate_y, 0, 0.45, True),
}

# Each line is one sub-policy: two operations with probability and magnitude.
POLICY = (
    (("equalize", 0.8, 0.1), ("shear_y", 0.8, 0.4)),
    (("color", 0.4, 0.9), ("equalize", 0.6, 0.3)),
    (("color", 0.4, 0.1), ("rotate", 0.6, 0.8)),
    (("solarize", 0.8, 0.3), ("equalize", 0.4, 0.7)),
    (("solarize", 0.4, 0.2), ("solarize", 0.6, 0.2)),
    (("color", 0.2, 0.0), ("equalize", 0.8, 0.8)),
    (("equalize", 0.4, 0.8), ("solarize_add", 0.8, 0.3)),
    (("shear_x", 0.2, 0.9), ("rotate", 0.6, 0.8)),
    (("color", 0.6, 0.1), ("equalize", 1.0, 0.2)),
    (("invert", 0.4, 0.9), ("rotate", 0.6, 0.0)),
    (("equalize", 1.0, 0.9), ("shear_y", 0.6, 0.3)),
    (("color", 0.4, 0.7), ("equalize", 0.6, 0.0)),
    (("posterize", 0.4, 0.6), ("auto_contrast", 0.4, 0.7)),
    (("solarize", 0.6, 0.8), ("color", 0.6, 0.9)),
    (("solarize", 0.2, 0.4), ("rotate", 0.8, 0.9)),
    (("rotate", 1.0, 0.7), ("translate_y", 0.8, 0.9)),
    (("shear_x", 0.0, 0.0), ("solarize", 0.8, 0.4)),
    (("shear_y", 0.8, 0.0), ("color", 0.6, 0.4)),
    (("color", 1.0, 0.0), ("rotate", 0.6, 0.2)),
    (("equalize", 0.8, 0.4), ("equalize", 0.0, 0.8)),
    (("equalize", 1.0, 0.4), ("auto_contrast", 0.6, 0.2)),
    (("shear_y", 0.4, 0.7), ("solarize_add", 0.6, 0.7)),
    (("posterize", 0.8, 0.2), ("solarize", 0.6, 1.0)),
    (("solarize", 0.6, 0.8), ("equalize", 0.6, 0.1)),
    (("color", 0.8, 0.6), ("rotate", 0.4, 0.5)),
)


def auto_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Applies one sub-policy, drawn uniformly."""
    for name, probability, magnitude in POLICY[rng.integers(len(POLICY))]:
        if rng.uniform() < probability:
            image = apply(name, image, magnitude, negate=rng.uniform() < 0.5)
    return image


def apply(name: str, image: np.ndarray, magnitude: float, *, negate: bool) -> np.ndarray:
    """Applies the operation `name` at a magnitude from 0 to 1.

    Args:
        name: as in `POLICY`.
        image: uint8 `[h, w, 3]`.
        magnitude: 0 to 1.
        negate: reverses the direction of operations that have one.
    """
    operation, low, high, signed = _OPERATIONS[name]
    value = low + magnitude * (high - low)
    return operation(image, -value if signed and negate else value)
