"""Evaluation data from local files: a table maps (Hub id, subset) to readers that yield the Hub's columns.

    rows = read("cambridgeltl/xcopa", "et", "test", data_dir)      # list of dicts

A data folder holds each set as its authors publish it, as the Hub stores it (<owner>/<name>/<subset>/<split>.jsonl or
<split>-*.parquet), or as a mirror has it; `find` says which form it found and what a mirror's form lacks. Only sets
listed in `TABLE` are read, and nothing is downloaded.
"""

from moe.evaluation.datasets.reading import Source, SplitNotFoundError, find, listed_ids, read, splits_of
from moe.evaluation.datasets.table import TABLE, DataSet, File

__all__ = ["TABLE", "DataSet", "File", "Source", "SplitNotFoundError", "find", "listed_ids", "read", "splits_of"]
