"""The peer: datatrove's tokenization pipeline, of a text file cut into lines of JSON.

`datatrove_tokenize.py SETTINGS.json`: JsonlReader and DocumentTokenizer on the local executor, a
task a process. Its reader wants a file a task, so that the input was split beforehand; this is not
in its time.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    """Do what the settings say."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    output = Path(settings["output"])
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(settings["jsonl"]),
            DocumentTokenizer(
                output_folder=str(output / "tokens"),
                local_working_dir=str(output / "work"),
                tokenizer_name_or_path=str(Path(settings["tokenizer_json"]) / "tokenizer.json"),
                eos_token="</s>",  # noqa: S106 - a token of text
                shuffle_documents=False,
            ),
        ],
        tasks=settings["num_workers"],
        workers=settings["num_workers"],
        logging_dir=str(output / "logs"),
    ).run()


if __name__ == "__main__":
    main()
