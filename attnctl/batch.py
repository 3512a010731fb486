"""Batch generations in Python: `attnctl.batch.run("jobs.yaml", "out")` draws and yields results as they come."""

from attnctl.app.batch import Plan, Result, Task, plan, run
from attnctl.app.jobs import Job

__all__ = ["Job", "Plan", "Result", "Task", "plan", "run"]
