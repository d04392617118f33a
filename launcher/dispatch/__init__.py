"""Run jobs: the only package that starts processes."""
