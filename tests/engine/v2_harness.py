"""Boots vLLM's V2 model runner, and asynchronous scheduling, without a GPU.

A test harness, nothing else. vLLM's V2 runner is the default on CUDA and wants
Triton, streams and events; its logic needs none of them to be real. So Triton
kernels are interpreted, streams and events do nothing (everything already runs in
order), and vLLM's CPU platform is made to allow what only GPUs use. All of vLLM's
Python, our plugin, and the kernels' arithmetic are the real ones. CUDA graphs,
real concurrency and CUDA-only attention backends stay out of reach.

`boot` changes the whole process and must come before vLLM is imported: call it in
a process of its own.
"""

import contextlib
import importlib
import os
import types
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Switches:
    """What engines made from now on do.

    Attributes:
        async_scheduling: Schedule a step before the last one's output is known.
        attention: A member of vLLM's ``AttentionBackendEnum``, None = CPU_ATTN.
    """

    async_scheduling: bool = False
    attention: str | None = None


def boot(*, v2: bool) -> Switches:
    """Prepare this process for a model runner; returns its switches."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    if v2:
        _offer_triton()
        _mend_rounding()
        _mend_masks()
    _stub_streams()
    return _loosen_platform()


def _offer_triton() -> None:
    """vLLM takes Triton for usable if exactly one of its drivers is active."""
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def _mend_rounding() -> None:
    """The interpreter loses carries when it rounds to 8-bit floats; torch does not."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def _convert_float(found: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != language.float32 or target != language.float8e4nv:
            return convert(found, source, target, rounding)
        rounded = torch.tensor(found.tolist()).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    interpreter._convert_float = _convert_float


def _mend_masks() -> None:
    """The interpreter makes integers of some truth values, and takes no such mask."""
    from triton.runtime import interpreter

    def with_truth(name: str, place: int) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)

        def masked(*args: Any) -> Any:
            handle = args[place]
            mask = interpreter.TensorHandle(handle.data.astype(bool), handle.dtype)
            return original(*args[:place], mask, *args[place + 1 :])

        setattr(interpreter.InterpreterBuilder, name, masked)

    with_truth("create_masked_load", 2)
    with_truth("create_masked_store", 3)


class _Stream:
    """A stream, in whose order everything runs anyway."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _done

    def record_event(self, *args: Any) -> "_Event":
        return _Event()


class _Event:
    """An event that has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = synchronize = wait = _done

    def query(self) -> bool:
        return True


def _stub_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = _Stream
    cuda.Event = torch.Event = _Event  # type: ignore[misc]
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    # Kernels are chosen by it; interpreted, the newest ones work as well.
    cuda.get_device_capability = lambda *args: (9, 0)
    torch.accelerator.synchronize = lambda *args, **kwargs: None
    torch.accelerator.empty_cache = lambda *args, **kwargs: None


def _loosen_platform() -> Switches:
    """Let vLLM's CPU platform obey the switches."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    switches = Switches()
    platform: Any = CpuPlatform
    check, choose = platform.check_and_update_config, platform.get_attn_backend_cls

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = switches.async_scheduling

    def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
        if switches.attention is None:
            return choose(*args, **kwargs)
        return AttentionBackendEnum[switches.attention].get_path()

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    writer = "vllm.v1.attention.ops.triton_reshape_and_cache_flash"
    # Which GPUs store 8-bit floats; interpreted, every processor does.
    importlib.import_module(writer)._is_supported_kv_cache_dtype = lambda dtype: True
    return switches
