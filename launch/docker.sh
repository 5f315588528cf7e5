#!/usr/bin/env bash
# Builds a container image of the code for GPUs or TPUs (DEVICE in launch/settings.sh); trains in it.
#
#     launch/docker.sh build           from the repository's files, committed or not
#     launch/docker.sh run [FLAGS]     train on this machine, with more FLAGS of convstem_jax.main
#     launch/docker.sh push            to the registry that IMAGE names
#
# Add --dry-run to only print the command. DATA_DIR and WORKDIR are folders of this machine, mounted
# in the container under the same names.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

do_build() {
  cd "$launch/.."
  # The image holds uncommitted files too, and has to say so.
  if [[ -n $COMMIT && $COMMIT == "$(git rev-parse HEAD 2>/dev/null)" ]]; then
    [[ -z $(git status --porcelain) ]] || COMMIT+=-dirty # new files too
  fi
  run docker build --file launch/Dockerfile --build-arg DEVICE="$DEVICE" \
    --build-arg COMMIT="$COMMIT" --label org.opencontainers.image.revision="${COMMIT:-unknown}" \
    --tag "$IMAGE" .
}

# A run that is stopped, also by `docker stop`, saves first if it is given the time.
do_run() {
  local devices=(--gpus all)
  [[ $DEVICE == gpu ]] || devices=(--privileged --network host)
  set_flags
  run mkdir -p "$WORKDIR"
  # Batches travel from the decoding processes through shared memory, of which a container has 64 MB.
  run docker run --rm --init --name "$RUN_NAME" --stop-timeout 300 --ipc host "${devices[@]}" \
    ${DATA_DIR:+--volume "$DATA_DIR:$DATA_DIR:ro"} --volume "$WORKDIR:$WORKDIR" \
    "$IMAGE" "${flags[@]}" "$@"
}

do_push() {
  [[ $IMAGE == */* ]] || die "IMAGE=$IMAGE names no registry: give HOST/PATH/convstem_jax"
  run docker push "$IMAGE"
}

read_arguments "build run push" "$@"
[[ $command == run ]] || no_arguments
"do_$command" "${args[@]}"
