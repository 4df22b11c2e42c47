"""Our executor, with the shadow memory of a simulator's worker in place of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch

from tests.shadow import BLOCK
from vllm_kvcompress.engine import merging
from vllm_kvcompress.engine.check.ledger import require
from vllm_kvcompress.engine.executor import CompressionExecutor
from vllm_kvcompress.plan import Compress


class Executor(CompressionExecutor):
    """It writes slots where the real one writes tokens."""

    worker: Any  # of the simulator

    def _compress(
        self, group: Any, request_id: str, row: torch.Tensor, directive: Compress
    ) -> None:
        """Copy no numbers, but from and to the right places."""
        worker, (layer,) = self.worker, group.layers
        life, index = worker.lives[request_id], layer.group
        end = directive.num_tokens
        if self._scorers[directive.scorer].needs_queries:
            queries = layer.observation_window.of(request_id, directive.window)
            life.check_window(queries, directive)
        worker.expect(
            row.tolist(), life.held(index)[: end - directive.shift * BLOCK], "source"
        )
        stay = directive.candidates[0] // BLOCK if directive.candidates else 0
        front = tuple(row[:stay].tolist())
        require(directive.destination[:stay] == front, directive, "moves", front)
        worker.fill(life, index, directive, stay)

    def _merge(
        self,
        request_id: str,
        pair: tuple[int, int],
        directives: Mapping[int, Compress],
        rows: Sequence[torch.Tensor],
    ) -> None:
        """The same for two groups."""
        life = self.worker.lives[request_id]

        def merge_layers(scorer: Any, *parts: Any, **sizes: int) -> None:
            self.worker.merge(scorer, life, directives, parts, sizes)

        with patch.object(merging, "merge_layers", merge_layers):
            super()._merge(request_id, pair, directives, rows)
        if life.kept.get(pair[1]) != directives[pair[1]]:
            life.merge(pair, directives)  # no token is left
