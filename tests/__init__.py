"""Tests mirror the rooms; this file makes `from tests.factories import …` mean ours and no installed package of that name."""
