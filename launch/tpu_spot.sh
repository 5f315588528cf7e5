#!/usr/bin/env bash
# Trains to the end on spot TPU VMs: requests them, sets them up, starts the run, and does so again
# whenever they are taken away.
#
#     launch/tpu_spot.sh
#     launch/tpu_spot.sh --dry-run   only print the commands of an undisturbed run
#
# Every $POLL_SECONDS it checks the machine and every worker's exit status, and does what is next;
# so it can itself be stopped and started again at any time. After a preemption, a refused request or
# a lost worker, the run continues from the last checkpoint. The waits in between double up to
# $BACKOFF_MAX_SECONDS until a new checkpoint resets them; after $MAX_FAILURES failures without one
# the script gives up. An error that a person must fix (configuration, data, checkpoint, not finite,
# a bug) ends it at once. If Google does not answer, for want of a network or a login here, say, it
# waits. At its end it deletes the machine ($DELETE_AT_END); after Ctrl-C the machine stays, and costs
# money.
#
# Exit status: the run's; 1 also if set-up failed again and again; 2 also for a wrong setting, refused
# access or another user's run; 75 if it gave up; 10 if the machine could not be deleted and costs
# money; 130 for Ctrl-C.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

STUCK_POLLS=5    # checks with some workers silent, or with some gone and others waiting for them
UNREADY_POLLS=30 # checks of machines that are there but not ready (in repair, say) or all silent
MAX_SETUPS=5     # failures of set-up in a row, while the machines cost money
MAX_ENDS=3       # interruptions on the same machines without a new checkpoint: one may be broken
MAX_DELETES=10   # attempts at the end, DELETE_SECONDS apart
DELETE_SECONDS=30
QUIET_POLLS=60   # checks of a run without a new checkpoint, before it says so

# In the background, since bash acts on Ctrl-C only between commands.
job=''
wait_for() {
  "$@" &
  job=$!
  wait "$job"
}

pause() { wait_for sleep "$1"; }

# A check takes seconds, or 200 if gcloud tries ten times to reach a silent worker. Of the other
# commands, set-up takes longest: it copies the data in some minutes.
vm() {
  local limit=3600
  case $1 in status | logs) limit=300 ;; esac
  wait_for timeout --kill-after=10 $limit "$launch/tpu_vm.sh" "$@"
}

interrupted() {
  trap - INT TERM
  exec >&3 # during a check, this script's own output goes to a file
  kill "$job" 2>/dev/null || true
  say "stopped watching $RUN_NAME ($machine): what runs there and what was requested goes on"
  say "to watch again: launch/tpu_spot.sh; to delete it: launch/tpu_vm.sh delete"
  exit 130
}

# finish STATUS WORDS
finish() {
  local status=$1
  say "$2"
  if [[ $machine == UNKNOWN ]]; then look || true; fi
  if [[ $machine == ACTIVE && $status != 0 ]]; then vm logs --all || true; fi
  if [[ $DELETE_AT_END == yes ]]; then delete || status=10; fi
  case $machine in
    NONE) say "no machine is left" ;;
    UNKNOWN) say "whether $RUN_NAME is still there and costs money is unknown: launch/tpu_vm.sh status" ;;
    *) say "$RUN_NAME is still there and costs money: launch/tpu_vm.sh delete" ;;
  esac
  exit "$status"
}

delete() {
  local tries
  for ((tries = 1; tries <= MAX_DELETES; tries++)); do
    if [[ $machine != NONE ]] && vm delete; then machine=NONE; fi
    [[ $machine != NONE ]] || return 0
    say "$RUN_NAME could NOT be deleted (attempt $tries of $MAX_DELETES)"
    pause "$DELETE_SECONDS"
    look || true # it may be gone all the same
  done
  [[ $machine == NONE ]]
}

# Counts a failure and waits; the next check of the machine decides what to do.
failed() {
  failures=$((failures + 1))
  if ((failures >= MAX_FAILURES)); then
    finish 75 "$1; giving up after $failures failures without a new checkpoint"
  fi
  say "$1; failure $failures of $MAX_FAILURES, waiting $delay s"
  pause "$delay"
  delay=$((delay * 2 < BACKOFF_MAX_SECONDS ? delay * 2 : BACKOFF_MAX_SECONDS))
}

# attempt WORDS COMMAND...: status 2 to 5 means that it would fail again.
attempt() {
  local words=$1 status=0
  say "$words"
  vm "${@:2}" || status=$?
  case $status in
    0) return 0 ;;
    [2-5]) finish "$status" "that failed with status $status, and would fail again" ;;
    *) failed "that failed with status $status" && return 1 ;;
  esac
}

replace() {
  say "deleting $RUN_NAME: $1"
  vm delete || say "that failed; it will be tried again"
  machine=UNKNOWN
  failed "$1"
}

