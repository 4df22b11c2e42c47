"""vLLM's workers, building their model and runner for compression."""

import dataclasses
import functools
from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from ..config import KEY, KVCompressionConfig
from . import backend
from .layers import compress_layers, scale_share
from .runner import compress_runner

# vLLM's worker -> ours; ours are made on demand, since the GPU's needs CUDA.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "CompressedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "CompressedGPUWorker",
}


class _Worker:
    """Mixed into one of vLLM's worker classes."""

    def init_device(self: Any) -> None:
        super().init_device()  # type: ignore[misc]
        settings = self.vllm_config.additional_config[KEY]
        compress_runner(self.model_runner, KVCompressionConfig.from_dict(settings))

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        with backend.registered():
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        compress_layers(self.vllm_config, self.model_runner.drafting_layers())

    def determine_available_memory(self: Any) -> int:
        """vLLM's bytes, less those of the factors beside merged pages."""
        available: int = super().determine_available_memory()  # type: ignore[misc]
        return int(available / (1 + scale_share(self.vllm_config)))

    def kv_compression_stats(self: Any) -> dict[str, Any]:
        """Totals since start, for ``LLM.collective_rpc``."""
        return dataclasses.asdict(self.model_runner.compression.totals)


@functools.cache
def _derive(name: str) -> type:
    path = next(path for path, ours in WORKERS.items() if ours == name)
    derived = type(name, (_Worker, resolve_obj_by_qualname(path)), {})
    derived.__module__ = __name__
    return derived


def __getattr__(name: str) -> type:
    if name not in WORKERS.values():
        raise AttributeError(name)
    return _derive(name)
