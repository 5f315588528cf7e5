"""What images cost the processors is timed."""

import itertools
import json
import time

import numpy as np
import pytest

from benchmarks import input_speed
from convstem_jax.data import autoaugment


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
