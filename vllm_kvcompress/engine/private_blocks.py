"""Where the private blocks of compressed requests come from, and emptied ones go."""

from collections.abc import Iterator, Mapping

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from ..methods.base import Scorer
from ..plan import Compress, Report, StepPlan
from .course import Course
from .manager import CompressedKVManager


class PrivateBlocks:
    """Trades a request's blocks for fewer private ones, in all of its groups."""

    def __init__(
        self,
        managers: Mapping[int, CompressedKVManager],
        owners: Mapping[int, int],
        pool: BlockPool,
        workers: int,
    ) -> None:
        """Set up.

        Args:
            managers: Of the groups that are compressed.
            owners: Group -> the group whose blocks it borrows when layers merge.
            pool: vLLM's.
            workers: That share out the KV heads of a layer.
        """
        self._managers, self._owners = managers, owners
        self._pool, self._workers = pool, workers

    def trade(
        self, request_id: str, course: Course, scorer: Scorer
    ) -> dict[int, Compress]:
        """Plan the groups for which private blocks can be had.

        Args:
            request_id: A running request.
            course: Its groups that are planned lose their target; the rest must wait.
            scorer: What it is compressed with.
        """
        planned: dict[int, Compress] = {}
        owners = self._owners if scorer.merges else {}
        workers = self._workers if scorer.uneven else 1
        for group in list(course.targets):
            if group in owners.values():
                continue  # with the group that borrows its blocks
            groups = [owners[group], group] if group in owners else [group]
            for done, directive in self._obtain(
                request_id, course, groups, workers
            ).items():
                planned[done] = directive
                del course.targets[done]
        return planned

    def _obtain(
        self, request_id: str, course: Course, groups: list[int], workers: int
    ) -> dict[int, Compress]:
        """Plan one group, or an owner of blocks and who borrows them; or neither."""
        found: dict[int, list[KVCacheBlock]] = {}
        for group in groups:
            manager, target = self._managers[group], course.targets[group]
            private = manager.reserve(request_id, target, workers)
            if private is None:
                for earlier, blocks in found.items():
                    target = course.targets[earlier]
                    self._managers[earlier].release(request_id, target, blocks)
                return {}
            found[group] = private
        planned, shared = {}, list[KVCacheBlock]()
        for group, private in found.items():
            manager, target = self._managers[group], course.targets[group]
            planned[group] = manager.compress(
                request_id,
                course.scorer,
                course.due,
                target,
                shared + private,
                window=course.window,
                # The lowest layers compute all tokens, and lose theirs afterwards.
                pruned=course.prune and manager.kv_cache_spec.tier[0] > 0,
                owner=groups[0] if target.borrows else None,
            )
            shared = private[: target.merged_blocks]
        return planned

    def give_back(self) -> int:
        """Give back what the last plan emptied, and say how many blocks."""
        count = 0
        for manager in self._managers.values():
            emptied = manager.take_pending()
            self._pool.free_blocks(emptied)
            count += len(emptied)
        return count

    def settle(self, plan: StepPlan, report: Report) -> Iterator[tuple[str, int, int]]:
        """Give back of a plan's overflow what no worker has filled.

        Yields:
            A request, a group, and how many blocks of the overflow it holds now.
        """
        for request_id, groups in report.overflow.items():
            for group, used in groups.items():
                directive = plan.compress[request_id][group]
                if self._managers[group].settle(request_id, directive, used):
                    yield request_id, group, used
