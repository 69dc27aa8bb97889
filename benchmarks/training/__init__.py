"""Training runs that compare learning-rate schedules; ``benchmarks/train.py`` is their command."""
