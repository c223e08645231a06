"""The `cluster` section of a recipe. Apart from `cluster`, so that recipes are read without importing Ray."""

from pipelines.config import Config, runtime


class ClusterConfig(Config):
    """The Ray cluster to connect to, or to start.

    Args:
        address: address of a running cluster (`auto`, `10.0.0.1:6379`). None takes RAY_ADDRESS, which a submitted job
            has set, or else starts Ray on this machine for the run.
        cpus: logical CPUs of a Ray that is started here, at least 2, so that two workers fit; None takes all cores.
        object_store_mib: size of the object store of a Ray that is started here.
        store_patience_s: how long requests to stores are repeated that fail for reasons that pass, in the driver and
            its workers. None takes LDM_STORE_PATIENCE_S, or else ten minutes.
        wait_for_resources_s: how long a stage waits for the GPUs that it needs.
    """

    address: str | None = runtime(None)
    cpus: int | None = runtime(None, ge=2)
    object_store_mib: int = runtime(512, ge=100)
    store_patience_s: float | None = runtime(None, ge=0)
    wait_for_resources_s: float = runtime(600.0, ge=0)
