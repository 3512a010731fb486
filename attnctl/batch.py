"""Batch generations in Python: `attnctl.batch.run("jobs.yaml", "out")` draws and yields results as they come.

As a module it is the command `attnctl batch`, for launchers: `torchrun --nproc-per-node 2 -m attnctl.batch jobs.yaml`.
"""

from attnctl.app.batch.jobs import Job
from attnctl.app.batch.planning import Plan, Task, plan
from attnctl.app.batch.results import Result
from attnctl.app.batch.running import run

__all__ = ["Job", "Plan", "Result", "Task", "plan", "run"]

if __name__ == "__main__":
    import sys

    from attnctl.app import cli, command

    command.run(cli.app, "attnctl", ["batch", *sys.argv[1:]])
