#!/usr/bin/env bash
# Three customers' adapters on one base model behind one URL: see README.md.
#
#     bash run.sh [FOLDER]
set -euo pipefail

. "$(dirname "$0")/../start.sh"

train() { # name of the rows
    raytune sft "$here/sft.yaml" "data.sources=[{path: $here/$1.jsonl}]" \
        "data.store_dir=stores/$1" "run_dir=runs/$1"
}

# The name of an adapter is a link to the folder of a version: replaced in one step, when the version is complete.
publish() { # name of the rows, name of the adapter
    cp -r "runs/$1/sft_lora_model" "versions/$1"
    ln -s "../versions/$1" "adapters/.$2"
    mv -T "adapters/.$2" "adapters/$2"
}

mkdir -p adapters versions
for customer in bakery bicycles library; do
    train "$customer"
    publish "$customer" "$customer"
done

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
raytune serve model_dir=demo/model models.0.name=base models.0.adapters_dir=adapters \
    "port=$port" >serve.log 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until grep '^serving' serve.log; do
    kill -0 "$server" 2>/dev/null || { cat serve.log; exit 1; }
    sleep 1
done
python "$here/ask.py" "http://127.0.0.1:$port/v1" "Where can I find you?"

# The bakery moves: a new version of its adapter, while the endpoint runs.
train bakery-moved
publish bakery-moved bakery
echo "the bakery's adapter is replaced, the endpoint still runs"
python "$here/ask.py" "http://127.0.0.1:$port/v1" "Where can I find you?"
