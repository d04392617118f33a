"""Fit the predictor's physical constants to a site's own runs."""
