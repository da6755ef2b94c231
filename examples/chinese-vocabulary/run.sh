#!/usr/bin/env bash
# A tokenizer learns Chinese, and the model learns it in two stages: see README.md.
#
#     bash run.sh [FOLDER]
set -euo pipefail

. "$(dirname "$0")/../start.sh"

raytune expand-vocab "$here/expand.yaml"
raytune pretrain "$here/stage1.yaml"
python "$here/compare_rows.py" demo/model runs/stage1/pt_model
raytune pretrain "$here/stage2.yaml"
