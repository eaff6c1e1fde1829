"""Written training folders, run for real on a CPU: environments of the trainers, tiny models, a probe that reports."""
