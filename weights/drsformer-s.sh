#!/usr/bin/env bash
# How drsformer-s was trained: bash weights/drsformer-s.sh DATA RUNS
#
# DATA as in drsformer-xs.sh, whose RUNS these are. drsformer-xs, as it was after its fourth stage, is grown without
# changing what it computes, and trained on: six minutes of a shared H100. Rain800, steep and dense streaks and the
# noise of codecs came later: 46 minutes on a core of a shared CPU. The logs of the run that made the shipped file are
# beside this script.
set -euo pipefail
data=$1 runs=$2
mkdir -p "$runs/xs-grown"
grow() { python -m compress.grow --weights "$1" --depths 2 4 4 4 --hidden 2 --output "$2"; }
grow "$runs/xs-2/last.safetensors" "$runs/xs-grown/last.safetensors"
python -m benchmarks.gpu train --recipe s --data "$data" --run-dir "$runs" --iterations 3928 --minutes 1440 --output "$runs"
# What drsformer-xs has learned since is had for nothing: grown in the same way, its states then and now differ by what
# training changed, and a part of that is added (task arithmetic, arXiv 2212.04089).
grow weights/drsformer-xs.safetensors "$runs/xs-grown/now.safetensors"
# A sum of checkpoints, each times its factor, in half precision: OUTPUT [FACTOR CHECKPOINT]...
sum='
import sys, torch
from pathlib import Path
from drsformer import checkpoint
factors, files = [float(factor) for factor in sys.argv[2::2]], [checkpoint.load(Path(name)) for name in sys.argv[3::2]]
states = [file.model.state_dict() for file in files]
files[0].model.load_state_dict({name: sum(x * state[name] for x, state in zip(factors, states)) for name in states[0]})
options = {"factors": factors, "of": [file.sha256 for file in files]}
provenance = checkpoint.provenance_after(files[0], "weights added", options)
checkpoint.save(Path(sys.argv[1]), files[0].model, provenance, dtype=torch.float16)
'
then=$runs/xs-grown/last.safetensors now=$runs/xs-grown/now.safetensors
python - "$runs/more.safetensors" 1 "$runs/s/s.safetensors" 0.6 "$now" -0.6 "$then" <<<"$sum"
light=$data/rain100l/train heavy=$data/rain200h/train slanted=$data/rain800/train
python -m drsformer.train --init "$runs/more.safetensors" --output "$runs/s-stage2" \
  --data "$light" "$light" "$heavy" "$heavy" "$heavy" "$slanted" --clean "$data/clean" --streaks "$data/streaks" \
  --rendered 0.4 --compressed 0.15 --dry 0.08 --clip 0.1 --ema 0.99 \
  --constant 0 --iterations 640 --warmup 20 --lr 3e-4 --patch 160 --batch 3 --seed 16
# The mean of that and of the network with half of the difference, without a step, has the best PSNR on light and heavy
# rain.
python - weights/drsformer-s.safetensors 0.5 "$runs/s-stage2/last.safetensors" \
  0.5 "$runs/s/s.safetensors" 0.25 "$now" -0.25 "$then" <<<"$sum"
