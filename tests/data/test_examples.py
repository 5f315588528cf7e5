"""Which example comes when, and what is drawn for it."""

import numpy as np

from convstem_jax.data.examples import TrainExamples, TrainTransform
from tests.data.embedded import take, train_batches


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
    """One image, of which every epoch is another view."""
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
