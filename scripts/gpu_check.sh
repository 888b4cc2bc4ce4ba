#!/usr/bin/env bash
# What only a GPU can show, in two commands of 8 and of 5 minutes, the most valuable first:
#
#     bash scripts/gpu_check.sh first
#     bash scripts/gpu_check.sh second
#
# Each part has its time limit and leaves $OUT/NAME.json; output goes to $OUT/log-COMMAND.txt. scripts/README.md, "On a GPU", describes
# the parts. Needs a Python with torch, transformers, accelerate, tensorboard and pytest, and no network.
set -u
cd "$(dirname "$0")/.."

command=${1:-}
case $command in
    first) limit=${GPU_CHECK_LIMIT:-480} ;;
    second) limit=${GPU_CHECK_LIMIT:-300} ;;
    *)
        echo "error: expected one command, first or second" >&2
        exit 2
        ;;
esac

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu_check}
SCRATCH=${GPU_CHECK_SCRATCH:-/tmp/gpu_check}
if [ "${GPU_CHECK_SIZE:-full}" = tiny ]; then # a trial on a CPU
    DEVICE=${GPU_CHECK_DEVICE:-cpu}
    MODEL=${GPU_CHECK_MODEL:-tiny}
    LARGE=${GPU_CHECK_LARGE:-tiny}
    LENGTHS=(${GPU_CHECK_LENGTHS:-16 32})
    TOKENS=${GPU_CHECK_TOKENS:-128}
    STEPS=${GPU_CHECK_STEPS:-1}
    RESUME_STEPS=${GPU_CHECK_RESUME_STEPS:-9}
    FP16_STEPS=${GPU_CHECK_FP16_STEPS:-40}
    VOCABULARY=${GPU_CHECK_VOCABULARY:-120}
    TESTS=${GPU_CHECK_TESTS:-tests/test_cuda.py}
else
    DEVICE=${GPU_CHECK_DEVICE:-cuda}
    MODEL=${GPU_CHECK_MODEL:-base}
    LARGE=${GPU_CHECK_LARGE:-large}
    LENGTHS=(${GPU_CHECK_LENGTHS:-128 512})
    TOKENS=${GPU_CHECK_TOKENS:-32768}
    STEPS=${GPU_CHECK_STEPS:-40}
    RESUME_STEPS=${GPU_CHECK_RESUME_STEPS:-60}
    FP16_STEPS=${GPU_CHECK_FP16_STEPS:-300}
    VOCABULARY=${GPU_CHECK_VOCABULARY:-30522}
    TESTS=${GPU_CHECK_TESTS:-tests}
fi
SMALL=${GPU_CHECK_SMALL:-mini} # for what needs no large model
[ "${GPU_CHECK_SIZE:-full}" = tiny ] && SMALL=${GPU_CHECK_SMALL:-tiny}

if ! { mkdir -p "$OUT" "$SCRATCH/tmp" && OUT=$(cd "$OUT" && pwd) && SCRATCH=$(cd "$SCRATCH" && pwd) && [ -w "$OUT" ]; }; then
    echo "error: OUT=$OUT GPU_CHECK_SCRATCH=$SCRATCH: expected folders that can be written" >&2
    exit 2
fi
LOG=$OUT/log-$command.txt
: > "$LOG"
export TMPDIR=$SCRATCH/tmp HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# Compiled kernels are kept: several parts compile the same model.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}

SECONDS=0
summary=""
failed=0
running=""
# `timeout` and what it runs are in the background, so that a signal ends them at once.
trap 'trap - INT TERM; [ -n "$running" ] && kill -TERM "$running"; wait; exit 130' INT TERM

# part NAME SECONDS BENCHMARK_OPTION...
part() {
    local name=$1 seconds=$2 left=$((limit - SECONDS - 15)) begin=$SECONDS code
    shift 2
    rm -f "$OUT/$name.json"
    [ "$seconds" -gt "$left" ] && seconds=$left
    if [ "$seconds" -lt 15 ]; then
        echo "$name: left out, no time" | tee -a "$LOG"
        summary+="$name skipped 0"$'\n'
        return
    fi
    echo "== $name, at second $SECONDS, for $seconds s" | tee -a "$LOG"
    timeout -k 5 "$seconds" "$PYTHON" scripts/benchmark.py --device "$DEVICE" --compile "${GPU_CHECK_COMPILE:-auto}" \
        --cache "$SCRATCH/cache" --vocab-size "$VOCABULARY" \
        ${GPU_CHECK_TRAIN:+--train "$GPU_CHECK_TRAIN" --format sentences} --json "$OUT/$name.json" "$@" >> "$LOG" 2>&1 < /dev/null &
    running=$!
    wait "$running"
    code=$?
    running=""
    [ "$code" -eq 0 ] || failed=1
    summary+="$name $code $((SECONDS - begin))"$'\n'
}

# sizes MODEL LENGTH: a step of one micro-batch
sizes() {
    echo --model "$1" --max-length "$2" --batch-size $((TOKENS / $2)) --micro-batch-size $((TOKENS / $2)) --steps "$STEPS"
}

short=${LENGTHS[0]}
long=${LENGTHS[1]:-} # without it, what needs it is left out
if [ "$command" = first ]; then
    part tests 120 --parts tests --tests $TESTS
    part attention 40 --parts attention --lengths "${LENGTHS[@]}" $(sizes "$MODEL" "$short")
    part "train-$short" 150 --parts train profile $(sizes "$MODEL" "$short")
    [ -n "$long" ] && part "train-$long" 130 --parts train profile $(sizes "$MODEL" "$long")
    part resume 110 --parts resume $(sizes "$MODEL" "$short") --steps "$RESUME_STEPS"
    part numerics 40 --parts numerics $(sizes tiny "$short")
    part fp16 60 --parts fp16 $(sizes "$SMALL" "$short") --steps "$FP16_STEPS"
else
    part variants 145 --parts variants $(sizes "$MODEL" "$short") --minutes 2.3
    # Where the first command has not come that far.
    [ -d "$SCRATCH/cache/fp16/run/final" ] || part fp16 60 --parts fp16 $(sizes "$SMALL" "$short") --steps "$FP16_STEPS"
    part use 50 --parts use $(sizes "$SMALL" "$short") --model "$SCRATCH/cache/fp16/run/final"
    part "large-$short" 130 --parts train $(sizes "$LARGE" "$short")
    [ -n "$long" ] && part "large-$long" 130 --parts train $(sizes "$LARGE" "$long")
fi

printf '%s' "$summary" | "$PYTHON" -c '
import sys
from pathlib import Path
from pretrain.benchmark.table import print_check
print_check(sys.stdin, Path(sys.argv[1]))' "$OUT" | tee -a "$LOG"
echo "$SECONDS s of $limit; $OUT" | tee -a "$LOG"
exit "$failed"
