"""Settings that choose the nodes of a Ray cluster that workers run on."""

import re
from typing import Annotated

from pydantic import Field

from raytune_llama.config.settings import settings

_NAME = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL_KEY = re.compile(rf"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{{0,251}}[a-zA-Z0-9])?/)?{_NAME}")
_LABEL_CONDITION = re.compile(rf"!?(?:{_NAME}|in\({_NAME}(?:,{_NAME})*\))")


@settings
class NodeSelection:
    """Nodes of the cluster that workers may run on; by default all with enough resources."""

    accelerator_type: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """Type of GPU that workers need, as Ray names it: H100, A100, A100-80G, L4, ... Null: any. A
    node has it as the resource `accelerator_type:H100`, which Ray sets where it finds such a GPU;
    an autoscaler adds nodes for it only if their type is configured with that resource."""

    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a worker's node must have, such as `{market-type: on-demand}`, with Ray's
    conditions for values: `a`, `!a`, `in(a,b)` or `!in(a,b)`. Nodes have the labels that
    `ray start --labels` gives them, and those of Ray, such as `ray.io/accelerator-type`."""


def check_node_selection(nodes: NodeSelection, *, use_gpu: bool) -> list[str]:
    """Return what is wrong with a selection, each problem beginning with its field.

    Args:
        nodes: the selection.
        use_gpu: whether the workers run on GPUs.
    """
    problems: list[str] = []
    if nodes.accelerator_type is not None and not use_gpu:
        problems.append(
            f"accelerator_type: got {nodes.accelerator_type}, but use_gpu is false, so that the "
            "workers would compute on the CPUs of such nodes; set use_gpu=true, or "
            "accelerator_type=null"
        )
    for key, condition in nodes.label_selector.items():
        if not _LABEL_KEY.fullmatch(key):
            problems.append(
                f"label_selector: {key!r} is no name of a label, such as market-type or "
                "ray.io/accelerator-type"
            )
        elif not _LABEL_CONDITION.fullmatch(condition):
            problems.append(
                f"label_selector.{key}: got {condition!r}, wanted a value, !VALUE, in(A,B) or "
                "!in(A,B), without spaces"
            )
    return problems
