#!/usr/bin/env bash
# Tests and measures what needs a GPU, in two commands of at most 8 and 5 minutes, the most important
# parts first:
#
#     bash scripts/gpu_check.sh first
#     bash scripts/gpu_check.sh second
#
# Each part has a time limit and writes $OUT/NAME.json; all output goes to $OUT/log-COMMAND.txt.
# "On a GPU" in scripts/README.md describes the parts. Needs torch, transformers, tensorboard and
# pytest (and accelerate to measure the peer), but no network.
set -u
cd "$(dirname "$0")/.."

command=${1:-}
case $command in
    first) limit=${GPU_CHECK_LIMIT:-480} ;;
    second) limit=${GPU_CHECK_LIMIT:-300} ;;
    *)
        echo "error: command '$command': expected first or second" >&2
        exit 2
        ;;
esac

python=${PYTHON:-python3}
out=${OUT:-runs/gpu_check}
scratch=${GPU_CHECK_SCRATCH:-/tmp/gpu_check}
if [ "${GPU_CHECK_SIZE:-full}" = tiny ]; then # to try the check itself, also on a CPU
    device=${GPU_CHECK_DEVICE:-cpu} base=tiny large=tiny small=tiny
    lengths=(${GPU_CHECK_LENGTHS:-16 32})
    tokens=128 steps=1 fp16_steps=40 vocabulary=120 tests=tests/test_cuda.py
    override=()
else
    device=${GPU_CHECK_DEVICE:-cuda} base=base large=large small=mini
    lengths=(${GPU_CHECK_LENGTHS:-128 512})
    tokens=32768 steps=40 fp16_steps=300 vocabulary=30522 tests=tests
    override=(--config-override vocab_size=30522) # the embedded text has too few words for it
fi

if ! { mkdir -p "$out" "$scratch/tmp" && out=$(cd "$out" && pwd) &&
    scratch=$(cd "$scratch" && pwd) && [ -w "$out" ]; }; then
    echo "error: OUT=$out GPU_CHECK_SCRATCH=$scratch: expected folders with write permission" >&2
    exit 2
fi
log=$out/log-$command.txt
: > "$log"
export TMPDIR=$scratch/tmp HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Compiled kernels are kept: several parts compile the same model.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}

SECONDS=0
summary=""
failed=0
running=""
# `timeout` runs in the background, so a signal can end it at once.
trap 'trap - INT TERM; [ -n "$running" ] && kill -TERM "$running"; wait; exit 130' INT TERM

# part NAME SECONDS PYTHON_ARGUMENT...
part() {
    local name=$1 seconds=$2 left=$((limit - SECONDS - 15)) begin=$SECONDS code
    shift 2
    rm -f "$out/$name.json" "$out/$name.txt"
    [ "$seconds" -gt "$left" ] && seconds=$left
    if [ "$seconds" -lt 15 ]; then
        echo "$name: skipped, no time left" | tee -a "$log"
        summary+="$name skipped 0"$'\n'
        return 1
    fi
    echo "== $name, at second $SECONDS, for $seconds s" | tee -a "$log"
    timeout -k 5 "$seconds" "$python" "$@" >> "$log" 2>&1 < /dev/null &
    running=$!
    wait "$running"
    code=$?
    running=""
    [ "$code" -eq 0 ] || failed=1
    summary+="$name $code $((SECONDS - begin))"$'\n'
    return 0
}

# measure NAME SECONDS MODEL LENGTH BENCHMARK_OPTION...: a step is one micro-batch
measure() {
    local name=$1 seconds=$2 model=$3 length=$4
    shift 4
    part "$name" "$seconds" scripts/benchmark.py --device "$device" --cache "$scratch/cache" \
        --json "$out/$name.json" --vocab-size "$vocabulary" "${override[@]}" \
        ${GPU_CHECK_TRAIN:+--train "$GPU_CHECK_TRAIN" --format sentences} \
        --model "$model" --max-length "$length" --steps "$steps" \
        --batch-size $((tokens / length)) --micro-batch-size $((tokens / length)) "$@"
}

fp16() {
    measure fp16 60 "$small" "${lengths[0]}" --parts fp16 --steps "$fp16_steps"
}

short=${lengths[0]}
long=${lengths[1]:-} # if empty, its parts are skipped
model=$scratch/cache/benchmark/fp16/run/final
if [ "$command" = first ]; then
    part tests 120 -m pytest -m gpu -q -p no:cacheprovider "$tests" && tail -n 1 "$log" > "$out/tests.txt"
    measure attention 40 "$base" "$short" --parts attention
    measure "train-$short" 150 "$base" "$short" --parts train profile
    [ -n "$long" ] && measure "train-$long" 130 "$base" "$long" --parts train profile
    fp16
else
    measure variants 145 "$base" "$short" --parts variants --minutes 2.2
    [ -d "$model" ] || fp16 # the first command may have stopped earlier
    measure use 50 "$model" "$short" --parts use
    measure "large-$short" 130 "$large" "$short" --parts train
    [ -n "$long" ] && measure "large-$long" 130 "$large" "$long" --parts train
fi

printf '%s' "$summary" | "$python" -m scripts.benchmark.report "$out" | tee -a "$log"
echo "$SECONDS s of $limit; $out" | tee -a "$log"
exit "$failed"
