"""What is wrong with a job file: a fault in one row, and the error that tells of all of them."""

from attnctl.errors import AttnctlError


class Fault(Exception):
    """What is wrong, and where below or beside the row."""

    def __init__(self, said: str, place: str = ""):
        self.said, self.place = said, place


class JobError(AttnctlError):
    """What is wrong with a job file, one line for each fault, each with its place."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        super().__init__(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))
