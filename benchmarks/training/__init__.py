"""Training runs that compare learning-rate schedules; ``command.py`` is their command."""
