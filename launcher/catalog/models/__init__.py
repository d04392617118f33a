"""One JSON file per model: the config facts that fix its tensors, with sources."""
