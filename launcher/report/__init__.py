"""Predicted beside measured, for every rank and phase: data, text, tables and pictures."""
