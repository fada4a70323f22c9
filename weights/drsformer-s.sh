#!/usr/bin/env bash
# How drsformer-s was trained: bash weights/drsformer-s.sh DATA RUNS
#
# DATA as in drsformer-xs.sh. drsformer-xs, as it was after its fourth stage, is grown without changing what it computes,
# and trained on: seven minutes of a shared H100. The log of the run that made the shipped file is beside this script.
set -euo pipefail
data=$1 runs=$2
mkdir -p "$runs/xs-grown"
python -m compress.grow --weights weights/drsformer-xs.safetensors --depths 2 4 4 4 --hidden 2 \
  --output "$runs/xs-grown/last.safetensors"
python -m benchmarks.gpu train --recipe s --data "$data" --run-dir "$runs" --iterations 3928 --minutes 30 --output "$runs"
cp "$runs/s/s.safetensors" weights/drsformer-s.safetensors
