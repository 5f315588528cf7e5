# Shared by the scripts of this folder: checks of the settings, commands that --dry-run only prints,
# and the exit status of a run. Sourced, never run.
# shellcheck shell=bash

set -euo pipefail
# macOS comes with 3.2.
((BASH_VERSINFO[0] >= 5)) || { echo "error: bash 5 is needed, this is $BASH_VERSION" >&2 && exit 2; }
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
set -a # what a script calls gets its settings, whatever is committed or edited meanwhile
# shellcheck source=launch/settings.sh
. "$launch/settings.sh"
set +a
dry_run=no

# The comment at the top of a script is its --help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

say() { printf '%(%F %T)T  %s\n' -1 "$*"; }

die() {
  echo "error: $*" >&2
  exit 2
}

# Prints words as a shell would need them.
quote() {
  local word text=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  echo "${text# }"
}

run() {
  if [[ $dry_run == yes ]]; then quote "$@"; else "$@"; fi
}

# read_arguments COMMANDS "$@": sets dry_run, args and, if there are COMMANDS, command.
read_arguments() {
  local known=$1 arg
  shift
  command="" args=()
  for arg; do
    case $arg in
      --help) usage && exit ;;
      --dry-run) dry_run=yes ;;
      *) if [[ -n $known && -z $command ]]; then command=$arg; else args+=("$arg"); fi ;;
    esac
  done
  [[ -z $known || " $known " == *" ${command:-?} "* ]] ||
    die "'$command' is none of ${known// /, }: see $0 --help"
  check_settings
}

no_arguments() {
  ((${#args[@]} == 0)) || die "unexpected argument '${args[0]}': see $0 --help"
}

# For cloud machines, which do not have this machine's folders.
need_shared_workdir() {
  [[ -n $BUCKET || $WORKDIR/ != "${launch%/*}"/* ]] ||
    die "BUCKET is not set, and WORKDIR=$WORKDIR is on this machine: export BUCKET=…"
}

# need NAME...: settings that must not be empty.
need() {
  local name
  for name; do
    [[ -n ${!name} ]] || die "$name is not set: edit launch/settings.sh, or export $name=…"
  done
}

# must_match NAME PATTERN WORDS
must_match() {
  [[ ${!1} =~ ^($2)$ ]] || die "$1=${!1} is wrong: give $3 (launch/settings.sh)"
}

check_settings() {
  local name field fields
  # Before anything else is printed: this address may hold a password.
  [[ ! $REPOSITORY =~ ://[^/]*@ ]] ||
    die "REPOSITORY holds a user name or password: remove it; machines read it without"
  must_match RUN_NAME '[a-z][-a-z0-9]{0,38}[a-z0-9]' "2 to 40 of a-z, 0-9 and -, a letter first and no - last"
  must_match CONFIG '[^ ]+\.py(:.*)?' "a configuration, as in configs/vitc.py:18gf,sgd"
  must_match WORKDIR '/.+' "an absolute path that all machines share"
  must_match DATA_DIR '(/.+)?' "an absolute path, or nothing"
  must_match COMMIT '([0-9a-f]{7,40})?' "a commit's hexadecimal number"
  must_match PROJECT '([a-z][-a-z0-9.:]+)?' "the project's ID, not its name or number"
  must_match ZONE '([a-z]+-[a-z]+[0-9]+-[a-z])?' "a zone, as in us-west4-a"
  must_match BUCKET '([a-z0-9][-a-z0-9._]+)?' "the bucket's name without gs:// or a folder"
  must_match DATA_SOURCE '(gs://[a-z0-9][-a-zA-Z0-9._/]+)?' "a folder, as in gs://my-bucket/data"
  must_match GKE_TOPOLOGY '[0-9]+(x[0-9]+){1,2}' "chips along each side, as in 4x4"
  must_match GKE_CACHE '[1-9][0-9]*Gi' "memory as Kubernetes writes it, as in 160Gi"
  must_match DEVICE 'gpu|tpu' "gpu or tpu"
  for name in SPOT DELETE_AT_END; do must_match "$name" 'yes|no' "yes or no"; done
  for name in POLL_SECONDS BACKOFF_SECONDS BACKOFF_MAX_SECONDS MAX_FAILURES MAX_RESTARTS \
    GKE_CHIPS_PER_NODE MEMORY_RESERVE_GB; do
    must_match "$name" '[1-9][0-9]*' "a whole number of 1 or more"
  done
  read -ra fields <<<"$FIELDS"
  for field in "${fields[@]}"; do
    [[ $field =~ ^[A-Za-z_]+=.+$ ]] || die "FIELDS: '$field' is wrong: give NAME=VALUE"
  done
  if [[ $WORKDIR == /mnt/bucket/* && -z $BUCKET ]]; then
    die "BUCKET is not set, and WORKDIR=$WORKDIR is in it: export BUCKET=…, or name another WORKDIR"
  fi
}

# Puts the flags of convstem_jax.main into the array `flags`.
set_flags() {
  local field fields
  flags=(--config "$CONFIG" --workdir "$WORKDIR")
  [[ -z $DATA_DIR ]] || flags+=("--config.data_dir=$DATA_DIR")
  read -ra fields <<<"$FIELDS"
  for field in "${fields[@]}"; do flags+=("--config.$field"); done
}

# Prints the state of a run, given its processes' states: each an exit status, "running", or "lost"
# with its machine. Errors that a person must fix come first. "running" means that all is well,
# "leaving" that some wait for others that are gone, 75 that the same command must be run again.
run_status() {
  local wanted state again=no running=no
  for wanted in 2 3 4 5 1; do
    for state; do
      [[ $state != "$wanted" ]] || { echo "$wanted" && return; }
    done
  done
  for state; do
    case $state in
      0) ;;
      running) running=yes ;;
      lost | 75 | 12[89] | 1[3-9]? | 2??) again=yes ;;
      *) echo "$state" && return ;;
    esac
  done
  case $running-$again in
    yes-no) echo running ;;
    yes-yes) echo leaving ;;
    no-yes) echo 75 ;;
    no-no) echo 0 ;;
  esac
}
