"""Measure what a model routes, and what it costs."""
