#!/usr/bin/env bash
# Trains on a TPU slice in Google Kubernetes Engine, with the JobSet of launch/gke/jobset.yaml.
#
#     launch/gke.sh apply              start it in kubectl's current context, or again after its end
#     launch/gke.sh status             the JobSet and its pods
#     launch/gke.sh logs [--follow]    of worker 0
#     launch/gke.sh delete             end it: pods save first, apply continues from there. The node
#                                      pool stays, and costs money while it has machines
#     launch/gke.sh xpk                print the command that starts the run with XPK
#
# The slice is $GKE_ACCELERATOR with topology $GKE_TOPOLOGY; for XPK it is $ACCELERATOR.
#
# Add --dry-run to only print the commands and the filled-in template. Build and push the image
# first: DEVICE=tpu launch/docker.sh build, then launch/docker.sh push. The data are read from the
# bucket's folder $GKE_DATA_FOLDER.

# shellcheck source=launch/shared.sh
. "$(dirname "$0")/shared.sh"

# All pods of the JobSet.
selector="jobset.sigs.k8s.io/jobset-name=$RUN_NAME"

need_image() {
  [[ $IMAGE == */* ]] || die "IMAGE=$IMAGE names no registry: give HOST/PATH/convstem_jax"
}

# The template with every ${NAME} replaced.
manifest() {
  local text name list="" word
  # shellcheck disable=SC2034
  NUM_NODES=$((${GKE_TOPOLOGY//x/*} / GKE_CHIPS_PER_NODE))
  ((NUM_NODES > 0)) || die "GKE_TOPOLOGY=$GKE_TOPOLOGY has fewer chips than one node"
  need_image
  need DATA_DIR
  set_flags
  for word in "${flags[@]}"; do
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  # shellcheck disable=SC2034  # used below by name
  ARGS="[${list#, }]"
  # shellcheck disable=SC2034
  RESTART_STATUSES="[75, $(seq -s ', ' 128 255)]"
  text=$(grep -v '^#' "$launch/gke/jobset.yaml")
  if [[ $SPOT == no ]]; then text=$(grep -v '# spot only$' <<<"$text"); fi
  for name in RUN_NAME MAX_RESTARTS NUM_NODES RESTART_STATUSES GKE_SERVICE_ACCOUNT GKE_ACCELERATOR \
    GKE_TOPOLOGY GKE_CHIPS_PER_NODE IMAGE ARGS BUCKET DATA_DIR \
    GKE_DATA_FOLDER GKE_CACHE; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

do_apply() {
  local text ended
  need BUCKET
  text=$(manifest)
  if [[ $dry_run == yes ]]; then
    echo "kubectl apply -f - <<END"
    echo "$text"
    echo END
  else
    # A JobSet that has ended would stay as it is.
    ended=$(kubectl get jobset "$RUN_NAME" --ignore-not-found -o 'jsonpath={.status.terminalState}')
    if [[ -n $ended ]]; then
      say "the previous JobSet has ended ($ended): a new one continues from the last checkpoint"
      kubectl delete jobset "$RUN_NAME"
    fi
    kubectl apply -f - <<<"$text"
  fi
}

do_status() {
  run kubectl get jobset "$RUN_NAME"
  run kubectl get pods -l "$selector" -o wide
}

do_logs() {
  local more=()
  case ${1:-} in
    '') ;;
    --follow) more=(--follow) ;;
    *) die "logs $1: give nothing or --follow" ;;
  esac
  run kubectl logs -l "$selector,batch.kubernetes.io/job-completion-index=0" -c train \
    --tail=100 "${more[@]}"
}

do_delete() { run kubectl delete jobset "$RUN_NAME" --ignore-not-found; }

# XPK makes a JobSet of its own, with Kueue, and by itself restarts it after 42 and 127 to 255.
# Storage comes from `xpk storage attach … --type=gcsfuse --mount-point=/mnt/bucket`.
do_xpk() {
  need PROJECT ZONE CLUSTER BUCKET
  need_image
  set_flags
  quote xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
    --workload="$RUN_NAME" --tpu-type="$ACCELERATOR" --num-slices=1 --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=75 \
    --command="$(quote python -m convstem_jax.main "${flags[@]}")"
}

read_arguments "apply status logs delete xpk" "$@"
[[ $command == logs ]] || no_arguments
"do_$command" "${args[@]}"
