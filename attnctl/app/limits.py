"""The most that a command or a recipe may ask for: more is a slip, or a file that means harm."""

LARGEST = 8192  # pixels of a side
THREADS = 1024
STEPS = 10_000
JOBS = 100_000  # of a file
GROUP = 64  # pictures drawn at once
