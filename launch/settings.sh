# Settings of a run on other machines. Edit this file, or set an environment variable of the same
# name, which wins:
#
#     PROJECT=my-project ZONE=us-west4-a launch/tpu_vm.sh create
#
# shellcheck shell=bash disable=SC2034  # the scripts that source this file use the values

# Cloud Storage bucket, mounted at /mnt/bucket on cloud machines.
: "${BUCKET:=}"

# --- The run ---
: "${RUN_NAME:=convstem}"             # of the machine, JobSet or container, and of the run's folder
: "${CONFIG:=configs/vitc.py:4gf}"    # as after --config
: "${FIELDS:=}"                       # fields to override, without spaces in them: "lr=5e-4 epochs=50"
# A folder shared by all machines of the run; without a BUCKET, one in this repository.
: "${WORKDIR:=${BUCKET:+/mnt/bucket/runs/$RUN_NAME}}"
: "${WORKDIR:=${launch%/*}/runs/$RUN_NAME}"
# config.data_dir; "" for the configuration's own, if no data are copied.
: "${DATA_DIR=${BUCKET:+/mnt/data}}"

# --- The code: each machine clones it. No password in the address: it would end up in logs. ---
: "${REPOSITORY:=}"                   # https://…, read without a password
: "${COMMIT:=$(git -C "${BASH_SOURCE[0]%/*}" rev-parse HEAD 2>/dev/null || true)}"

# --- Google Cloud ---
: "${PROJECT:=}"
: "${ZONE:=}"                         # one that has the accelerator: us-west4-a
: "${SERVICE_ACCOUNT:=}"              # e-mail address; "" for the project's default account
: "${SPOT:=yes}"                      # yes: cheaper, but may be preempted

# --- The data: launch/data.sh copies them to each TPU VM; see docs/data_on_a_pod.md ---
: "${DATA_SOURCE=${BUCKET:+gs://$BUCKET/data}}"  # a folder; "" if DATA_DIR has them already
: "${MEMORY_RESERVE_GB:=32}"          # left for the program if the data go into memory

# --- Cloud TPU VMs: launch/tpu_vm.sh, launch/tpu_spot.sh ---
: "${ACCELERATOR:=v5litepod-16}"
# v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e, tpu-ubuntu2204-base
# for v4 and older: https://docs.cloud.google.com/tpu/docs/runtimes
: "${RUNTIME:=v2-alpha-tpuv5-lite}"
: "${CREATE_FLAGS:=}"                 # more flags of `queued-resources create`: --internal-ips
: "${SSH_FLAGS:=}"                    # more flags of `tpu-vm ssh`: --internal-ip, --tunnel-through-iap
: "${POLL_SECONDS:=60}"               # between two checks of the machine
: "${BACKOFF_SECONDS:=60}"            # wait after the first failure; doubles with each further one
: "${BACKOFF_MAX_SECONDS:=1800}"
: "${MAX_FAILURES:=20}"               # in a row, without a new checkpoint, before giving up; SLURM too
: "${DELETE_AT_END:=yes}"             # yes: tpu_spot.sh deletes the machine when the run ends or it gives up

# --- Containers: launch/docker.sh, launch/gke.sh ---
: "${IMAGE:=convstem_jax}"            # REGION-docker.pkg.dev/PROJECT/REPOSITORY/convstem_jax to push
: "${DEVICE:=gpu}"                    # what the image is for: gpu or tpu

# --- GKE: launch/gke.sh ---
: "${CLUSTER:=}"                      # only for the XPK line; kubectl has its own context
: "${GKE_ACCELERATOR:=tpu-v5-lite-podslice}"
: "${GKE_TOPOLOGY:=4x4}"
: "${GKE_CHIPS_PER_NODE:=4}"
: "${GKE_DATA_FOLDER:=data}"          # of the bucket; pods mount it as DATA_DIR
: "${GKE_CACHE:=160Gi}"               # memory for all of that; ImageNet's two splits have 145 GiB
: "${GKE_SERVICE_ACCOUNT:=default}"   # a Kubernetes one, with access to the bucket
: "${MAX_RESTARTS:=100}"              # of the whole run, on GKE and under SLURM
