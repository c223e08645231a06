"""The global state of PyTorch that a test could leave behind for the tests after it."""

from typing import Any

# Far from the small seeds that tests give their networks: inputs must not be the numbers that the weights are made of.
SEED = 20220413


def torch_state() -> dict[str, Any]:
    """Return every global setting that can change what a later test computes, by name; random numbers aside."""
    import torch

    backends = torch.backends
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of float32 products": torch.get_float32_matmul_precision(),
        "oneDNN": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "cuDNN": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        # There is no getter: half of the smallest normal number is zero where denormal numbers are flushed.
        "denormal numbers flushed": not torch.full((4,), torch.finfo(torch.float32).tiny).mul(0.5).any(),
    }
