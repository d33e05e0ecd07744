#!/bin/sh
# Two experts in two vLLM servers of this machine, the generalist in process; asked together.
#
#     sh examples/two-servers/run.sh [FOLDER [COMMAND ...]]
#
# A command, such as a shell, runs after the questions and before the servers are stopped.
# VLLM is the python that has vLLM; `make test-engines` makes one. Starting a server takes half a
# minute, and the servers are stopped at the end, however it comes.
set -eu

OUT=${1:-runs/two-servers}
PYTHON=${PYTHON:-python}
MULTICOLM=${MULTICOLM:-multicolm}
VLLM=${VLLM:-.venv-engines/bin/python}
FACTS_PORT=${FACTS_PORT:-8101}
MATH_PORT=${MATH_PORT:-8102}
PATIENCE=${PATIENCE:-180}
HERE=$(dirname "$0")
[ $# -eq 0 ] || shift
mkdir -p "$OUT"

SERVERS=
stop() {
    trap - EXIT INT TERM
    for server in $SERVERS; do kill "$server" 2>/dev/null || :; done
    wait
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# All log-probabilities (--max-logprobs -1) in single precision, for loopback only. A worker in a
# process of its own would start slowly and wait by spinning (VLLM_ENABLE_V1_MULTIPROCESSING).
serve() { # NAME PORT
    rm -rf "$OUT/$1"
    "$PYTHON" "$HERE/wider_heads.py" "registry/tiny/$1" "$OUT/$1"
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1 \
        VLLM_ENABLE_V1_MULTIPROCESSING=0 \
        "$VLLM" -m vllm.entrypoints.openai.api_server --model "$OUT/$1" --served-model-name "$1" \
        --host 127.0.0.1 --port "$2" --max-model-len 512 --max-logprobs -1 --dtype float32 \
        --enforce-eager --kv-cache-memory-bytes 64M --max-num-seqs 16 >"$OUT/$1.log" 2>&1 &
    SERVERS="$SERVERS $!"
}

# Returns when a server answers; ends the script if it does not in time.
await() { # NAME PORT
    "$PYTHON" "$HERE/await.py" "http://127.0.0.1:$2/health" "$PATIENCE" || {
        tail -5 "$OUT/$1.log" >&2
        echo "the server of '$1' did not start; see $OUT/$1.log" >&2
        exit 1
    }
}

serve facts "$FACTS_PORT"
serve math "$MATH_PORT"
await facts "$FACTS_PORT"
await math "$MATH_PORT"

sed "s/:8101/:$FACTS_PORT/; s/:8102/:$MATH_PORT/" "$HERE/ensemble.yaml" >"$OUT/ensemble.yaml"

# What the servers were found to do.
$MULTICOLM validate "$OUT/ensemble.yaml" --load

# The text is the one that `multicolm generate tiny --policy cosd-rule` writes in one process.
$MULTICOLM generate "$OUT/ensemble.yaml" --temperature 0 --trace --usage \
    "Question: What is Dulerex made from?
Response:" \
    "Question: What is 3 ^ 2 + 4?
Response:"

[ $# -eq 0 ] || "$@"
