#!/usr/bin/env bash
# Trains on several GPUs of this machine: one process, which shards each batch over them.
#
#     launch/multi_gpu.sh                     all GPUs
#     launch/multi_gpu.sh 0,1,2,3             these
#     launch/multi_gpu.sh --dry-run 0,1       only print the command
#
# It needs .venv, from: pip install --require-hashes -r requirements.lock -r requirements-gpu.lock.
# launch/settings.sh says what to train and where to save: CONFIG=configs/vitc.py:1gf
# WORKDIR=$PWD/runs/first. Run the same command again to continue after an interruption. The exit
# status is the program's.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

read_arguments "" "$@"
gpus=${args[0]:-}
[[ ${#args[@]} -le 1 && $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] ||
  die "'${args[*]}' is wrong: give the GPUs' numbers, as in 0,1,2,3"
set_flags
cd "$launch/.."
# --processes=1: even inside a SLURM job, this one process is the whole run.
command=(.venv/bin/python -m convstem_jax.main --processes=1 "${flags[@]}")
[[ -z $gpus ]] || command=(env CUDA_VISIBLE_DEVICES="$gpus" "${command[@]}")
run "${command[@]}"
