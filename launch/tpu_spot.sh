#!/usr/bin/env bash
# Trains to the end on spot TPU VMs: requests them, sets them up, starts the run, and does so again
# whenever they are taken away.
#
#     launch/tpu_spot.sh
#     launch/tpu_spot.sh --dry-run   the commands of a run that nothing disturbs
#
# It looks at the machine and at every worker's exit status once in $POLL_SECONDS, and does the next
# thing; so it can itself be stopped and started again at any time. After a preemption, a refused
# request or a lost worker the same command goes on from the last checkpoint. The waits in between
# double up to $BACKOFF_MAX_SECONDS, start anew with each new checkpoint, and end after
# $MAX_FAILURES without one. What a person must mend (configuration, data, checkpoint, not finite, a
# bug) ends it at once. Exit status: the run's; 75 when it gave up; 130 for Ctrl-C.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

STUCK_POLLS=5 # without an answer, or with some workers gone and others waiting for them
MAX_SETUPS=5   # that fail in a row while the machines cost money
QUIET_POLLS=60 # of a run without a new checkpoint, before it says so

vm() { "$launch/tpu_vm.sh" "$@"; }

# In the background, since bash acts on Ctrl-C only between commands.
pause() {
  sleep "$1" &
  wait $!
}

interrupted() {
  trap - INT TERM
  say "stopped watching; $RUN_NAME ($machine) is not deleted, and what runs there goes on"
  say "to go on watching: launch/tpu_spot.sh; to delete it: launch/tpu_vm.sh delete"
  exit 130
}

finish() {
  say "$2"
  if [[ $machine != NONE && $1 != 0 ]]; then vm logs --all || true; fi
  if [[ $machine == NONE ]]; then
    say "no machine is left"
  elif [[ $DELETE_AT_END == no ]]; then
    say "$RUN_NAME is still there and costs money: launch/tpu_vm.sh delete"
  elif vm delete; then
    say "deleted $RUN_NAME"
  else
    say "$RUN_NAME could NOT be deleted: launch/tpu_vm.sh delete"
  fi
  exit "$1"
}

# Counts a failure and waits; the next look at the machine decides what to do.
failed() {
  failures=$((failures + 1))
  if ((failures >= MAX_FAILURES)); then
    finish 75 "$1; giving up after $failures failures without a new checkpoint"
  fi
  say "$1; failure $failures of $MAX_FAILURES, waiting $delay s"
  pause "$delay"
  delay=$((delay * 2 < BACKOFF_MAX_SECONDS ? delay * 2 : BACKOFF_MAX_SECONDS))
}

# attempt WORDS COMMAND...: 2 to 5 mean that it would fail again.
attempt() {
  local words=$1 status=0
  say "$words"
  vm "${@:2}" || status=$?
  case $status in
    0) return 0 ;;
    [2-5]) finish "$status" "that failed with status $status, and would again" ;;
    *) failed "that failed with status $status" && return 1 ;;
  esac
}

replace() {
  say "deleting $RUN_NAME: $1"
  vm delete || say "that failed; it is tried again"
  failed "$1"
}

# Reads `tpu_vm.sh status` into machine, node, num_workers, states and step.
look() {
  local output kind first second third
  output=$(vm status) || return 1
  machine=NONE node='' num_workers=0 states=() step=-1
  while read -r kind first second third; do
    case $kind in
      machine) machine=$first ;;
      node) node=$first num_workers=${second:-0} ;;
      worker)
        states+=("$second")
        if [[ $third =~ ^[0-9]+$ ]] && ((third > step)); then step=$third; fi
        ;;
    esac
  done <<<"$output"
  [[ $node != READY || ${#states[@]} == "$num_workers" ]]
}

# A machine that was restarted has lost what was mounted: set-up comes before every start.
begin() {
  if ! attempt "setting up $num_workers workers" setup; then
    setups=$((setups + 1))
    ((setups < MAX_SETUPS)) || finish 1 "set-up failed $setups times, and would again"
    return 1
  fi
  setups=0
  attempt "starting the run" run
}

# Every worker is up and has told its state.
consider() {
  local status
  if ((best_step == -2)); then
    best_step=$step # of an earlier session of this script
  elif ((step > best_step)); then
    best_step=$step failures=0 delay=$BACKOFF_SECONDS quiet=0
    say "checkpoint of step $step"
  fi
  if [[ " ${states[*]} " == *" none "* ]]; then
    if begin; then pause "$POLL_SECONDS"; fi
    return
  fi
  status=$(run_status "${states[@]}")
  case $status in
    running)
      leaving=0 quiet=$((quiet + 1))
      ((quiet % QUIET_POLLS)) || say "no new checkpoint in $quiet looks: launch/tpu_vm.sh logs"
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
      failed "the run was interrupted (${states[*]})"
      begin || true
      ;;
    *) finish "$status" "the run failed with status $status, and would again (${states[*]})" ;;
  esac
}

read_arguments "" "$@"
no_arguments
need PROJECT ZONE REPOSITORY COMMIT
need_shared_workdir
if [[ $dry_run == yes ]]; then
  for command in create status setup run status delete; do vm "$command" --dry-run; done
  exit
fi

machine=NONE failures=0 delay=$BACKOFF_SECONDS best_step=-2 silent=0 leaving=0 quiet=0 setups=0 seen=''
trap interrupted INT TERM
while true; do
  if ! look; then
    silent=$((silent + 1))
    if ((silent < STUCK_POLLS)); then
      say "no answer from $RUN_NAME ($silent of $STUCK_POLLS)"
      pause "$POLL_SECONDS"
    else
      silent=0
      replace "no answer from it $STUCK_POLLS times"
    fi
    continue
  fi
  silent=0
  if [[ $seen != "$machine $node" ]]; then
    seen="$machine $node"
    say "$RUN_NAME is $seen"
  fi
  case $machine-$node in
    NONE-) if attempt "requesting $ACCELERATOR in $ZONE" create; then pause "$POLL_SECONDS"; fi ;;
    ACTIVE-READY) consider ;;
    FAILED-* | SUSPEND*-* | ACTIVE-PREEMPTED | ACTIVE-TERMINATED | ACTIVE-STOPPED)
      replace "it was refused or taken away ($seen)"
      ;;
    *) pause "$POLL_SECONDS" ;; # in the queue, on its way, or being deleted
  esac
done
