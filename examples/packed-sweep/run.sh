#!/usr/bin/env bash
# Eight trials on one base model, four at a time, then the best one again alone: see README.md.
#
#     bash run.sh [FOLDER]
set -euo pipefail

. "$(dirname "$0")/../start.sh"

raytune sweep "$here/sweep.yaml" "base=$here/sft.yaml"

raytune sft sweep/best.yaml  # writes to sweep/best
best=$(sed -n 2p sweep/leaderboard.csv | cut -d, -f2)
python "$here/../compare_losses.py" "sweep/trials/$(printf %04d "$best")" sweep/best
