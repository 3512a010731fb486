"""Batches: jobs in, a folder of pictures out, that goes on where it was stopped.

jobs, job_files: what is asked for, checked. planning: what of it is missing, in groups that are drawn together.
worker, running: drawing it. folder, report: what lies in the folder, what is derived from it. command: `attnctl batch`.
"""
