"""Tests mirror the rooms; this file makes `tests.factories` ours, whatever else is installed under that name."""
