"""`fewbit bench`: activations exact and coded, timed side by side. measure.py times, report.py shows."""
