"""The composition root: which leaves there are, in which order things start and stop, and in which process."""
