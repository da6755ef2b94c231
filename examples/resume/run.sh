#!/usr/bin/env bash
# A run on three nodes loses its driver, then a node, and learns what it would have learned: see README.md.
#
#     bash run.sh [FOLDER]
set -euo pipefail

. "$(dirname "$0")/../start.sh"
cluster=$here/../../cluster/local.sh

# A cluster beside any other one: its own folder (a socket's path is short), addresses and ports.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
RAYTUNE_CLUSTER_DIR=$(mktemp -d /tmp/resume-XXXXXX)/cluster
RAYTUNE_CLUSTER_NET=127.1.$(($$ % 250))
RAYTUNE_CLUSTER_PORT=$(free_port)
RAYTUNE_CLUSTER_DASHBOARD_PORT=$(free_port)
export RAYTUNE_CLUSTER_DIR RAYTUNE_CLUSTER_NET RAYTUNE_CLUSTER_PORT RAYTUNE_CLUSTER_DASHBOARD_PORT

driver=
clean_up() {
    [ -z "$driver" ] || kill -KILL "$driver" 2>/dev/null || true
    "$cluster" down
    rmdir "$(dirname "$RAYTUNE_CLUSTER_DIR")"
}
trap clean_up EXIT
"$cluster" up 3 >cluster.log
grep up cluster.log
eval "$(grep ^export cluster.log)"

wait_for_step() { # run directory, step
    until [ "$(grep -c train/loss "$1/metrics.jsonl" 2>/dev/null || true)" -ge "$2" ] 2>/dev/null; do
        kill -0 "$driver" || { echo "the run has ended before step $2" >&2; exit 1; }
        sleep 0.2
    done
}

echo "== a run that nothing happens to"
raytune pretrain "$here/run.yaml" run_dir=runs/undisturbed

echo "== the same run; its driver is killed after step 7"
raytune pretrain "$here/run.yaml" run_dir=runs/killed &
driver=$!
wait_for_step runs/killed 7
kill -KILL "$driver"
wait "$driver" || echo "the driver is dead, exit status $?"

echo "== the same command again; node 2 is lost after step 17, and another one joins"
raytune pretrain "$here/run.yaml" run_dir=runs/killed &
driver=$!
wait_for_step runs/killed 17
"$cluster" kill 2
"$cluster" add
wait "$driver"
driver=

python "$here/../compare_losses.py" runs/undisturbed runs/killed
