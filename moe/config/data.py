"""Where the text comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_choice, require_fraction, require_positive


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    name: str
    path: list[str] = field(default_factory=list)  # files, folders and globs of data=text
    text_field: str = "text"  # the column or key that holds the text in .jsonl and .parquet
    tokenizer: str | None = None  # a sentencepiece model file; None trains one on the training split
    tokenizer_type: str = "bpe"
    vocab_size: int = 4096  # of the tokenizer that is trained; a given tokenizer brings its own
    seq_len: int | None = None  # model.max_seq_len
    document_attention: str = "across"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    cache_dir: str | None = None  # $XDG_CACHE_HOME/moe or ~/.cache/moe
    num_workers: int | None = None  # one per core

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, ("python", "packages", "text"))
        require_choice("data.tokenizer_type", self.tokenizer_type, ("bpe", "unigram"))
        require_choice("data.document_attention", self.document_attention, ("across", "within"))
        require_positive(
            "data", {"vocab_size": self.vocab_size, "seq_len": self.seq_len, "num_workers": self.num_workers}
        )
        require_fraction("data", {"validation_fraction": self.validation_fraction, "test_fraction": self.test_fraction})
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"data.validation_fraction + data.test_fraction "
                f"({self.validation_fraction} + {self.test_fraction}) must leave text to train on"
            )
        if self.name == "text" and not self.path:
            raise ValueError("data.path must name at least one file, folder or glob with data=text")
        if self.name != "text" and self.path:
            raise ValueError(f"data.path ({self.path}) is read only with data=text; this run has data={self.name}")
