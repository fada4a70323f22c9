#!/usr/bin/env bash
# How drsformer-s-half was made: bash weights/drsformer-s-half.sh DATA RUNS
#
# DATA as in drsformer-xs.sh. drsformer-s is pruned to half of its MACs, and distilled against the whole: half an hour on
# one core of a shared CPU. The log of the run that made the shipped file is beside this script.
set -euo pipefail
data=$1 runs=$2
train=(--data "$data/rain100l/train" "$data/rain200h/train")
python -m compress.prune --weights weights/drsformer-s.safetensors "${train[@]}" --macs 0.5 --limit 4 \
  --importance taylor --no-recover --output "$runs/half.safetensors"
python -m compress.distill --teacher weights/drsformer-s.safetensors --student "$runs/half.safetensors" \
  "${train[@]}" --clean "$data/clean" --streaks "$data/streaks" --rendered 0.6 --dry 0.05 \
  --iterations 300 --warmup 30 --constant 0 --lr 2e-4 --patch 128 --batch 4 --clip 0.1 --ema 0.98 --channels-last \
  --output "$runs/s-half"
python - "$runs/s-half/last.safetensors" <<'END'
import sys, torch
from drsformer import checkpoint
trained = checkpoint.load(sys.argv[1])
checkpoint.save("weights/drsformer-s-half.safetensors", trained.model, trained.provenance, dtype=torch.float16)
END
