#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine: a head without CPUs, and nodes that work.
#
#   cluster/local.sh up [NODES [CPUS]]   start a head and NODES nodes (3) of CPUS CPUs each (1)
#   cluster/local.sh status              show them; exit status 1 where one is dead, 3 where none is
#   cluster/local.sh kill NODE           lose node NODE (1, 2, ... or head) with all that it runs
#   cluster/local.sh add [CPUS]          start one more node
#   cluster/local.sh down                stop all of them, and nothing else
#
# What it knows lies in RAYTUNE_CLUSTER_DIR; another folder is another cluster, on other addresses
# if RAYTUNE_CLUSTER_NET (127.0.77, whose .1 is the head) differs too. RAYTUNE_CLUSTER_ARGS: further
# arguments of `ray start` for the nodes that a call starts.

set -euo pipefail

DIR="${RAYTUNE_CLUSTER_DIR:-/tmp/raytune-$(id -u)}"
NET="${RAYTUNE_CLUSTER_NET:-127.0.77}"
PORT="${RAYTUNE_CLUSTER_PORT:-6377}"
DASHBOARD_PORT="${RAYTUNE_CLUSTER_DASHBOARD_PORT:-8277}"
OBJECT_STORE_BYTES=$((80 * 1024 * 1024))
read -ra FURTHER_ARGS <<<"${RAYTUNE_CLUSTER_ARGS:-}"
START_SECONDS=120
START_ATTEMPTS=3
RAY="$(command -v ray || true)"

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$DIR/token"
export RAY_USAGE_STATS_ENABLED=0

fail() {
    echo "local.sh: $1" >&2
    exit "${2:-1}"
}

# Starts a node in the background and waits until it is a part of the cluster. Ray gives a node
# 30 s to come up, which a busy machine may not keep: so there are some attempts.
start_node() { # name, further arguments of `ray start`
    local name="$1" attempt
    shift
    mkdir -p "$DIR/$name"
    for ((attempt = 1; attempt <= START_ATTEMPTS; attempt++)); do
        detached "$RAY" start --block --disable-usage-stats \
            --object-store-memory="$OBJECT_STORE_BYTES" "$@" \
            ${FURTHER_ARGS[@]+"${FURTHER_ARGS[@]}"} >"$DIR/$name/log" 2>&1 </dev/null &
        echo "$!" >"$DIR/$name/pid"
        if wait_for_node "$name"; then
            echo "$name is up"
            return
        fi
        lose "$name"
    done
    fail "$name does not start, see $DIR/$name/log: $(tail -n 1 "$DIR/$name/log")"
}

# Runs a command in a session of its own, without the caller's open files: it may hold a lock.
detached() {
    local file
    for file in "/proc/$BASHPID/fd/"*; do
        file="${file##*/}"
        if ((file > 2)); then eval "exec $file>&-"; fi
    done
    exec setsid "$@"
}

wait_for_node() { # name
    local deadline=$((SECONDS + START_SECONDS))
    until grep -q "Ray runtime started" "$DIR/$1/log"; do
        kill -0 "$(cat "$DIR/$1/pid")" 2>/dev/null || return 1
        ((SECONDS < deadline)) || return 1
        sleep 0.2
    done
}

start_worker() { # number, CPUs
    start_node "node-$1" --address="$NET.1:$PORT" --node-ip-address="$NET.$((10#$1 + 1))" \
        --num-cpus="$2" --num-gpus=0
}

# The node's own process and all below it: its raylet, its agents, its workers.
tree() { # pid
    local child
    echo "$1"
    for child in $(ps -o pid= --ppid "$1"); do tree "$child"; done
}

is_alive() { # name; a pid that another program has by now is none of ours
    local pid
    pid="$(cat "$DIR/$1/pid" 2>/dev/null)" || return 1
    { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q "ray start --block"
}

names() {
    [ -d "$DIR" ] && cd "$DIR" && ls -d head node-* 2>/dev/null || true
}

up() {
    local nodes="${1:-3}" cpus="${2:-1}" number
    [ -n "$RAY" ] || fail "no program 'ray' in PATH; activate the environment: . .venv/bin/activate"
    [[ "$nodes" =~ ^(0|[1-9][0-9]?)$ ]] || fail "NODES: got '$nodes', wanted a number from 0 to 99"
    mkdir -m 700 "$DIR" 2>/dev/null \
        || fail "$DIR is there: a cluster runs, or has died; look with 'status', end it with 'down'"
    (umask 077 && "$(dirname "$RAY")/python" -c 'import secrets; print(secrets.token_hex(32))' \
        >"$DIR/token")
    start_node head --head --port="$PORT" --node-ip-address="$NET.1" --num-cpus=0 --num-gpus=0 \
        --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD_PORT" --temp-dir="$DIR/ray"
    for ((number = 1; number <= nodes; number++)); do start_worker "$number" "$cpus"; done
    how_to_use
}

how_to_use() {
    echo "export RAY_ADDRESS=$NET.1:$PORT RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$DIR/token"
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
}

status() {
    local name status=0
    [ -n "$(names)" ] || fail "no cluster in $DIR" 3
    for name in $(names); do
        if is_alive "$name"; then
            echo "$name: process $(cat "$DIR/$name/pid")"
        else
            echo "$name: dead"
            status=1
        fi
    done
    how_to_use
    return $status
}

lose() { # name
    is_alive "$1" || return 0
    # shellcheck disable=SC2046  # one pid a word
    kill -KILL $(tree "$(cat "$DIR/$1/pid")") 2>/dev/null || true
}

kill_node() { # number, or head
    local name="node-${1:-}"
    if [ "${1:-}" = head ]; then name=head; fi
    is_alive "$name" || fail "kill: got '${1:-}', wanted one of: $(names | sed s/node-// | xargs)"
    lose "$name"
    if [ "$name" != head ]; then rm -rf "${DIR:?}/$name"; fi
    echo "$name is lost"
}

add_node() {
    local number=1
    is_alive head || fail "no cluster in $DIR; start one: cluster/local.sh up"
    while [ -d "$DIR/node-$number" ]; do number=$((number + 1)); done
    start_worker "$number" "${1:-1}"
}

down() {
    local name
    [ -n "$(names)" ] || fail "no cluster in $DIR" 3
    # The head last: nodes that lose it would log their errors for a while.
    for name in $(names | sort -r); do lose "$name"; done
    rm -rf "${DIR:?}"
    echo "the cluster is down"
}

case "${1:-}" in
    up | status | down) "$@" ;;
    kill) kill_node "${2:-}" ;;
    add) add_node "${2:-}" ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
