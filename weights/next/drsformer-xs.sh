#!/usr/bin/env bash
# How weights/next/drsformer-xs.safetensors was trained on from the network that ships:
# bash weights/next/drsformer-xs.sh DATA RUNS
#
# DATA as in ../drsformer-xs.sh, with rain800/train besides. Two hours on one core of a shared CPU. The first command was
# stopped after 1,380 steps, from whose checkpoint the second one started; --minutes does that here.
set -euo pipefail
data=$1 runs=$2
common=(
  --data "$data/rain100l/train" "$data/rain200h/train" "$data/rain200h/train" "$data/rain800/train"
  --clean "$data/clean" --streaks "$data/streaks" --rendered 0.3 --dry 0.05
  --validate "$data/rain100l/val" "$data/rain200h/val" "$data/rain800/val"
  --clip 0.1 --channels-last --lr 4e-4 --patch 128 --batch 4 --ema 0.99
)
python -m drsformer.train --init weights/drsformer-xs.safetensors --output "$runs/stage5" "${common[@]}" \
  --constant 5999 --iterations 6000 --warmup 50 --seed 11 --minutes 45
python -m drsformer.train --init "$runs/stage5/last.safetensors" --output "$runs/stage6" "${common[@]}" \
  --compressed 0.15 --constant 0 --iterations 1800 --warmup 20 --seed 12
