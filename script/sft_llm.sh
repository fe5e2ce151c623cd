#!/usr/bin/env bash
# Trains: `accelerate launch sft_llm.py --config CONFIG [overrides]` with a fitting accelerate configuration.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<'TXT'
usage: bash script/sft_llm.sh CONFIG [--resume | --overwrite] [key.sub=value ...]

  CONFIG            a YAML under configs/train/
  --resume          continue from the last sound checkpoint of output_dir, or start if there is none
  --overwrite       output_dir holds a run: start anew; what it wrote is moved to output_dir/earlier
  key.sub=value     overrides of its keys, e.g. train.learning_rate=1e-4 output_dir=runs/try1

environment
  ACCELERATE_CONFIG   a file, or a name under configs/accelerate: cpu, cpu_ddp, single_gpu, ddp, multi_node,
                      zero2, zero3 (and zero2_cpu, zero3_cpu, zero2_offload, zero3_offload)
                      default: cpu without a GPU, single_gpu with one, zero2 with several
  NUM_PROCESSES       processes to start (default: every visible GPU; on the CPU what the file says)
  MAIN_PROCESS_PORT   port of the rendezvous (default: a free one)
  CUDA_VISIBLE_DEVICES   the GPUs to use

examples
  bash script/sft_llm.sh configs/train/quickstart.yaml
  ACCELERATE_CONFIG=zero3 NUM_PROCESSES=4 bash script/sft_llm.sh configs/train/stage1_7b.yaml output_dir=runs/zero3
  ACCELERATE_CONFIG=zero2_cpu bash script/sft_llm.sh configs/train/quickstart.yaml output_dir=runs/cpu_zero2 'train.muon_groups=[]'
TXT
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") usage >&2; fail "no CONFIG given" ;;
    -*) usage >&2; fail "unknown option '$1'; the first argument is the training YAML" ;;
esac
CONFIG="$1"
shift
[[ -f "$CONFIG" ]] || fail "no file '$CONFIG'; there are: $(cd "$ROOT" && ls configs/train/*.yaml 2>/dev/null | tr '\n' ' ')"
CONFIG="$(cd "$(dirname "$CONFIG")" && pwd)/$(basename "$CONFIG")"
for arg in "$@"; do
    [[ "$arg" == *=* || "$arg" == --resume || "$arg" == --overwrite ]] || fail "'$arg' is not an override; expected key.sub=value"
done

bash "$ROOT/script/setup.sh" run
use_venv

gpu_count() {
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        if [[ -z "$CUDA_VISIBLE_DEVICES" || "$CUDA_VISIBLE_DEVICES" == -1 ]]; then echo 0; else tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .; fi
    elif has_gpu; then
        nvidia-smi -L | grep -c '^GPU'
    else
        echo 0
    fi
}

gpus="$(gpu_count)"
if [[ -z "${ACCELERATE_CONFIG:-}" ]]; then
    case "$gpus" in
        0) ACCELERATE_CONFIG=cpu ;;
        1) ACCELERATE_CONFIG=single_gpu ;;
        *) ACCELERATE_CONFIG=zero2 ;;
    esac
fi
if [[ ! -f "$ACCELERATE_CONFIG" ]]; then
    named="$ROOT/configs/accelerate/${ACCELERATE_CONFIG%.yaml}.yaml"
    [[ -f "$named" ]] || fail "ACCELERATE_CONFIG=$ACCELERATE_CONFIG is neither a file nor one of: $(cd "$ROOT/configs/accelerate" && ls | sed 's/\.yaml$//' | tr '\n' ' ')"
    ACCELERATE_CONFIG="$named"
fi

launch=(--config_file "$ACCELERATE_CONFIG")
if grep -Eq '^use_cpu: *true' "$ACCELERATE_CONFIG"; then
    on_cpu=1
    export DS_ACCELERATOR=cpu
else
    on_cpu=0
    ((gpus > 0)) || fail "$(basename "$ACCELERATE_CONFIG") needs a GPU and none is visible; use ACCELERATE_CONFIG=cpu or zero2_cpu"
fi
processes="${NUM_PROCESSES:-}"
if [[ -z "$processes" && $on_cpu == 0 ]] && ! grep -Eq "^distributed_type: *'?NO'?" "$ACCELERATE_CONFIG"; then processes="$gpus"; fi
if [[ -n "$processes" ]]; then launch+=(--num_processes "$processes"); fi
final="${processes:-$(sed -n 's/^num_processes: *//p' "$ACCELERATE_CONFIG")}"
# Port 0 lets the launcher take a free one, so that two runs on a machine do not meet.
if ((final > 1)); then launch+=(--main_process_port "${MAIN_PROCESS_PORT:-0}"); fi
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    threads=$(($(cpu_count) / (final > 0 ? final : 1)))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
launch+=(--num_cpu_threads_per_process "$OMP_NUM_THREADS" --quiet) # quiet: no traceback of the launcher after an error of ours

say "accelerate: $(basename "$ACCELERATE_CONFIG"), $final process(es), $OMP_NUM_THREADS thread(s) each"
if [[ "$ACCELERATE_CONFIG" == "$ROOT"/configs/accelerate/* && "$final" == 1 ]] && grep -Eq "^distributed_type: *'?NO'?" "$ACCELERATE_CONFIG"; then
    # One process needs no launcher, which would hand no signal on and hide the exit status.
    [[ $on_cpu == 0 ]] || export ACCELERATE_USE_CPU=true
    ACCELERATE_MIXED_PRECISION="$(sed -n "s/^mixed_precision: *'\{0,1\}\([a-z0-9]*\).*/\1/p" "$ACCELERATE_CONFIG")"
    export ACCELERATE_MIXED_PRECISION
    exec python "$ROOT/sft_llm.py" --config "$CONFIG" "$@"
fi
# Signals reach the ranks, which then have five minutes for a checkpoint.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec accelerate launch "${launch[@]}" "$ROOT/sft_llm.py" --config "$CONFIG" "$@"
