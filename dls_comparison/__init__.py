"""Comparing ways to pre-train: a YAML file -> cells -> their results -> tables. reproduce.py is its command."""
