"""The demo: small tasks that train on a CPU under four schedules; ``run.py`` runs them."""
