#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, each result written as soon as it is there:
#
#     benchmarks/on_gpu.sh [folder]                        default: results/benchmarks
#     PYTHON=.venv/bin/python TORCH_MODE=max-autotune benchmarks/on_gpu.sh      default: python3, reduce-overhead
#     PARTS="vitc_4gf regnety_4gf around" benchmarks/on_gpu.sh                  default: all, in the order
#         forms vitc_4gf vitc_1gf regnety_4gf vitc_18gf vitc_36gf roofline options around profile population
#     FLAGS="--implementations convstem_jax torchvision --overlap 1" benchmarks/on_gpu.sh    more for train_step
#     FLAGS="--together 1" benchmarks/on_gpu.sh               for a GPU with 80 GB
#
# It needs JAX for CUDA, PyTorch, pytest, pytest-xdist and pytest-timeout; of torchvision and timm what
# is missing is left out. What fails is named at the end, and the exit status is 1 then.
set -uo pipefail
case ${1:-} in
  -h | --help)
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0"
    exit 0
    ;;
  -*)
    echo "unexpected argument '$1': see --help" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.." || exit 2
all=" forms vitc_4gf vitc_1gf regnety_4gf vitc_18gf vitc_36gf roofline options around profile population "
for part in ${PARTS:=$all}; do
  if [[ $all != *" $part "* ]]; then
    echo "PARTS has '$part', which is not one of:$all" >&2
    exit 2
  fi
done
folder=${1:-results/benchmarks} python=${PYTHON:-python3}
read -ra flags <<<"${FLAGS:-}"
mkdir -p "$folder" || exit 2
failed=()

run() {
  [[ " $PARTS " == *" $1 "* ]] || return 0
  echo "== ${*:2}" >&2
  local start=$SECONDS
  "${@:2}" || failed+=("$1")
  echo "== $1 took $((SECONDS - start)) s" >&2
}

if ! "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  echo "JAX finds no GPU here" >&2
  exit 2
fi
# Elsewhere the tests use programs that compile quickly; here they are to be those of training.
run forms env JAX_DISABLE_MOST_OPTIMIZATIONS=0 "$python" -m pytest -q -n0 -W default -p no:cacheprovider \
  tests/test_gpu_forms.py tests/test_kernels.py
while read -r batch models; do
  read -ra models <<<"$models"
  # Of ViT_P only this project's, for the ratio to ViT_C, and of ViT-B, 18GF, PyTorch's.
  run "${models[0]}" "$python" -m benchmarks.train_step --models "${models[@]}" --batch "$batch" --together 2 \
    --torch_mode "${TORCH_MODE:-reduce-overhead}" --skip 'vitp_*:plain*' 'vitp_?gf:torchvision' 'vitp_36gf:torchvision' \
    --json "$folder/train_step_${models[0]}.json" "${flags[@]}" </dev/null
done <<END
256 vitc_4gf vitp_4gf
256 vitc_1gf vitp_1gf
128 regnety_4gf
128 vitc_18gf vitp_18gf
128 vitc_36gf vitp_36gf
END
run roofline "$python" -m benchmarks.roofline --measured "$folder"/train_step_*gf.json \
  --json "$folder/roofline_gpu.json"
# Options that may be better: see docs/performance.md. The second only tells what convolutions outside
# of graphs cost: with a filled cache it may fail.
run options "$python" -m benchmarks.train_step --models vitc_4gf vitc_1gf regnety_4gf \
  --batch 256 256 128 --implementations convstem_jax --json "$folder/xla_options_gpu.json" \
  --steps_in_a_call 5 \
  --xla_options xla_gpu_enable_command_buffer=CONDITIONAL \
  xla_gpu_enable_command_buffer=CONDITIONAL,CONVOLUTION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,FUSION \
  xla_gpu_experimental_enable_conv_fusion=true xla_gpu_graph_min_graph_size=5 "${flags[@]}"
run around "$python" -m benchmarks.around_step --models vitc_4gf vitc_1gf --json "$folder/around_step_gpu.json"
run around "$python" -m benchmarks.around_step --models vitc_36gf --batch 128 --json "$folder/around_step_36gf.json"
run profile "$python" -m benchmarks.profile_step --model vitc_4gf --json "$folder/profile_vitc_4gf_gpu.json"
run profile "$python" -m benchmarks.profile_step --model vitc_1gf --host --json "$folder/host_vitc_1gf_gpu.json"
run population "$python" -m benchmarks.population --json "$folder/population_gpu.json"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
