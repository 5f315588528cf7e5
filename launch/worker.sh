#!/usr/bin/env bash
# On a TPU VM, one of the machines of a slice: what launch/tpu_vm.sh asks for over ssh.
#
#     launch/worker.sh setup              install the code, mount $BUCKET, run data.sh
#     launch/worker.sh start COMMAND...   start it so that it outlives the ssh connection
#     launch/worker.sh state WORKDIR      "worker HOST STATE STEP": running, lost, none, or its exit
#                                         status; the latest checkpoint's step, -1 for none
#     launch/worker.sh log [--follow] [LINES]
#     launch/worker.sh stop               SIGTERM, so that it saves; SIGKILL after two minutes
#
# With --dry-run in front the commands are printed and not run. Its files are in ~/run: log, status
# (the exit status, once there is one), pid, and lock, which is held for as long as COMMAND runs.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

cd "$launch/.."
files=$HOME/run
: "${ANSWER_SECONDS:=20}" # that a mounted bucket has; who waits for one that hangs cannot be killed

# Done twice it does no harm.
setup() {
  # For want of a network, say: try again. The commands' own 2 and 3 would mean settings and data.
  set -E
  trap 'exit 1' ERR
  # These images' own Python is 3.10, which is too old; uv brings its own.
  run python3 -m pip install --quiet --user uv
  local uv=$HOME/.local/bin/uv
  run "$uv" venv --quiet --allow-existing --python 3.11 .venv
  run "$uv" pip install --quiet --python .venv/bin/python --require-hashes \
    -r requirements.lock -r requirements-tpu.lock
  [[ -z $BUCKET ]] || mount_bucket
  trap - ERR
  [[ -z $DATA_SOURCE ]] || run launch/data.sh
}

# https://docs.cloud.google.com/storage/docs/cloud-storage-fuse/install
mount_bucket() {
  local answer='' url=https://packages.cloud.google.com/apt
  # Of a gcsfuse that is gone; no answer at all is one that hangs.
  read -r -d '' -t "$ANSWER_SECONDS" answer < <(exec 2>&1 && LC_ALL=C stat /mnt/bucket) || true
  if [[ -z $answer || $answer == *"not connected"* ]]; then
    run sudo umount --lazy /mnt/bucket
  elif mountpoint --quiet /mnt/bucket; then
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
    run sudo curl -fsSL $url/doc/apt-key.gpg -o "$key"
    run sudo sh -c "echo 'deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main' >$list"
    # A new machine updates itself, and holds apt's locks. `update` does not wait for its own.
    for _ in {1..30}; do
      if run sudo apt-get -qq update; then break; fi
      sleep 10
    done
    run sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  # It stays root's: where nothing is mounted, nothing can be written.
  run sudo mkdir -p /mnt/bucket
  # In a service, since at a shutdown all processes of an ssh session are ended at once, and the
  # program has to save: Before= stops it after the sessions. Forking: it is up when it is mounted.
  local service=(sudo systemd-run --quiet --collect --service-type=forking
    --property=Before=systemd-user-sessions.service --property=After=network-online.target)
  # No cached metadata: each machine must see at once what the first one writes. What is written as a
  # stream comes to the bucket when the file is closed, and not by fsync.
  run "${service[@]}" gcsfuse -o allow_other --uid="$(id -u)" --gid="$(id -g)" --implicit-dirs \
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --enable-streaming-writes=false \
    "$BUCKET" /mnt/bucket || {
    sudo journalctl --quiet --no-pager --identifier=gcsfuse --lines=20 >&2 # its own words
    exit 1
  }
}

start() {
  if [[ $dry_run == yes ]]; then
    run "$@"
    return
  fi
  if [[ " $* " == *" /mnt/bucket/"* ]] && ! mountpoint --quiet /mnt/bucket; then
    echo "error: /mnt/bucket is not mounted, since a restart perhaps: worker.sh setup" >&2
    exit 1
  fi
  exec 9>"$files/lock"
  if ! flock --nonblock 9; then
    echo "already running"
    return
  fi
  rm -f "$files/status"
  # The lock goes on to the shell that waits for COMMAND, and not to COMMAND's own processes. At a
  # shutdown SIGHUP follows SIGTERM at once, and must not end COMMAND while it saves.
  # shellcheck disable=SC2016  # expanded by that shell
  setsid bash -c '
    trap "" HUP
    cd "$1" && files=$2 && shift 2
    "$@" >>"$files/log" 2>&1 9>&- & echo $! >"$files/pid"
    wait $! && status=0 || status=$?
    echo "$status" >"$files/status.new" && mv "$files/status.new" "$files/status"
  ' start "$PWD" "$files" "$@" </dev/null >/dev/null 2>&1 &
  echo "started"
}

state() {
  local state=none step=''
  if ! is_free; then
    state=running
  elif [[ -e $files/status ]]; then
    state=$(<"$files/status")
  elif [[ -e $files/pid ]]; then
    state=lost
  fi
  read -r -t "$ANSWER_SECONDS" step < <(
    exec 2>/dev/null # which would keep the ssh connection open
    find "$1/checkpoints" -maxdepth 2 -regex '.*/[0-9]+/commit_success\.txt' -printf '%P\n' | sort -n | tail -1
  ) || true
  step=${step%/*}
  echo "worker $HOSTNAME $state ${step:--1}"
}

is_free() { flock --nonblock "$files/lock" true; }

stop() {
  if is_free; then return; fi
  run kill "$(<"$files/pid")" || true
  for _ in $(seq 120); do
    if is_free; then return; fi
    sleep 1
  done
  run kill -KILL "$(<"$files/pid")"
}

log() {
  local follow=()
  if [[ ${1:-} == --follow ]]; then follow=(-F) && shift; fi
  run tail "${follow[@]}" -n "${1:-100}" "$files/log"
}

if [[ ${1:-} == --dry-run ]]; then dry_run=yes && shift; fi
case ${1:-} in
  setup | start | state | log | stop) mkdir -p "$files" && "$@" ;;
  --help) usage ;;
  *) die "'${1:-}' is none of setup, start, state, log, stop: see $0 --help" ;;
esac
