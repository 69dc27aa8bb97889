"""``autodrop demo``: the tasks, the training, and the command."""
