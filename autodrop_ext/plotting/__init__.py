"""Pictures of one run, of several runs, and of runs that are measured once per epoch."""
