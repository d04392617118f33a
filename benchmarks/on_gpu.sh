#!/usr/bin/env bash
# Run a sweep on a GPU machine without network, from the wheels of benchmarks/fetch_wheels.sh.
# Usage: benchmarks/on_gpu.sh SWEEP.yaml OUTPUT_FOLDER [options of sweep.py]
set -euo pipefail
cd "$(dirname "$0")/.."
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
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 benchmarks/sweep.py "$sweep" --out "$out/$(basename "$sweep" .yaml).jsonl" "$@"
