#!/bin/sh
# Three models with three vocabularies, from raw data to the comparison, in minutes on two CPU cores.
#
#     sh examples/any-tokenizer/run.sh [FOLDER]
#
# Run it again after a stop: every step resumes where it stopped. LIMIT asks only so many questions.
set -eu

OUT=${1:-runs/any-tokenizer}
DATA=${DATA:-registry/tiny/questions/train.jsonl}
TASK=${TASK:-tiny-world}
LIMIT=${LIMIT:+--limit $LIMIT}
MULTICOLM=${MULTICOLM:-multicolm}

# Which models share tokens, and how each two of them hand over to each other.
$MULTICOLM validate tiny-mixed --load

# Each model reads the texts in its own tokens; scores are kept of stretches that are whole for all.
$MULTICOLM score tiny-mixed "$DATA" --hidden --out "$OUT/scores"
$MULTICOLM train tiny-mixed "$OUT/scores" --policy co-llm --out "$OUT/co-llm"
$MULTICOLM train tiny-mixed "$OUT/scores" --policy mlp-router --out "$OUT/mlp-router"

# The learned policies beside rules, each model alone, random baselines and the oracles.
$MULTICOLM compare tiny-mixed --task "$TASK" $LIMIT --sweep 0 --out "$OUT/comparison" --policies \
"$OUT/co-llm,$OUT/mlp-router,cosd-rule,confidence,max-confidence"

# By the exact bridge the experts continue within their own tokens too: slower, nothing is merged.
$MULTICOLM score tiny-mixed-exact "$DATA" --hidden --out "$OUT/exact/scores"
$MULTICOLM train tiny-mixed-exact "$OUT/exact/scores" --policy co-llm --out "$OUT/exact/co-llm"
$MULTICOLM compare tiny-mixed-exact --task "$TASK" $LIMIT --sweep 0 --no-random \
    --out "$OUT/exact/comparison" --policies \
"$OUT/exact/co-llm,cosd-rule,max-confidence,byte-mixture"

echo "open $OUT/comparison/report.html and $OUT/exact/comparison/report.html"
