"""What result folders hold, checked: the files' fields, and the folders themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STOCK = "stock"
FLOOR = "random"


class _Record(BaseModel):
    """A record of a file; fields that we do not know are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Fidelity(_Record):
    """How near the output is to stock's; see the page's definitions."""

    agreement: float
    kl: float
    tokens: int


class Prediction(_Record):
    """One line of predictions.jsonl."""

    task: str
    length: int
    depth: float | None = None
    sample: int
    answers: list[str] = []
    output: str
    score: float
    fidelity: Fidelity | None = None


class TaskResult(_Record):
    """The accuracy of some samples."""

    accuracy: float
    samples: int


class Cell(TaskResult):
    """The accuracy at one length and depth."""

    task: str
    length: int
    depth: float | None = None


class KV(_Record):
    """What compression did, from the plugin's counters."""

    kept_share: float
    compressions: int = 0
    tokens_evicted: int = 0
    blocks_freed: int = 0


class Metrics(TaskResult):
    """metrics.json."""

    complete: bool = True
    by_task: dict[str, TaskResult]
    cells: list[Cell] = []
    fidelity: Fidelity | None = None
    kv: KV | None = None
    seconds: float | None = None

    def of_task(self, task: str) -> float | None:
        """The accuracy of one task, if it was asked."""
        return self.by_task[task].accuracy if task in self.by_task else None


class EvalConfig(_Record):
    """config.json of an arm of `kvcompress eval`."""

    schema_: Literal[1] = Field(alias="schema")
    model: str
    arm: str
    label: str
    settings: dict[str, Any] | None = None
    budget: int | None = None
    keep_ratio: float | None = None
    depths: list[float] | None = None
    question: Literal["inside", "outside"] = "inside"
    group: str


class Run(_Record):
    """One line of runs.jsonl: vLLM's result, and what was counted beside it."""

    kind: Literal["serve", "throughput"]
    arm: str
    method: str | None = None
    model_id: str | None = None
    dataset: str = ""
    input_len: int | None = None
    output_len: int | None = None
    max_concurrency: int | None = None
    request_rate: float | None = None
    output_throughput: float | None = None
    median_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    median_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None
    running_peak: float | None = None
    kv_usage_peak: float | None = None
    preemptions: float | None = None
    failed: int = 0
    logical_tokens: float | None = None
    retained_tokens: float | None = None
    repeats: int = 1

    @property
    def kept_share(self) -> float | None:
        """Tokens held after compression over those before, if there was any."""
        if not self.logical_tokens or self.retained_tokens is None:
            return None
        return self.retained_tokens / self.logical_tokens

    @property
    def case(self) -> tuple:
        """What was asked for, apart from how much of it at once."""
        return (self.kind, self.dataset, self.input_len, self.output_len)

    @property
    def load(self) -> tuple:
        """How much was asked for at once."""
        return (self.max_concurrency, self.request_rate)


@dataclass(frozen=True)
class Arm:
    """One result folder of `kvcompress eval`."""

    folder: str
    config: EvalConfig
    metrics: Metrics
    predictions: Sequence[Prediction]
    environment: dict[str, Any]

    @property
    def label(self) -> str:
        """What it is called."""
        return self.config.label

    @property
    def method(self) -> str:
        """The method, or ``stock``."""
        return self.config.arm

    @property
    def kept_share(self) -> float | None:
        """Tokens held after compression over those before, if it was measured."""
        if self.metrics.kv:
            return self.metrics.kv.kept_share
        return 1.0 if self.method == STOCK else None


@dataclass(frozen=True)
class Group:
    """Arms that answered the same questions, stock first."""

    arms: Sequence[Arm]

    @property
    def stock(self) -> Arm | None:
        """The arm that nothing was compressed in."""
        return next((arm for arm in self.arms if arm.method == STOCK), None)

    @property
    def title(self) -> str:
        """The model, and what it was asked."""
        tasks = (
            ", ".join(self.tasks) if len(self.tasks) < 5 else f"{len(self.tasks)} tasks"
        )
        questions = " and ".join(sorted({arm.config.question for arm in self.arms}))
        return f"{self.arms[0].config.model}: {tasks}, question {questions}"

    @property
    def tasks(self) -> list[str]:
        """All tasks, in order of appearance."""
        return list(dict.fromkeys(t for arm in self.arms for t in arm.metrics.by_task))


@dataclass(frozen=True)
class BenchFolder:
    """One result folder of `kvcompress bench`; repeated runs are their medians."""

    folder: str
    config: dict[str, Any]
    runs: Sequence[Run]
    environment: dict[str, Any]

    @property
    def model(self) -> str:
        """The model that was run."""
        return self.config.get("model") or self.runs[0].model_id or "a model"

    @property
    def cases(self) -> set[tuple]:
        """All traffic that was sent."""
        return {run.case for run in self.runs}

    @property
    def setting(self) -> tuple:
        """What must be the same for runs to be shown in one picture."""
        engine = {**(self.config.get("engine") or {}), "max_model_len": None}
        machine = [self.environment.get(key) for key in ("vllm", "cpu", "accelerator")]
        return (self.model, str(sorted(engine.items())), *machine)


@dataclass(frozen=True)
class Bench:
    """Result folders of the same model and machine, of which each has its traffic."""

    folders: Sequence[BenchFolder]

    @property
    def model(self) -> str:
        """The model that was run."""
        return self.folders[0].model

    @property
    def title(self) -> str:
        """The model, and where its results are."""
        first, *others = self.folders
        more = f" and {len(others)} more" if others else ""
        return f"{self.model}: {first.folder}{more}"

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for own in self.folders for run in own.runs]

    @property
    def arms(self) -> list[str]:
        """All arms, those of stock first."""
        methods = self.methods
        return sorted(methods, key=lambda a: (a != STOCK, a != methods[a], methods[a]))

    @property
    def methods(self) -> dict[str, str]:
        """Each arm's method; an arm without one stands for itself."""
        return {run.arm: run.method or run.arm for run in self.runs}


@dataclass
class Results:
    """All that was read, and what is wrong with it."""

    groups: list[Group] = field(default_factory=list)
    benches: list[Bench] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
