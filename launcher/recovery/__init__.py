"""A run that is started gets finished: what a failure means, what is done, and its record."""
