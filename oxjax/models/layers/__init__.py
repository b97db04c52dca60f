"""Layers of models: pure functions, with their static facts in frozen specs."""
