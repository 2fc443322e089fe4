"""What a run will need: memory and time of its stages, from the shapes of the model alone."""
