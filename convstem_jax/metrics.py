"""Records of a run: metrics.jsonl, TensorBoard and progress lines."""

from collections.abc import Sequence
import contextlib
import json
import math
import os
import time

import jax

from convstem_jax import files, processes
from convstem_jax.errors import NotFiniteError, writing
from convstem_jax.step import PyTree
from convstem_jax.terminal import duration


class Records:
    """Writes metrics to `workdir` and a line of progress to the terminal; process 0 only.

    Training metrics are fetched from the device when they are ready, and at the latest at the next
    log point, so that the host has always given the device more to do before it waits.

    Args:
        workdir: folder of the run.
        first_step: updates made before this process; later records of an interrupted run are
            dropped, since the steps they describe will be made again.
        num_steps: updates of the whole run.
        steps_per_epoch: to state the epoch.
        batch_size: to state images per second.
        speed: `speed` of the process before this one.
    """

    def __init__(
        self,
        workdir: str,
        *,
        first_step: int,
        num_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        speed: Sequence[float] = (),
    ):
        self._main = processes.is_first()
        self._num_steps = num_steps
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._pending = None
        self._num_batches = self._num_starved = 0
        self._paused = False
        self._clock = _Clock(*speed)
        self._not_finite = None
        if self._main:
            self.path = os.path.join(workdir, "metrics.jsonl")
            with writing(self.path):
                kept = [
                    record
                    for record in read_jsonl(self.path)
                    if record["step"] <= first_step
                    # The last step's evaluation is repeated where it was not the run's end.
                    and (record["step"] < num_steps or "loss" in record)
                ]
                files.write_jsonl(self.path, kept)
                self._file = open(self.path, "a", buffering=1)  # noqa: SIM115, closed in close()
            # Here, since it loads TensorFlow for seconds, which errors need not wait for.
            from clu import metric_writers
            import tensorflow as tf

            tf.config.set_visible_devices([], "GPU")  # it would take their memory from JAX
            with _writing_events(workdir):
                self._tensorboard = metric_writers.SummaryWriter(workdir)

    def train(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of `step`, and writes those of the log point before it."""
        self.flush()
        self._clock.tick(step)
        self._pending = step, metrics, self._num_starved / max(1, self._num_batches)
        self._num_batches = self._num_starved = 0

    def flush(self, *, wait: bool = True) -> None:
        """Writes the pending training metrics.

        Args:
            wait: until the device has computed them; if False, they are written only if it has.

        Raises:
            NotFiniteError: the loss is NaN or infinite.
            CheckpointError, StorageError: the file cannot be written.
        """
        if self._not_finite and wait:
            raise self._not_finite
        if self._pending is None:
            return
        if not wait and not all(value.is_ready() for value in self._pending[1].values()):
            return
        (step, metrics, starved), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        speed = self.images_per_second
        timing = {"images_per_second": speed, "starved": starved} if speed else {}
        self._write(step, "train", metrics, timing)
        text = f"loss {metrics['loss']:.4f}  "
        if speed:
            text += f"{speed:,.0f} images/s  {self._clock.time_left(self._num_steps - step)} left"
            text += f"  {starved:.0%} of the steps waited for input" if starved >= 0.1 else ""
        else:
            text += "compiled"
        self._say(step, text)
        if not math.isfinite(metrics["loss"]):
            self._not_finite = NotFiniteError(
                f"the training loss is {metrics['loss']} at step {step}, where the learning rate "
                f"is {metrics['lr']:.3g}: lower config.lr, with another --workdir"
            )
            # Several processes must stop at the same step: the next at which all of them wait.
            if wait or jax.process_count() == 1:
                raise self._not_finite

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

    @contextlib.contextmanager
    def pause(self, step: int, state: PyTree):
        """A context for work that is not training, left out of images per second.

        Args:
            step: updates made.
            state: nested arrays to wait for, so that training before it is not left out too.
        """
        self.flush()
        if self._main:
            with writing(self.path):  # a checkpoint must not outlive the records before it
                os.fsync(self._file.fileno())
        jax.block_until_ready(state)
        self._paused = True  # the devices ran out of work, whatever the input
        with self._clock.pause(step):
            yield

    def batch_arrived(self, metrics: dict[str, jax.Array] | None) -> None:
        """Counts a step as starved if its batch came after the device had finished the one before.

        In this process: where another one waits, all devices wait for it in the next collective.

        Args:
            metrics: of the step before; None for the first.
        """
        if metrics is not None and not self._paused:
            self._num_batches += 1
            self._num_starved += metrics["loss"].is_ready()
        self._paused = False

    @property
    def speed(self) -> tuple[int, float, float]:
        """Steps made, the seconds that they took without compilation, and those of pauses."""
        return self._clock.steps, self._clock.seconds, self._clock.paused

    @property
    def images_per_second(self) -> float:
        """Training speed of the whole run, without compilation and pauses."""
        return self._clock.steps_per_second * self._batch_size

    def close(self) -> None:
        """Closes the files; the last metrics must have been flushed."""
        if self._main:
            with writing(self.path):
                self._file.close()
            with _writing_events(os.path.dirname(self.path)):
                self._tensorboard.close()

    def _write(self, step: int, kind: str, metrics: dict, timing: dict) -> None:
        if self._main:
            epoch = round(step / self._steps_per_epoch, 4)
            values = metrics | timing
            # JSON has no NaN.
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            record = {"step": step, "epoch": epoch, "kind": kind} | finite
            with writing(self.path):
                self._file.write(json.dumps(record) + "\n")
            scalars = {f"{kind}/{name}": value for name, value in values.items()}
            with _writing_events(os.path.dirname(self.path)):
                self._tensorboard.write_scalars(step, scalars)

    def _say(self, step: int, text: str) -> None:
        if self._main:
            width = len(str(self._num_steps))
            epoch = step / self._steps_per_epoch
            print(f"step {step:{width}}/{self._num_steps}  epoch {epoch:.1f}  {text}", flush=True)


@contextlib.contextmanager
def _writing_events(workdir: str):
    """`writing` of TensorBoard's files, for which TensorFlow has errors of its own."""
    import tensorflow as tf

    with writing(os.path.join(workdir, "events.out.tfevents")):
        try:
            yield
        except tf.errors.OpError as error:
            raise OSError(error.message.partition("\n")[0]) from error


class _Clock:
    """Speed of training, without what comes before the first tick (compilation) and the pauses."""

    def __init__(self, steps: int = 0, seconds: float = 0.0, paused: float = 0.0):
        self._last = None  # (step, time) of the last tick
        self.steps, self.seconds, self.paused = steps, seconds, paused

    def tick(self, step: int) -> None:
        """Notes that `step` is reached now."""
        now = time.perf_counter()
        if self._last is not None:
            self.steps += step - self._last[0]
            self.seconds += now - self._last[1]
        self._last = step, now

    @contextlib.contextmanager
    def pause(self, step: int):
        """Leaves the block out of the speed; `step` is reached when it begins."""
        self.tick(step)
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start
        self._last = step, time.perf_counter()

    @property
    def steps_per_second(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0

    def time_left(self, num_steps: int) -> str:
        """Time for `num_steps` more, pauses included since evaluations go on happening."""
        if not self.steps:
            return "?"
        return duration((self.seconds + self.paused) / self.steps * num_steps)


def read_jsonl(path: str) -> list[dict]:
    """Reads the records of a run, leaving out what is not one, such as a line that was cut off."""
    records = []
    if os.path.exists(path):
        with open(path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]
