"""Mixup, CutMix and PCA lighting, on the device (section 4, after the authors' code)."""

import jax
import jax.numpy as jnp
import numpy as np

# Principal components of the colours of ImageNet's pixels in [0, 1], rows R, G, B.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], np.float32
)


def lighting(key: jax.Array, num: int, std: float) -> jax.Array:
    """Draws what PCA lighting adds to the colours of each of `num` images: `[num, 3]`.

    Done here, not on the host, where the sum would have to be rounded and clipped to uint8.
    """
    if not std:
        return jnp.zeros((num, 3))
    alpha = std * jax.random.normal(key, (num, 3))
    return jnp.sum(_EIGENVECTORS * (alpha * _EIGENVALUES)[:, None, :], axis=-1)


def draw_mask(
    key: jax.Array, height: int, width: int, *, mixup_alpha: float, cutmix_alpha: float
) -> jax.Array:
    """Draws the share that each pixel keeps of its own image, for a whole batch: `[H, W]`.

    Either mixup (the same share everywhere, from Beta(alpha, alpha)) or CutMix (0 in a box, 1
    elsewhere), each in half of the cases; an alpha of 0 leaves that one out.

    Args:
        key: random key.
        height: of the images.
        width: of the images.
        mixup_alpha: of mixup; 0 for none.
        cutmix_alpha: of CutMix; 0 for none.
    """
    which, beta, x, y = jax.random.split(key, 4)
    ones = jnp.ones((height, width))

    def mixup():
        return ones * symmetric_beta(beta, mixup_alpha)

    def cutmix():
        # The authors' box: centred anywhere, and cut off at the border.
        side = jnp.sqrt(1 - symmetric_beta(beta, cutmix_alpha))

        def inside(key, size):
            half = jnp.floor(size * side).astype(jnp.int32) // 2
            distance = jnp.arange(size) - jax.random.randint(key, (), 0, size)
            return (-half <= distance) & (distance < half)

        return ones - (inside(y, height)[:, None] & inside(x, width)[None])

    if mixup_alpha and cutmix_alpha:
        return jnp.where(jax.random.bernoulli(which), mixup(), cutmix())
    if mixup_alpha:
        return mixup()
    return cutmix() if cutmix_alpha else ones


def symmetric_beta(key: jax.Array, alpha: float, shape: tuple[int, ...] = ()) -> jax.Array:
    """Draws from Beta(alpha, alpha) without the loops of `jax.random.beta`, which devices wait for.

    From Student's t with 2 alpha degrees of freedom, which has a polar form like the normal
    distribution (Bailey 1994, Mathematics of Computation 62, 779-781).
    """
    u, v = jax.random.uniform(key, (2, *shape))
    square = jnp.power(1 - u, -1 / alpha) - 1  # of t's radius over its degrees of freedom
    x = jnp.cos(2 * jnp.pi * v)
    return 0.5 + 0.5 * x / jnp.sqrt(1 / square + x**2)


def mix(images: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes each image and target with its neighbour's in the batch, 0 with 1, 2 with 3, and so on.

    Differs from the paper, which pairs the images by a random permutation. Here the order of a
    batch is random already, and neighbours lie on the same device.

    Args:
        images: `[N, H, W, 3]`, N even.
        targets: probabilities of the classes, `[N, C]`.
        mask: from `draw_mask`.

    Returns:
        Both mixed. A target weighs as much as the pixels of its image, so rows still sum to 1.
    """
    share = mask.mean()

    def mixed(x, share):
        pairs = x.reshape(-1, 2, *x.shape[1:])
        return (share * pairs + (1 - share) * pairs[:, ::-1]).reshape(x.shape)

    return mixed(images, mask[:, :, None]), mixed(targets, share)
