"""What a study found: figures and tables from the files that its runs left (docs/scaling_study.md)."""
