"""Which files of a folder belong to a model, a tokenizer or an adapter, judged by their names."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from raytune_llama.config.errors import UserError

WEIGHTS_SUFFIX = ".safetensors"
"""Suffix of weights that are data alone."""

_SUFFIXES = frozenset(
    {WEIGHTS_SUFFIX, ".json", ".model", ".txt", ".jinja", ".tiktoken", ".md", ".png"}
)
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack"})
_TEXTS = ("LICENSE", "NOTICE", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"


def is_model_file(name: str) -> bool:
    """Whether a file is weights in safetensors, a tokenizer, settings or a text beside them.

    Code and pickles, which can run anything when they are loaded, are not; nor are files of
    subfolders, except chat templates.

    Args:
        name: Path of the file in its folder, with "/" between folders.
    """
    *folders, last = name.split("/")
    if folders and folders != [_TEMPLATES]:
        return False
    if last.startswith("."):
        return False
    return PurePosixPath(last).suffix in _SUFFIXES or last.startswith(_TEXTS)


def is_weights(name: str) -> bool:
    """Whether a file holds weights that may be fetched."""
    return name.endswith(WEIGHTS_SUFFIX)


def refuse_pickles(names: Iterable[str], what: str) -> None:
    """Refuse a folder whose only weights are pickles.

    Args:
        names: Paths of its files, with "/" between folders.
        what: Field and folder, for the message.

    Raises:
        ValueError: There are weights, none of them in safetensors.
    """
    listed = [name for name in names if "/" not in name]
    pickles = [name for name in listed if PurePosixPath(name).suffix in _PICKLES]
    weights = [name for name in pickles if not name.startswith(("training_args", "optimizer"))]
    if not weights or any(is_weights(name) for name in listed):
        return
    raise UserError(
        f"{what} has its weights only as {weights[0]}, a format that can run code when it is "
        "loaded; use a revision or a copy with .safetensors files"
    )
