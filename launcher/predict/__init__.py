"""Bytes and seconds before any job: memory by phase and component, and step time."""
