"""Compute-matched studies: from one YAML file to every run, in order, resumable (docs/scaling_study.md)."""
