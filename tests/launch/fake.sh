#!/usr/bin/env bash
# Stands for gcloud, kubectl, docker, sleep and others in the tests, under their names.
#
# It records its call in $FAKE_CALLS and answers from $FAKE_ANSWERS, whose lines are words, status and
# output, separated by tabs. It takes the first line whose words are all in the call, and removes it
# if a later one has the same words. Without one it succeeds silently. The status Ctrl-C interrupts
# the calling script, as a person would.
set -euo pipefail

call=("${0##*/}" "$@")
if [[ "${call[*]:0:2}" == "kubectl apply" ]]; then call+=("$(cat)"); fi
{ printf '%s\x1f' "${call[@]}" && printf '\x1e'; } >>"$FAKE_CALLS"

mapfile -t answers <"$FAKE_ANSWERS"
for i in "${!answers[@]}"; do
  IFS=$'\t' read -r words status output <<<"${answers[i]}"
  for word in $words; do
    [[ "${call[*]}" == *"$word"* ]] || continue 2
  done
  for later in "${answers[@]:i+1}"; do
    if [[ $later == "$words"$'\t'* ]]; then
      unset "answers[i]"
      printf '%s\n' "${answers[@]}" >"$FAKE_ANSWERS"
      break
    fi
  done
  case $status in
    0) printf %b "$output" ;;
    Ctrl-C) kill -INT "$PPID" ;;
    *) printf %b "$output" >&2 && exit "$status" ;;
  esac
  exit
done
