"""How much device memory stays free: what the measured runs needed beyond their prediction."""

from __future__ import annotations

SAFETY_FRACTION = 0.063
"""Share of the device's memory (0-1) that no plan uses.

The most that a measured run needed beyond its prediction, as a share of the smallest device that
holds it, over the finished runs of ``benchmarks/results/`` (122 on one H100, 29 on two H200, driver
580) whose settings the planner chooses by itself. ``benchmarks/safety_margin.py`` prints it, run by
run; a test holds this number to it.
"""
