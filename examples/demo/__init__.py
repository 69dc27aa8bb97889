"""The demo: small tasks that train on a CPU under six schedules; ``run.py`` runs them."""
