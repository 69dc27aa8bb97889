"""Pictures of one run, and of several."""
