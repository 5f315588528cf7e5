"""Metrics of a run: metrics.jsonl, TensorBoard, and lines of progress on the terminal."""

import json
import os
import time

import jax

from convstem_jax.errors import NotFiniteError


class Records:
    """Writes metrics to `workdir` and a line of progress to the terminal; process 0 only.

    Training metrics are fetched from the device one log point late, so that the host has always
    given the device more to do before it waits.

    Args:
        workdir: folder of the run.
        first_step: updates made before this process; later records of an interrupted run are
            dropped, since the steps they describe will be made again.
        num_steps: updates of the whole run.
        steps_per_epoch: to state the epoch.
        batch_size: to state images per second.
    """

    def __init__(
        self,
        workdir: str,
        *,
        first_step: int,
        num_steps: int,
        steps_per_epoch: float,
        batch_size: int,
    ):
        self._main = jax.process_index() == 0
        self._first_step, self._num_steps = first_step, num_steps
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._pending = None
        self._clock = _Clock(first_step)
        if self._main:
            self.path = os.path.join(workdir, "metrics.jsonl")
            kept = [r for r in read_jsonl(self.path) if r["step"] <= first_step]
            with open(self.path + ".tmp", "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
            os.replace(self.path + ".tmp", self.path)
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115, closed in close()
            # Here, since it loads TensorFlow: seconds that errors need not wait.
            from clu import metric_writers
            import tensorflow as tf

            tf.config.set_visible_devices([], "GPU")  # it would take their memory from JAX
            self._tensorboard = metric_writers.SummaryWriter(workdir)

    def train(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of `step`, and writes those of the log point before it."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Writes the training metrics that wait.

        Raises:
            NotFiniteError: the loss is NaN or infinite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._clock.tick(step)
        speed = self._clock.steps_per_second * self._batch_size
        self._write(step, "train", metrics, {"images_per_second": speed} if speed else {})
        left = self._clock.time_left(self._num_steps - step)
        self._say(
            step,
            f"loss {metrics['loss']:.4f}"
            + (f"  {speed:,.0f} images/s  {left} left" if speed else "  compiled"),
        )
        if not abs(metrics["loss"]) < float("inf"):
            raise NotFiniteError(
                f"the training loss is {metrics['loss']} at step {step}: lower config.lr "
                f"(it is {metrics['lr']:.3g} there), or resume from an earlier checkpoint"
            )

    def eval(self, step: int, name: str, results: dict[str, dict[str, float]]) -> None:
        """Writes the results of an evaluation: {"ema": {...}, "raw": {...}}."""
        flat = {
            f"{weights}_{key}": value
            for weights, result in results.items()
            for key, value in result.items()
            if key != "examples"
        }
        self._write(step, name, flat, {})
        self._say(
            step,
            f"{name} top-1 error {flat['ema_top1_error']:.2f} % "
            f"(without EMA {flat['raw_top1_error']:.2f} %)",
        )

    def pause(self) -> "_Clock":
        """A context for work that is not training, left out of images per second."""
        return self._clock

    @property
    def images_per_second(self) -> float:
        """Training speed over the life of this process, without compilation and evaluation."""
        return self._clock.steps_per_second * self._batch_size

    def close(self) -> None:
        """Closes the files; the last metrics must have been flushed."""
        if self._main:
            self._file.close()
            self._tensorboard.close()

    def _write(self, step: int, kind: str, metrics: dict, timing: dict) -> None:
        if self._main:
            epoch = round(step / self._steps_per_epoch, 4)
            record = {"step": step, "epoch": epoch, "kind": kind} | metrics | timing
            self._file.write(json.dumps(record) + "\n")
            scalars = {f"{kind}/{name}": value for name, value in (metrics | timing).items()}
            self._tensorboard.write_scalars(step, scalars)

    def _say(self, step: int, text: str) -> None:
        if self._main:
            width = len(str(self._num_steps))
            epoch = step / self._steps_per_epoch
            print(f"step {step:{width}}/{self._num_steps}  epoch {epoch:.1f}  {text}", flush=True)


class _Clock:
    """Seconds of training between log points, without the first one and without the pauses."""

    def __init__(self, first_step: int):
        self._start = None
        self._steps = 0
        self._last_step = first_step
        self._paused_at = None
        self._paused = 0.0
        self._seconds = 0.0

    def tick(self, step: int) -> None:
        if self._start is None:  # the steps before this moment include the compilation
            self._start, self._paused = time.perf_counter(), 0.0
        else:
            self._steps += step - self._last_step
            self._seconds = time.perf_counter() - self._start - self._paused
        self._last_step = step

    def __enter__(self):
        self._paused_at = time.perf_counter()

    def __exit__(self, *unused):
        self._paused += time.perf_counter() - self._paused_at

    @property
    def steps_per_second(self) -> float:
        return self._steps / self._seconds if self._seconds else 0.0

    def time_left(self, num_steps: int) -> str:
        if not self._steps:
            return "?"
        # With the pauses: evaluations go on happening.
        seconds = round((self._seconds + self._paused) / self._steps * num_steps)
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"


def read_jsonl(path: str) -> list[dict]:
    """Reads the records of a file; a last line that was cut off is left out."""
    records = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return records
