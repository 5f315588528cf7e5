#!/usr/bin/env bash
# Copies the data from the bucket to this machine before training, since reading records straight
# from a bucket is too slow (docs/data_on_a_pod.md). `launch/worker.sh setup` runs it on each machine
# of a slice.
#
#     launch/data.sh               $DATA_SOURCE, a gs:// folder, into $DATA_DIR
#     launch/data.sh --dry-run     only print the commands
#
# It uses the disk under $DATA_DIR if that has room, otherwise this machine's memory, of which it
# leaves $MEMORY_RESERVE_GB free. What is already there is not copied again. Exit status: 0 the data
# are there · 1 copying failed, try again · 2 no room, or a wrong setting · 3 the bucket has no data.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

SPARE=$((1 << 30)) # for logs, and since file systems use whole pages

gigabytes() { echo "$((($1 + 999999999) / 1000000000)) GB"; }

# Prints the size of $DATA_SOURCE in bytes.
source_bytes() {
  local output
  if output=$(gcloud storage du --summarize "$DATA_SOURCE" 2>&1); then
    grep -m 1 -oE '^[1-9][0-9]*' <<<"$output" && return
  elif [[ $output != *"matched no objects"* ]]; then
    echo "$output" >&2
    exit 1
  fi
  echo "error: DATA_SOURCE=$DATA_SOURCE holds nothing: copy the prepared data there (docs/pods.md)" >&2
  exit 3
}

# make_room BYTES: mounts a file system in memory if the disk has no room for them.
make_room() {
  local bytes=$1 there disk memory
  there=$(du --summarize --block-size=1 "$DATA_DIR" | cut -f 1)
  if ((there >= bytes)); then return; fi
  disk=$(df --block-size=1 --output=avail "$DATA_DIR" | tail -n 1)
  if ((disk + there >= bytes + SPARE / 2)); then
    say "$(gigabytes "$bytes") of data go to $DATA_DIR, which has $(gigabytes "$disk") free"
    return
  fi
  if mountpoint --quiet "$DATA_DIR"; then
    die "$(gigabytes "$bytes") of data, but what is mounted at $DATA_DIR has $(gigabytes "$disk") free:" \
      "make room there, or name another DATA_DIR"
  fi
  memory=$(free --bytes | awk '/^Mem:/ {print $7}')
  if ((memory < bytes + SPARE + MEMORY_RESERVE_GB * 1000000000)); then
    die "$(gigabytes "$bytes") of data, but $DATA_DIR has $(gigabytes "$disk") free and the memory" \
      "$(gigabytes "$memory"), of which MEMORY_RESERVE_GB=$MEMORY_RESERVE_GB must stay free: lower" \
      "that, or share a disk that holds the data (docs/data_on_a_pod.md)"
  fi
  say "$(gigabytes "$bytes") of data go to $DATA_DIR in memory, which has $(gigabytes "$memory") free"
  run sudo mount --types tmpfs --options "size=$((bytes + SPARE)),mode=0777" data "$DATA_DIR"
}

read_arguments "" "$@"
no_arguments
need DATA_SOURCE DATA_DIR
[[ $DATA_DIR/ != /mnt/bucket/* ]] || die "DATA_DIR=$DATA_DIR lies in the bucket: name a local folder"
run sudo mkdir -p "$DATA_DIR"
run sudo chown "${USER:-$(id -un)}" "$DATA_DIR"
if [[ $dry_run == yes ]]; then
  run gcloud storage du --summarize "$DATA_SOURCE"
  echo "# if the disk is too small: sudo mount --types tmpfs … $DATA_DIR"
else
  bytes=$(source_bytes)
  make_room "$bytes"
fi
# rsync checks the checksums of what it copies, and skips files of the same size and time.
run gcloud storage rsync --recursive "$DATA_SOURCE" "$DATA_DIR"
if [[ $dry_run == no ]]; then say "$DATA_SOURCE is in $DATA_DIR"; fi
