"""A driver with a Ray of its own, to be killed: `python -m tests.pipelines.training.driver FOLDER`."""

import sys
from pathlib import Path

import ray

from pipelines.cluster import ClusterConfig, connect
from tests.pipelines.training import toy

if __name__ == "__main__":
    ray.cloudpickle.register_pickle_by_value(toy)
    with connect(ClusterConfig(cpus=2)):
        toy.Run(Path(sys.argv[1])).fit()
