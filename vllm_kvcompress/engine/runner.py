"""Model runners that carry out the scheduler's plan.

A worker's runner object is given a class derived from its own, so other runners
in the process stay vLLM's.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

from ..config import KEY, KVCompressionConfig
from ..plan import Report, StepPlan
from . import compat
from .connectors import await_step
from .executor import CompressionExecutor

logger = init_logger("vllm.plugins.kv_compression")


def compress_runner(runner: Any, config: KVCompressionConfig) -> None:
    """Turn a model runner, V1 or V2, into one that compresses."""
    base = type(runner)
    use_v2 = runner.vllm_config.use_v2_model_runner
    compat.check_runner(use_v2)
    version = RunnerV2 if use_v2 else RunnerV1
    runner.__class__ = type(f"Compressed{base.__name__}", (version, base), {})
    runner._answers = get_pp_group().is_last_rank and get_tp_group().is_first_rank
    runner.compression = CompressionExecutor(config, torch.device(runner.device))


class _Runner:
    """What both runners share; the base class is vLLM's runner."""

    compression: CompressionExecutor
    _plan: StepPlan | None = None
    _answers = True
    _read_row: Any
    _write_row: Any

    def drafting_layers(self: Any) -> set[str]:
        """Names of layers that are not the model's own, but a draft model's."""
        drafts = self.vllm_config.speculative_config
        if drafts is None or not drafts.uses_draft_model():
            return set()
        own = {*self.get_model().modules()}
        layers = self.vllm_config.compilation_config.static_forward_context
        return {name for name, layer in layers.items() if layer not in own}

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        vllm_config = self.vllm_config
        self.compression.bind(
            self.kv_cache_config,
            vllm_config.compilation_config.static_forward_context,
            vllm_config.scheduler_config.max_num_seqs,
        )
        for index, groups in enumerate(self.attn_groups):
            row_shift = self.compression.row_shift(index)
            for builder in (b for g in groups for b in g.metadata_builders):
                if row_shift is not None and not hasattr(builder, "row_shift"):
                    raise RuntimeError(
                        f"{KEY}: {type(builder).__name__} would not see compression"
                    )
                builder.row_shift = row_shift
        self.compression.bind_pruner(
            self.get_model(),
            {
                i: groups[0].metadata_builders[0]
                for i, groups in enumerate(self.attn_groups)
                if groups
            },
        )

    def execute_model(
        self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._plan = getattr(scheduler_output, "kv_compression", None)
        await_step(scheduler_output, self.device)
        try:
            return super().execute_model(  # type: ignore[misc]
                scheduler_output, *args, **kwargs
            )
        except BaseException:
            # vLLM samples nevertheless, and then reports this error, not ours.
            self.compression.drop_plan()
            raise
        finally:
            self._plan = None
            self.compression.end_forward()

    @contextlib.contextmanager
    def _unless_failed(self) -> Iterator[None]:
        """Let no error pass unheard: vLLM reads what one of all workers answers."""
        try:
            yield
        except Exception:
            if self._answers:
                raise
            logger.exception("KV compression failed in this worker, which ends here")
            raise SystemExit(1) from None

    def _observes(self) -> bool:
        """Whether queries must be seen in this step: full CUDA graphs hide them."""
        return self._plan is not None and bool(self._plan.observe)

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample first: compression is then off the time to first token."""
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        with self._unless_failed():
            report = self.compression.finish_step(self._read_row, self._write_row)
        # What stages but the last answer is one object, and goes nowhere.
        if not report.compressions or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _Reported(output, report)
        output.kv_compression = report
        return output


class RunnerV1(_Runner):
    """Over vLLM's V1 runner, whose batch rows move."""

    def get_kv_cache_spec(self: Any) -> dict[str, Any]:
        """A draft model's layers come first: it reads the first group's rows."""
        specs: dict[str, Any] = super().get_kv_cache_spec()  # type: ignore[misc]
        drafting = self.drafting_layers()
        return dict(sorted(specs.items(), key=lambda item: item[0] not in drafting))

    def _update_states(self: Any, scheduler_output: Any) -> Any:
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        preempted = scheduler_output.preempted_req_ids or ()
        for request_id in {*scheduler_output.finished_req_ids, *preempted, *resumed}:
            self.compression.forget(request_id)
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _determine_batch_execution_and_padding(
        self: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Keep a last chunk of one token off the full CUDA graphs of decodes."""
        if self._observes():
            kwargs["force_uniform_decode"] = False
        return super()._determine_batch_execution_and_padding(  # type: ignore[misc]
            *args, **kwargs
        )

    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any
    ) -> Any:
        with self._unless_failed():
            self.compression.begin_step(
                self._plan, self.input_batch.req_ids, num_scheduled_tokens
            )
        return super()._prepare_inputs(  # type: ignore[misc]
            scheduler_output, num_scheduled_tokens
        )

    def _table_row(self: Any, group: int, request_id: str) -> Any:
        row = self.input_batch.req_id_to_index[request_id]
        return self.input_batch.block_table[group].get_numpy_array()[row]

    def _read_row(
        self: Any, group: int, request_id: str, first: int, end: int
    ) -> torch.Tensor:
        row = torch.from_numpy(self._table_row(group, request_id)[first:end])
        return row.to(self.device, torch.long)

    def _write_row(
        self: Any, group: int, request_id: str, first: int, blocks: tuple[int, ...]
    ) -> None:
        entries = slice(first, first + len(blocks))
        self.requests[request_id].block_ids[group][entries] = blocks
        self._table_row(group, request_id)[entries] = blocks


class RunnerV2(_Runner):
    """Over vLLM's V2 runner, whose requests have stable slots."""

    def gather_batch_req_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep a last chunk of one token off the full CUDA graphs of decodes."""
        state, uniform_tokens = super().gather_batch_req_state(  # type: ignore[misc]
            *args, **kwargs
        )
        return state, None if self._observes() else uniform_tokens

    def _remove_request(self: Any, req_id: str) -> bool:
        self.compression.forget(req_id)
        return super()._remove_request(req_id)  # type: ignore[misc]

    def prepare_attn(self: Any, input_batch: Any) -> Any:
        """vLLM calls this for real batches only."""
        with self._unless_failed():
            self.compression.begin_step(
                self._plan, input_batch.req_ids, input_batch.num_scheduled_tokens
            )
        return super().prepare_attn(input_batch)  # type: ignore[misc]

    def _read_row(
        self: Any, group: int, request_id: str, first: int, end: int
    ) -> torch.Tensor:
        slot = self.req_states.req_id_to_index[request_id]
        return self.block_tables.block_tables[group].gpu[slot, first:end].long()

    def _write_row(
        self: Any, group: int, request_id: str, first: int, blocks: tuple[int, ...]
    ) -> None:
        # At once, not by `stage_write`: staged writes land together in no order,
        # so they could undo the row of a request that takes over this slot.
        slot = self.req_states.req_id_to_index[request_id]
        table = self.block_tables.block_tables[group].gpu
        entries = torch.tensor(blocks, dtype=table.dtype)
        table[slot, first : first + len(blocks)] = entries.to(
            table.device, non_blocking=True
        )


class _Reported(AsyncModelRunnerOutput):
    """An output still on its way, to which the step's report is added."""

    def __init__(self, output: AsyncModelRunnerOutput, report: Report) -> None:
        self._output = output
        self._report = report

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        output.kv_compression = self._report  # type: ignore[attr-defined]
        return output
