"""Runs arm after arm into its folder; stock first, since others follow its answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ToolError
from .conversation import Outcome, Reference, Rules
from .folder import Folder, Key, Record, key_of
from .metrics import Done, arm_config, metrics
from .plan import STOCK, Arm
from .questions import Item
from .target import Target, Wave
from .tasks import Task


@dataclass
class Runner:
    """All that the arms of one evaluation have in common.

    Attributes:
        root: Folder of the results.
        common: The part of the configuration that all arms share.
        environment: Where this runs.
        tasks: What is asked, by name.
        items: The questions.
        target: Who answers.
        rules: How.
        tokenizer: Of the model.
        references: The beginnings of stock's answers, once there are any.
    """

    root: Path
    common: Record
    environment: Record
    tasks: Mapping[str, Task]
    items: Sequence[Item]
    target: Target
    rules: Rules
    tokenizer: Any
    references: dict[Key, Reference] = field(default_factory=dict)

    def run(self, arm: Arm, report: Callable[[float], None]) -> tuple[Done, bool]:
        """Run an arm to its end, or find that it has been.

        Returns:
            Its configuration and metrics, and whether there was anything to do.

        Raises:
            ToolError: It failed. What was answered before stays.
        """
        with Folder(self.root, arm_config(arm, self.common)) as folder:
            folder.environment(self.environment)
            known = {key_of(line) for line in folder.predictions}
            rest = [item for item in self.items if item.key not in known]
            if arm.method != STOCK and rest:
                self._check_references(rest)
            work = [(item.asked, self.references.get(item.key)) for item in rest]
            report(len(known) / len(self.items))
            if work:
                for wave in self.target.waves(arm, work, self.rules, folder.log):
                    count = len(wave.outcomes)
                    self._append(folder, rest[:count], wave)
                    rest = rest[count:]
                    folder.write_metrics(self._metrics(folder))
                    report(len(folder.predictions) / len(self.items))
            elif not folder.complete:  # stopped after its last answer
                folder.write_metrics(self._metrics(folder))
            report(1.0)
            if arm.method == STOCK:
                self.references = {
                    key: Reference.from_json(line)
                    for key, line in folder.references.items()
                }
            return (folder.config, self._metrics(folder)), bool(work)

    def _check_references(self, rest: Sequence[Item]) -> None:
        if self.rules.fidelity_tokens and any(
            item.key not in self.references for item in rest
        ):
            raise ToolError("not run, since stock's answers are missing")

    def _metrics(self, folder: Folder) -> Record:
        by_depth = self.common["depths"] is not None
        return metrics(folder.predictions, len(self.items), by_depth)

    def _append(self, folder: Folder, items: Sequence[Item], wave: Wave) -> None:
        """Grade a wave and write it."""
        lines = [
            self._prediction(item, outcome)
            for item, outcome in zip(items, wave.outcomes, strict=True)
        ]
        lines[0]["wave"] = {"seconds": round(wave.seconds, 3), "kv": wave.kv}
        references = [
            {**_named(item.key), **outcome["reference"]}
            for item, outcome in zip(items, wave.outcomes, strict=True)
            if "reference" in outcome
        ]
        folder.append(lines, references)

    def _prediction(self, item: Item, outcome: Outcome) -> Record:
        output = self.tokenizer.decode(outcome["tokens"], skip_special_tokens=True)
        return {
            **_named(item.key),
            "depth": item.depth,
            "prompt_tokens": len(item.asked.prompt),
            "answers": list(item.sample.answers),
            "output": output,
            "score": self.tasks[item.sample.task].score(output, item.sample),
            "finish_reason": outcome["finish_reason"],
            "fidelity": outcome.get("fidelity"),
        }


def _named(key: Key) -> Record:
    return dict(zip(("task", "length", "sample"), key, strict=True))
