#!/usr/bin/env bash
# Creates a slice of Cloud TPU VMs (one machine, or a pod of many), trains on it and deletes it.
#
#     launch/tpu_vm.sh create            request it; it may wait in a queue for a while
#     launch/tpu_vm.sh setup             on every worker: clone $COMMIT, install, mount the bucket,
#                                        copy the data
#     launch/tpu_vm.sh run               start training on every worker; no connection is needed
#     launch/tpu_vm.sh status            the states of the request, the slice and each worker
#     launch/tpu_vm.sh logs [--follow]   of worker 0; --all for the last lines of each
#     launch/tpu_vm.sh stop              save and end; `run` continues from there
#     launch/tpu_vm.sh delete            the slice and its request
#
# Add --dry-run to only print the commands. launch/settings.sh says what to train, where and how;
# launch/tpu_spot.sh does all of this in a loop, for machines that may be taken away.
#
# Google has frozen the Cloud TPU API that these commands use: TPU v6e is the last it serves.
# TPU7x and later need GKE (launch/gke.sh) or Compute Engine; see "Migrate from the Cloud TPU API" in
# https://docs.cloud.google.com/compute/docs/tpus/tpu-resources-in-compute-engine

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

queued_resource() {
  run gcloud compute tpus queued-resources "$1" "$RUN_NAME" \
    --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# on_workers WHICH COMMAND
on_workers() {
  local track=()
  # Only the alpha track's ssh knows this flag.
  [[ $SSH_FLAGS != *--tunnel-through-iap* ]] || track=(alpha)
  # Without these --ssh-flags, ssh waits two hours for a machine that is silent.
  # shellcheck disable=SC2086  # several words
  run gcloud "${track[@]}" compute tpus tpu-vm ssh "$RUN_NAME" --project="$PROJECT" --zone="$ZONE" \
    --worker="$1" $SSH_FLAGS --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=15 \
    --ssh-flag=-oServerAliveCountMax=4 --command="$2"
}

# describe queued-resources|tpu-vm FORMAT: prints what the API says of it, NONE if there is none.
describe() {
  local error status=0
  { error=$(
    run gcloud compute tpus "$1" describe "$RUN_NAME" --project="$PROJECT" --zone="$ZONE" \
      --format="value($2)" 2>&1 >&3
  ); } 3>&1 || status=$?
  if [[ $error == *NOT_FOUND* ]]; then
    echo NONE
  elif ((status != 0)); then
    echo "$error" >&2
    return "$status"
  fi
}

# Finds out now what set-up would lack on machines that cost money, perhaps after days in the queue.
check_sources() (
  clone=$(mktemp -d)
  trap 'rm -rf "$clone"' EXIT
  GIT_TERMINAL_PROMPT=0 git clone --quiet --bare "$REPOSITORY" "$clone" || exit 1
  git --git-dir="$clone" cat-file -e "$COMMIT^{commit}" ||
    die "$REPOSITORY has no COMMIT=$COMMIT: push it first"
  [[ -n $DATA_SOURCE ]] || exit 0
  # Other answers are no proof: the machines may read what this account may not.
  if [[ $(gcloud storage ls "$DATA_SOURCE" 2>&1) =~ "matched no objects"|"not found: 404" ]]; then
    echo "error: DATA_SOURCE=$DATA_SOURCE holds nothing: copy the prepared data there (docs/pods.md)" >&2
    exit 3
  fi
)

do_create() {
  need REPOSITORY COMMIT
  [[ $dry_run == yes ]] || check_sources
  local more=()
  [[ $SPOT == no ]] || more+=(--spot)
  [[ -z $SERVICE_ACCOUNT ]] || more+=(--service-account="$SERVICE_ACCOUNT")
  # shellcheck disable=SC2086  # several words
  queued_resource create --node-id="$RUN_NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" "${more[@]}" $CREATE_FLAGS
}

do_setup() {
  need REPOSITORY COMMIT
  local name settings=""
  for name in BUCKET WORKDIR DATA_SOURCE DATA_DIR MEMORY_RESERVE_GB; do
    settings+="$name=$(quote "${!name}") "
  done
  local steps=(
    "set -e"
    "test -d convstem_jax || git clone --quiet $(quote "$REPOSITORY") convstem_jax"
    "cd convstem_jax"
    "git fetch --quiet origin"
    "git checkout --quiet --detach $COMMIT || { echo error: push COMMIT=$COMMIT first >&2; exit 2; }"
    "${settings}launch/worker.sh setup"
  )
  on_workers all "$(printf '%s; ' "${steps[@]}")"
}

do_run() {
  set_flags
  on_workers all "cd convstem_jax && launch/worker.sh start $(
    quote .venv/bin/python -m convstem_jax.main "${flags[@]}"
  )"
}

# Prints lines for tpu_spot.sh: "machine STATE", "node STATE WORKERS", "worker HOST STATE STEP".
do_status() {
  local state look
  state=$(describe queued-resources state.state) || return
  if [[ $dry_run == yes ]]; then
    echo "$state"
  else
    echo "machine $state"
    [[ $state == ACTIVE ]] || return 0
  fi
  state=$(describe tpu-vm "state,networkEndpoints.len()") || return
  if [[ $dry_run == yes ]]; then
    echo "$state"
  else
    # shellcheck disable=SC2086  # two words
    echo node $state
    [[ $state == READY* ]] || return 0
  fi
  look="if cd convstem_jax 2>/dev/null; then launch/worker.sh state $(quote "$WORKDIR"); "
  # A bucket that this user has not mounted: another user trains there.
  look+="elif grep -q ' /mnt/bucket ' /proc/mounts; then echo worker \$HOSTNAME others -1; "
  look+="else echo worker \$HOSTNAME none -1; fi"
  on_workers all "$look"
}

do_logs() {
  case ${1:-} in
    '') on_workers 0 'cd convstem_jax && launch/worker.sh log' ;;
    --follow) on_workers 0 'cd convstem_jax && launch/worker.sh log --follow' ;;
    --all) on_workers all "cd convstem_jax && launch/worker.sh log 20 | sed \"s/^/\$HOSTNAME: /\"" ;;
    *) die "logs $1: give nothing, --follow or --all" ;;
  esac
}

do_stop() { on_workers all 'cd convstem_jax && launch/worker.sh stop'; }

do_delete() { queued_resource delete --force --quiet; }

read_arguments "create setup run status logs stop delete" "$@"
need PROJECT ZONE
need_shared_workdir
[[ $command == logs ]] || no_arguments
"do_$command" "${args[@]}"
