"""Models: metadata of a file to a configuration, tensors to parameters, and the pure `step`."""
