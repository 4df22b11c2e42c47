"""What the scheduler tells the workers about one step, and what they answer.

The plan travels on vLLM's SchedulerOutput and the report on its
ModelRunnerOutput; both are pickled between processes.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compress:
    """Replace a request's whole blocks in one KV cache group, after the forward.

    Attributes:
        scorer: Which of `KVCompressionConfig.scorers` rates the tokens.
        num_tokens: Tokens computed so far; those behind are left alone.
        end_block: Logical blocks ``[0, end_block)`` are replaced ...
        destination: ... by these physical blocks, filled with the kept tokens.
        shift: Blocks by which the row has been shifted before: it lacks as many
            logical blocks already.
        window: Latest queries that the scorer sees.
        candidates: ``(first, end)`` of the held tokens of which some go, None = of all
            in replaced blocks. Whole blocks in front stay: they are the first of
            ``destination``.
        pruned: The tokens are chosen during the forward, and no more are computed.
        merged_blocks: Of ``destination``, behind what stays, so many blocks hold tokens
            merged with those of another group's layers.
        owner: The group that these belong to, None = this one.
        overflow: More blocks, for tensor-parallel workers whose KV heads keep more than
            the mean of all heads; those that no worker fills go back to the pool.
    """

    scorer: str
    num_tokens: int
    end_block: int
    destination: tuple[int, ...]
    shift: int = 0
    window: int = 0
    candidates: tuple[int, int] | None = None
    pruned: bool = False
    merged_blocks: int = 0
    owner: int | None = None
    overflow: tuple[int, ...] = ()

    @property
    def new_shift(self) -> int:
        """Blocks by which the row is shifted afterwards."""
        return self.end_block - len(self.destination)

    @property
    def freed_blocks(self) -> int:
        """Blocks that go back to the pool, unless heads overflow."""
        borrowed = 0 if self.owner is None else self.merged_blocks
        return self.new_shift - self.shift + borrowed


@dataclass(frozen=True)
class StepPlan:
    """The directive of one step.

    Attributes:
        observe: Request id -> ``(first, end)`` of its tokens in this step that
            belong to an observation window.
        compress: Request id -> KV cache group -> what to do.
        observed: Request id -> how many of its latest queries a coming compression
            wants to see again; the others nobody waits for any more.
        skipped: Reason -> requests left uncompressed since the last plan.
    """

    observe: dict[str, tuple[int, int]] = field(default_factory=dict)
    compress: dict[str, dict[int, Compress]] = field(default_factory=dict)
    observed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.observe or self.compress or self.skipped)


@dataclass
class Counters:
    """Totals since start, and equally the report of one step.

    Tokens and blocks are counted once per request and KV cache group (every
    layer and KV head of a group keeps the same number of tokens).
    """

    compressions: int = 0
    tokens_evicted: int = 0
    tokens_merged: int = 0
    blocks_freed: int = 0
    logical_tokens: int = 0
    retained_tokens: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Counters") -> None:
        """Add another report to these totals."""
        for name in vars(Counters()):
            value = getattr(other, name)
            if name == "skipped":
                for reason, count in value.items():
                    self.skipped[reason] = self.skipped.get(reason, 0) + count
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass
class Report(Counters):
    """What a step's plan came to.

    Attributes:
        overflow: Request id -> KV cache group -> how many blocks of
            `Compress.overflow` some worker has filled.
    """

    overflow: dict[str, dict[int, int]] = field(default_factory=dict)
