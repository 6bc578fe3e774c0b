#!/usr/bin/env bash
# What only a GPU can show, in pieces of at most nine minutes each:
#
#     benchmarks/gpu.sh [--dry-run] PIECE
#
#   check         the device, the versions of what is installed, and what is missing
#   correctness   golden data and gradients beside float32 on the CPU
#   kernels       grouped products and cuDNN's attention: right, and how fast
#   mythos        train step and decoding of mythos_1b, and which kernels their time goes to
#   utilisation   train step and decode bandwidth of models of 1 B parameters (benchmarks/roofline.py)
#   compare       beside the PyTorch original (benchmarks/compare_openmythos.py)
#   science       what a loop is worth (docs/science.md), at the size that is meant for a GPU; $SEEDS (default: 0). Its
#                 runs stay in runs/science/gpu, and those that are finished are not repeated
#   all           all but `check`, `science` and the small comparison, in the order of their worth
#
# Each step of a piece leaves STEP.md, and STEP.json with the name of the device, in $OUT (default: gpu-results). Steps
# that have a STEP.md in $OUT or in $DONE (default: .gpu) are not run again, so a piece that was cut off goes on.
#
# Needs Python 3.11 or newer as $PYTHON (default: python3) with jax for CUDA and what mythos_jax depends on, but no
# network: wheels that lie in .whl are installed to /tmp/site first (`benchmarks/gpu_wheels.sh` fetches those that are
# missing on the machine that was seen). --dry-run: toy sizes on a CPU, to try the script.
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=gpu FLAGS=() SIZE=gpu RUNS=runs/science
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-530} OUT=${OUT:-gpu-results} DONE=${DONE:-.gpu}
if [ "${1:-}" = --dry-run ]; then
    DEVICE=cpu FLAGS=(--small --repeats 1) SIZE=smoke RUNS=$OUT/runs DONE=$OUT # runs of other code show nothing
    shift
fi
PIECE=${1:-}
case $PIECE in
    check) STEPS="check" ;;
    correctness) STEPS="golden gradients" ;;
    kernels) STEPS="attention grouped" ;;
    mythos) STEPS="mythos profile" ;;
    utilisation) STEPS="utilisation" ;;
    compare) STEPS="compare_118m compare_readme compare_1b" ;;
    science) STEPS="science_parameters science_sampled_depth science_latency science_cache science_exits science_positions science_mano science_rates" ;;
    all) STEPS="gradients mythos compare_118m utilisation grouped attention profile golden compare_1b" ;;
    *)
        echo "benchmarks/gpu.sh: got '$PIECE', allowed: check, correctness, kernels, mythos, utilisation, compare, science, all" >&2
        exit 2
        ;;
esac

mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
if compgen -G ".whl/*.whl" >/dev/null; then
    [ -d /tmp/site ] || "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site:$PYTHONPATH
fi

failed=0
for step in $STEPS; do
    if [ -s "$OUT/$step.md" ] || [ -s "$DONE/$step.md" ]; then
        echo "$step: done before"
        continue
    fi
    if [ "$DEVICE" = cpu ] && [[ $step = compare_* ]]; then
        echo "$step: has no toy size"
        continue
    fi
    left=$((LIMIT - SECONDS))
    if [ $left -lt 20 ]; then
        echo "$step: no time left; run '$PIECE' again"
        failed=1
        continue
    fi
    command=("$PYTHON" -m)
    result=(--device "$DEVICE" --json "$OUT/$step.json")
    case $step in
        utilisation) command+=(benchmarks.roofline utilisation "${FLAGS[@]}") ;;
        compare_*) command+=(benchmarks.compare_openmythos --config "${step#compare_}" --repeats 3) ;;
        # shellcheck disable=SC2206  # seeds are words
        science_*) command+=("benchmarks.science.${step#science_}" --size "$SIZE" --out "$RUNS" --seeds ${SEEDS:-0}) result=() ;;
        *) command+=(benchmarks.gpu "$step" "${FLAGS[@]}") ;;
    esac
    echo "## $step"
    code=0
    timeout "$left" "${command[@]}" "${result[@]}" 2>"$OUT/$step.log" |
        tee "$OUT/$step.part" || code=$?
    if [ $code = 0 ]; then
        mv "$OUT/$step.part" "$OUT/$step.md"
        rm "$OUT/$step.log"
        if [[ $step = science_* ]]; then
            cp "$RUNS/$SIZE/${step#science_}".{json,png} "$OUT"
        fi
    else
        echo "$step: ended with code $code; the end of $OUT/$step.log:"
        tail -n 15 "$OUT/$step.log"
        failed=1
    fi
done
exit $failed
