#!/usr/bin/env bash
# Copies the data from the bucket to this machine before training: what launch/worker.sh setup does on
# each machine of a slice, since reading records straight from a bucket is too slow for training
# (docs/data_on_a_pod.md).
#
#     launch/data.sh               $DATA_SOURCE, a gs:// folder, into $DATA_DIR
#     launch/data.sh --dry-run     the commands alone
#
# It takes the disk under $DATA_DIR where that has the room, else this machine's memory, of which it
# leaves $MEMORY_RESERVE_GB. What is there already is not copied again. Exit status: 0 the data are
# there · 1 copying failed, try again · 2 no room, or a wrong setting · 3 there are no data in the bucket.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

SPARE=$((1 << 30)) # for file systems, which keep whole pages, and logs

gigabytes() { echo "$((($1 + 999999999) / 1000000000)) GB"; }

# Prints the bytes of $DATA_SOURCE.
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

# Makes a file system in memory of that many bytes where the disk has no room.
make_room() {
  local bytes=$1 there disk memory
  there=$(du --summarize --block-size=1 "$DATA_DIR" | cut -f 1)
  if ((there >= bytes)); then return; fi
  disk=$(df --block-size=1 --output=avail "$DATA_DIR" | tail -n 1)
  if ((disk + there >= bytes + SPARE / 2)); then
    say "$(gigabytes "$bytes") for $DATA_DIR, which has $(gigabytes "$disk") free"
    return
  fi
  memory=$(free --bytes | awk '/^Mem:/ {print $7}')
  if mountpoint --quiet "$DATA_DIR" ||
    ((memory < bytes + SPARE + MEMORY_RESERVE_GB * 1000000000)); then
    die "$(gigabytes "$bytes") of data, but $DATA_DIR has $(gigabytes "$disk") free and the memory" \
      "$(gigabytes "$memory"), of which MEMORY_RESERVE_GB=$MEMORY_RESERVE_GB stay: lower that, or" \
      "share a disk that holds them (docs/data_on_a_pod.md)"
  fi
  say "$(gigabytes "$bytes") for $DATA_DIR in memory, of which $(gigabytes "$memory") are free"
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
  echo "# where the disk is too small: sudo mount --types tmpfs … $DATA_DIR"
else
  bytes=$(source_bytes)
  make_room "$bytes"
fi
# It compares checksums of what it copies, and skips what has the same size and time.
run gcloud storage rsync --recursive "$DATA_SOURCE" "$DATA_DIR"
if [[ $dry_run == no ]]; then say "$DATA_SOURCE is in $DATA_DIR"; fi
