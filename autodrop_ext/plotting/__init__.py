"""Pictures of one run, of several runs, and of Algorithm 2."""
