#!/usr/bin/env bash
# Fetches into .whl the wheels that benchmarks/gpu.sh needs on a machine without a network: x86-64 and Python 3.12, with
# jax for CUDA, flax, optax, orbax and torch installed (`benchmarks/gpu.sh check` says what is missing elsewhere).
set -euo pipefail
cd "$(dirname "$0")/.."
platforms=()
for tag in _2_28 _2_27 _2_17 2014 1; do
    platforms+=(--platform "manylinux${tag}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d .whl grain array_record portpicker open-mythos==0.5.0
du -sh .whl
