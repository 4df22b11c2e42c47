"""What can be asked: texts with a question and its answers, by name."""

from .base import Sample, Task
from .needle import NEEDLE

TASKS: dict[str, Task] = {task.name: task for task in (NEEDLE,)}

__all__ = ["TASKS", "Sample", "Task"]
