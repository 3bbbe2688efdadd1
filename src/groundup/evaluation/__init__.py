"""Runs a task over a split, streamed; intervals, before and after, the report."""
