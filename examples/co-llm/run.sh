#!/bin/sh
# From raw data to the comparison, on the embedded models, in a few minutes on two CPU cores.
#
#     sh examples/co-llm/run.sh [FOLDER]
#
# Run it again after a stop: every step resumes where it stopped. DATA, TASK and ENSEMBLE may be your own;
# LIMIT asks only so many questions of each split.
set -eu

OUT=${1:-runs}
ENSEMBLE=${ENSEMBLE:-tiny}
DATA=${DATA:-registry/tiny/questions/train.jsonl}
TASK=${TASK:-tiny-world}
LIMIT=${LIMIT:+--limit $LIMIT}
MULTICOLM=${MULTICOLM:-multicolm}

# Every model reads the training texts once. From here on, training loads no model.
$MULTICOLM score "$ENSEMBLE" "$DATA" --hidden --out "$OUT/scores"

# Three ways to learn who writes.
$MULTICOLM train "$ENSEMBLE" "$OUT/scores" --policy co-llm --out "$OUT/co-llm"
$MULTICOLM train "$ENSEMBLE" "$OUT/scores" --policy cosd-tree --out "$OUT/cosd-tree"
$MULTICOLM train "$ENSEMBLE" "$OUT/scores" --policy mlp-router --out "$OUT/mlp-router"

# One model per question, learned from what every model alone answers to training questions.
$MULTICOLM train "$ENSEMBLE" --task "$TASK" ${LIMIT:---limit 300} --policy query-router \
    --out "$OUT/query-router"

# A rule at its best, and a learned threshold for a budget: assistants may write 15 % of the tokens.
$MULTICOLM tune "$ENSEMBLE" --policy cosd-rule --task "$TASK" $LIMIT --out "$OUT/cosd-rule"
$MULTICOLM tune "$ENSEMBLE" --policy "$OUT/co-llm" --budget 0.15 \
    --task "$TASK" $LIMIT --out "$OUT/co-llm-15"

# All of them beside rules as they come, each model alone, random baselines and the oracles.
$MULTICOLM compare "$ENSEMBLE" --task "$TASK" $LIMIT --sweep 3 --out "$OUT/comparison" --policies \
"$OUT/co-llm,$OUT/co-llm-15,$OUT/mlp-router,$OUT/cosd-tree,$OUT/query-router,$OUT/cosd-rule,\
confidence,max-confidence,average"

echo "open $OUT/comparison/report.html"
