#!/usr/bin/env bash
# How drsformer-s-half was made: bash weights/drsformer-s-half.sh DATA RUNS
#
# DATA as in drsformer-xs.sh. drsformer-s is pruned to half of its MACs and recovered, without a step of training: some
# three minutes on a core of a shared CPU.
set -euo pipefail
data=$1 runs=$2
python -m compress.prune --weights weights/drsformer-s.safetensors --macs 0.5 --limit 4 --no-rotate \
  --data "$data/rain100l/train" "$data/rain200h/train" "$data/rain800/train" --output "$runs/half.safetensors"
python - "$runs/half.safetensors" <<'END'
import sys, torch
from drsformer import checkpoint
pruned = checkpoint.load(sys.argv[1])
checkpoint.save("weights/drsformer-s-half.safetensors", pruned.model, pruned.provenance, dtype=torch.float16)
END
