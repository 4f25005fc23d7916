"""A study's findings: figures and tables from the files its runs left (docs/scaling_study.md)."""
