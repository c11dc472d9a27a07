"""A model learns: the settings, the loop, its optimisers and schedules, and runs that survive being killed."""
