"""Something small to be done on every node of the cluster."""

from __future__ import annotations

from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# A node that has left in the meantime answers never.
PATIENCE_S = 30.0


def on_every_node(call: Callable[[], None]) -> None:
    """Call a function once on every living node, for those that answer within half a minute; drop its errors."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    # No CPU of its own: a node that is busy with another run does this beside it.
    task = ray.remote(num_cpus=0, max_retries=0)(call)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_S)
