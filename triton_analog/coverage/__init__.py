"""Which weights of a model are on tiles, which are not and why, and which only look as if they were."""