# Reads `tpu_vm.sh status` into machine, node, num_workers, states and step; machine stays UNKNOWN
# if the API did not answer. Fails if anything did not, and shows the same message only once.
look() {
  local status=0 kind first second third
  vm status >"$notes/output" 2>"$notes/errors" || status=$?
  machine=UNKNOWN node='' num_workers=0 states=() step=-1
  while read -r kind first second third; do
    case $kind in
      machine) machine=$first ;;
      node) node=$first num_workers=${second:-0} ;;
      worker)
        states+=("$second")
        if [[ $third =~ ^[0-9]+$ ]] && ((third > step)); then step=$third; fi
        ;;
    esac
  done <"$notes/output"
  if ((status == 0)); then
    errors=''
    [[ $node != READY || ${#states[@]} == "$num_workers" ]]
    return
  fi
  [[ $node == READY ]] || machine=UNKNOWN
  if [[ $errors != "$(<"$notes/errors")" ]]; then
    errors=$(<"$notes/errors")
    echo "$errors" >&2
  fi
  return "$status"
}

# A restarted machine has lost what was mounted: set-up comes before every start.
begin() {
  if ! attempt "setting up $num_workers workers" setup; then
    setups=$((setups + 1))
    ((setups < MAX_SETUPS)) || finish 1 "set-up failed $setups times, and would fail again"
    return 1
  fi
  setups=0
  attempt "starting the run" run
}

# Every worker is up and has reported its state.
consider() {
  local status
  if ((best_step == -2)); then
    best_step=$step # of an earlier session of this script
  elif ((step > best_step)); then
    best_step=$step failures=0 delay=$BACKOFF_SECONDS quiet=0 ends=0
    say "checkpoint of step $step"
  fi
  if [[ " ${states[*]} " == *" others "* ]]; then
    DELETE_AT_END=no
    finish 2 "another user trains there: watch the run as that user, or choose another RUN_NAME"
  elif [[ " ${states[*]} " == *" none "* ]]; then
    if begin; then pause "$POLL_SECONDS"; fi
    return
  fi
  status=$(run_status "${states[@]}")
  case $status in
    running)
      leaving=0 quiet=$((quiet + 1))
      ((quiet % QUIET_POLLS)) || say "no new checkpoint in $quiet checks: see launch/tpu_vm.sh logs"
      pause "$POLL_SECONDS"
      ;;
    leaving)
      leaving=$((leaving + 1))
      if ((leaving < STUCK_POLLS)); then
        pause "$POLL_SECONDS"
      else
        leaving=0
        attempt "some workers are gone (${states[*]}): stopping the others" stop || true
      fi
      ;;
    0) finish 0 "the run is done" ;;
    75)
      ends=$((ends + 1))
      if ((ends >= MAX_ENDS)); then
        vm logs --all || true
        replace "the run was interrupted $ends times on the same machines (${states[*]})"
      else
        failed "the run was interrupted (${states[*]})"
        begin || true
      fi
      ;;
    *) finish "$status" "the run failed with status $status, and would fail again (${states[*]})" ;;
  esac
}

# The machines are there, but not every worker has answered.
unheard() {
  # If none answered, it may be ssh from here that fails.
  local limit=$STUCK_POLLS
  ((${#states[@]})) || limit=$UNREADY_POLLS
  silent=$((silent + 1))
  if ((silent < limit)); then
    say "no answer from $RUN_NAME ($silent of $limit)"
    pause "$POLL_SECONDS"
  else
    replace "no answer from it $silent times"
  fi
}

read_arguments "" "$@"
no_arguments
need PROJECT ZONE REPOSITORY COMMIT
need_shared_workdir
if [[ $dry_run == yes ]]; then
  for command in create status setup run status delete; do "$launch/tpu_vm.sh" "$command" --dry-run; done
  exit
fi
for name in gcloud git timeout; do
  command -v $name >/dev/null || die "$name is not installed here"
done

machine=UNKNOWN failures=0 delay=$BACKOFF_SECONDS best_step=-2 silent=0 leaving=0 quiet=0 setups=0 \
  ends=0 unready=0 fresh=no seen='' errors=''
exec 3>&1
notes=$(mktemp -d)
trap 'rm -r "$notes"' EXIT
trap interrupted INT TERM
while true; do
  status=0
  look || status=$?
  if ((status == 2)); then
    # Nothing runs on machines that this session requested and never reached; others may have a run.
    [[ $fresh == yes ]] || DELETE_AT_END=no
    finish 2 "gcloud refused the command itself: see SSH_FLAGS in launch/settings.sh"
  fi
  if [[ $machine == UNKNOWN && $errors == *PERMISSION_DENIED* ]]; then
    DELETE_AT_END=no
    finish 2 "Google denies access to it: check PROJECT, and your account's permissions"
  fi
  if [[ $seen != "$machine $node" ]]; then
    seen="$machine $node"
    if [[ $machine == UNKNOWN ]]; then
      say "no answer about $RUN_NAME from Google: waiting, and deleting nothing"
    else
      say "$RUN_NAME is $seen"
    fi
  fi
  case $machine-$node in
    NONE-)
      machine=UNKNOWN fresh=yes ends=0 unready=0 silent=0 leaving=0
      if attempt "requesting $ACCELERATOR in $ZONE" create; then pause "$POLL_SECONDS"; fi
      ;;
    ACTIVE-READY)
      unready=0
      if ((status == 0)); then
        silent=0 fresh=no
        consider
      else
        unheard
      fi
      ;;
    FAILED-* | SUSPEND*-* | ACTIVE-PREEMPTED | ACTIVE-TERMINATED | ACTIVE-STOPPED)
      replace "it was refused or taken away ($seen)"
      ;;
    ACTIVE-*)
      unready=$((unready + 1))
      if ((unready < UNREADY_POLLS)); then
        pause "$POLL_SECONDS"
      else
        replace "it was not ready $UNREADY_POLLS times ($seen)"
      fi
      ;;
    *) pause "$POLL_SECONDS" ;; # unknown, in the queue, on its way, or being deleted
  esac
done
