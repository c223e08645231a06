"""How many items are under way in a chain of operators: an exact bound, in place of Ray Data's estimates of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.operators.map_operator import MapOperator
from ray.data._internal.execution.operators.task_pool_map_operator import TaskPoolMapOperator
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data._internal.execution.streaming_executor_state import Topology


def limit_in_flight(context: DataContext, items_per_actor: int) -> None:
    """Have at most so many items under way for each actor, from the start of the first operator to the last one's end.

    Args:
        context: of a data set whose blocks are one item each.
        items_per_actor: so many times the actors that run or start.
    """
    # Ray Data's own policies go by averages of block sizes, and hold a task back, or let it run, accordingly.
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [partial(_InFlight, items_per_actor)])


class _InFlight(BackpressurePolicy):
    def __init__(
        self, items_per_actor: int, data_context: DataContext, topology: Topology, resource_manager: ResourceManager
    ) -> None:
        super().__init__(data_context, topology, resource_manager)
        self._items_per_actor = items_per_actor
        first = next(op for op in topology if any(isinstance(each, InputDataBuffer) for each in op.input_dependencies))
        # Not by the method of a policy: Ray Data passes over policies while nothing runs, as when actors are starting.
        first.can_add_input = partial(self._has_room, first.can_add_input)  # type: ignore[method-assign]

    def can_add_input(self, op: PhysicalOperator) -> bool:
        """Keep to `TaskStep.at_once`."""
        most = op.get_max_concurrency_limit() if isinstance(op, TaskPoolMapOperator) else None
        return most is None or op.num_active_tasks() < most

    def _has_room(self, can_add_input: Callable[[], bool]) -> bool:
        under_way, actors, first = 0, 0, True
        for op, state in self._topology.items():
            if isinstance(op, MapOperator):
                # What waits before the first operator is not read yet.
                under_way += op.num_active_tasks() + (0 if first else state.total_enqueued_input_blocks())
                first = False
                found = op.get_actor_info()
                actors += found.running + found.pending + found.restarting
        return can_add_input() and under_way < self._items_per_actor * max(actors, 1)
