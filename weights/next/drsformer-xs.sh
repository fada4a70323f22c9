#!/usr/bin/env bash
# How the drsformer-xs of this folder was trained on from the one that ships: bash weights/next/drsformer-xs.sh DATA RUNS
#
# DATA as in weights/drsformer-xs.sh. 100 minutes on a core of a shared CPU. The log of the run is beside this script.
set -euo pipefail
data=$1 runs=$2
light=$data/rain100l/train heavy=$data/rain200h/train slanted=$data/rain800/train
python -m drsformer.train --init weights/drsformer-xs.safetensors --output "$runs/stage8" \
  --data "$light" "$light" "$heavy" "$heavy" "$heavy" "$slanted" --clean "$data/clean" --streaks "$data/streaks" \
  --rendered 0.4 --dry 0.08 --compressed 0.12 --clip 0.1 --ema 0.99 \
  --validate "$data/rain100l/val" "$data/rain200h/val" "$data/rain800/val" --validate-limit 9 --validate-every 400 \
  --constant 0 --iterations 1200 --warmup 20 --lr 4e-4 --patch 160 --batch 3 --seed 14
# Half precision on disk.
python - "$runs/stage8/last.safetensors" <<'END'
import sys, torch
from pathlib import Path
from drsformer import checkpoint
trained = checkpoint.load(Path(sys.argv[1]))
checkpoint.save(Path("weights/next/drsformer-xs.safetensors"), trained.model, trained.provenance, dtype=torch.float16)
END
