#!/usr/bin/env bash
# How drsformer-xs was trained: bash weights/drsformer-xs.sh DATA RUNS
#
# DATA holds rain100l/train and rain200h/train (pairs), clean (photographs) and streaks (streak images on black); the
# val folders beside train are only scored on. Three stages took about two hours on two CPU cores, the fourth six minutes
# of a shared H100 (add --accelerator cpu and some hours without one). The logs of the run that made the shipped file are
# beside this script. That run scored itself on the first 6 pairs of each val folder in the first stage and not at
# all later, put no drawn streaks on photographs before the third stage, and in the first cut rendered rain off at a mean
# brightness of 72 instead of 90.
set -euo pipefail
data=$1 runs=$2
common=(
  --data "$data/rain100l/train" "$data/rain200h/train" --clean "$data/clean" --streaks "$data/streaks" --dry 0.05
  --validate "$data/rain100l/val" "$data/rain200h/val" --constant 0 --clip 0.1 --channels-last
)
# Small patches first, which train fastest.
python -m drsformer.train --network drsformer-xs --output "$runs/stage1" "${common[@]}" \
  --rendered 0.65 --iterations 12000 --warmup 200 --lr 1.5e-3 --patch 64 --batch 8 --ema 0.999
# Then patches nearer to whole images, since attention takes its statistics over everything that it sees.
python -m drsformer.train --init "$runs/stage1/last.safetensors" --output "$runs/stage2" "${common[@]}" \
  --rendered 0.6 --iterations 1500 --warmup 50 --lr 5e-4 --patch 128 --batch 4 --ema 0.99 --seed 1
python -m drsformer.train --init "$runs/stage2/last.safetensors" --output "$runs/stage3" "${common[@]}" \
  --rendered 0.6 --iterations 1000 --warmup 50 --lr 4e-4 --patch 128 --batch 4 --ema 0.99 --seed 2
python -m benchmarks.gpu train --recipe xs-2 --init "$runs/stage3/last.safetensors" --data "$data" --run-dir "$runs" \
  --iterations 4243 --minutes 30 --output "$runs"
# Half precision on disk, and the model that the runtime takes by default.
python - "$runs/xs-2/last.safetensors" <<'END'
import sys, torch
from drsformer import checkpoint
trained = checkpoint.load(sys.argv[1])
checkpoint.save("weights/drsformer-xs.safetensors", trained.model, trained.provenance, dtype=torch.float16)
END
python -m export.onnx --weights weights/drsformer-xs.safetensors --output runtime/drsformer-xs.onnx
