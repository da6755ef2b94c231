#!/usr/bin/env bash
# From instructions to an endpoint that LangChain asks: see README.md.
#
#     bash run.sh [FOLDER]
#
# LANGCHAIN_PYTHON: a Python that has langchain-openai; without it one is installed into FOLDER.
set -euo pipefail

. "$(dirname "$0")/../start.sh"

# LangChain's packages want other versions than ours: an environment of its own.
python=${LANGCHAIN_PYTHON:-langchain/bin/python}
if [ -z "${LANGCHAIN_PYTHON:-}" ]; then
    python -m venv langchain
    langchain/bin/python -m pip install --quiet langchain-openai==1.7.4
fi

raytune sft "$here/sft.yaml"
raytune merge base=demo/model 'adapters=[runs/reviews/sft_lora_model]' target=models/reviews

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
raytune serve model_dir=models/reviews "port=$port" >serve.log 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until grep '^serving' serve.log; do
    kill -0 "$server" 2>/dev/null || { cat serve.log; exit 1; }
    sleep 1
done

"$python" "$here/ask.py" "http://127.0.0.1:$port/v1" reviews demo/questions/reviews.jsonl 20
