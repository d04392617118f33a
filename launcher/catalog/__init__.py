"""Facts as data files: models and GPUs, each entry with its source."""
