"""Numbers that no benchmark can use are refused."""

import pytest

from benchmarks import around_step, population, reading, roofline, tpu_cycles, train_step

COUNT, EVEN = "must be a whole number of 1 or more", "must be even: images are mixed in pairs"


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (around_step, "--batch 3", f"--batch: '3' {EVEN}"),
        (around_step, "--steps 0", f"--steps: '0' {COUNT}"),
        (population, "--trials 0", f"--trials: '0' {COUNT}"),
        (population, "--repeats=-1", f"--repeats: '-1' {COUNT}"),
        (reading, "--threads 2 0", f"--threads: '0' {COUNT}"),
        (reading, "--latency_ms 30 -1", "--latency_ms -1 must be 0 or more"),
        (roofline, "--batch 0", f"--batch: '0' {COUNT}"),
        (tpu_cycles, "--batch=many", f"--batch: 'many' {COUNT}"),
        (train_step, "--batch 2 3", f"--batch: '3' {EVEN}"),
        (train_step, "--matmul_size 1.5", f"--matmul_size: '1.5' {COUNT}"),
    ],
)
def test_a_wrong_count_is_refused(program, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        program.main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err
