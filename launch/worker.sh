#!/usr/bin/env bash
# Runs on each TPU VM of a slice, where launch/tpu_vm.sh calls it over ssh.
#
#     launch/worker.sh setup              install the code, mount $BUCKET, run data.sh
#     launch/worker.sh start COMMAND...   start it so that it outlives the ssh connection
#     launch/worker.sh state WORKDIR      print "worker HOST STATE STEP": STATE is running, lost, none
#                                         or an exit status, STEP the latest checkpoint's, or -1
#     launch/worker.sh log [--follow] [LINES]
#     launch/worker.sh stop               send SIGTERM, so that it saves; SIGKILL after two minutes
#
# With --dry-run as the first word, commands are only printed. The files are in ~/run: log, status
# (the exit status, once there is one), pid, and lock, which is held while COMMAND runs.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

cd "$launch/.."
files=$HOME/run
: "${ANSWER_SECONDS:=20}" # for the bucket to answer; a process that waits for it cannot be killed

# Running it twice does no harm.
setup() {
  # A failed command (no network, say) must mean "try again": its own 2 or 3 would be taken for wrong
  # settings or data.
  set -E
  trap 'exit 1' ERR
  # The machine's Python is 3.10, which is too old; uv brings another.
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
  # "not connected" means that gcsfuse is gone, no answer at all that it hangs.
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
    # A new machine updates itself, and holds apt's locks; `update` does not wait for its own.
    for _ in {1..30}; do
      if run sudo apt-get -qq update; then break; fi
      sleep 10
    done
    run sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  # The folder stays root's: while nothing is mounted there, nothing can be written.
  run sudo mkdir -p /mnt/bucket
  # As a service, since a shutdown ends all processes of an ssh session at once, and the program has
  # to save: Before= stops gcsfuse after the sessions. Forking: it is up once the bucket is mounted.
  local service=(sudo systemd-run --quiet --collect --service-type=forking
    --property=Before=systemd-user-sessions.service --property=After=network-online.target)
  # No cached metadata: each machine must see at once what the first one writes. What is written as a
  # stream reaches the bucket when the file is closed, not at fsync.
  run "${service[@]}" gcsfuse -o allow_other --uid="$(id -u)" --gid="$(id -g)" --implicit-dirs \
    --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --enable-streaming-writes=false \
    "$BUCKET" /mnt/bucket || {
    sudo journalctl --quiet --no-pager --identifier=gcsfuse --lines=20 >&2 # gcsfuse's messages
    exit 1
  }
}

start() {
  if [[ $dry_run == yes ]]; then
    run "$@"
    return
  fi
  if [[ " $* " == *" /mnt/bucket/"* ]] && ! mountpoint --quiet /mnt/bucket; then
    echo "error: /mnt/bucket is not mounted, perhaps since a restart: run worker.sh setup" >&2
    exit 1
  fi
  exec 9>"$files/lock"
  if ! flock --nonblock 9; then
    echo "already running"
    return
  fi
  rm -f "$files/status"
  # The shell that waits for COMMAND inherits the lock; COMMAND's own processes do not. At a
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
    exec 2>/dev/null # a `find` that hangs would keep the ssh connection open
    find "$1/checkpoints" -maxdepth 2 -regex '.*/[0-9]+/commit_success\.txt' -printf '%P\n' | sort -n | tail -1
  ) || true
  step=${step%/*}
  echo "worker $HOSTNAME $state ${step:--1}"
}

is_free() { flock --nonblock "$files/lock" true; }

stop() {
  if is_free; then return; fi
  run kill "$(<"$files/pid")" || true
  [[ $dry_run == no ]] || return 0
  for _ in $(seq 120); do
    if is_free; then return; fi
    sleep 1
  done
  kill -KILL "$(<"$files/pid")"
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
