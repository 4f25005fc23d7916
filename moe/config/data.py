"""Where the text comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive


@dataclass
class MixtureConfig:
    """How often each domain is read: share ~ (multiplier * min(tokens, cap)) ** alpha (Lin et al. 2021)."""

    alpha: float | None = None  # share ~ tokens^alpha: 1 is proportional, 0 equal shares; null: all text is one stream
    multipliers: dict[str, float] = field(default_factory=dict)  # factors on tokens before alpha; 1 if not named
    tokens: dict[str, float] = field(default_factory=dict)  # table of token counts to use instead of this corpus's own
    cap: float | None = None  # most tokens that a domain counts with (examples-proportional mixing)
    max_epochs: float | None = None  # most epochs of a domain; the others get the rest of its share
    replacement: bool = False  # draw every window anew, instead of each once per epoch

    def __post_init__(self) -> None:
        for name, table in (("multipliers", self.multipliers), ("tokens", self.tokens)):
            require_positive(f"data.mixture.{name}", table)
        require_positive("data.mixture", {"cap": self.cap, "max_epochs": self.max_epochs})
        require_not_negative("data.mixture", {"alpha": self.alpha}, "1 is proportional, 0 equal")
        given = [name for name, value in vars(self).items() if name != "alpha" and value]
        if self.alpha is None and given:
            raise ValueError(
                f"data.mixture.{given[0]} needs data.mixture.alpha, which is null: without it all text is one stream "
                f"and has no shares; set it, to 1.0 for shares proportional to tokens"
            )


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    name: str
    path: list[str] = field(default_factory=list)  # with data=text: files, folders, globs; @domain names domains
    sources: dict[str, list[str]] = field(default_factory=dict)  # with data=text: files by domain, beside path
    text_field: str = "text"  # column or key that holds the text in .jsonl and .parquet
    piece_bytes: int = 32768  # .txt files are cut into documents at the first empty line after this many bytes
    text_format: str = "plain"  # plain, or fairseq: line breaks are separators
    tokenizer: str | None = None  # file or folder of a tokenizer; null: train one on the training split
    allow_lossy_tokenizer: bool = False  # accept a given tokenizer that changes text
    tokenizer_type: str = "bpe"  # of the tokenizer that is trained: bpe or unigram
    vocab_size: int = 4096  # of the tokenizer that is trained
    character_coverage: float = 0.9999  # share of characters that get a piece; the rest are encoded as bytes
    vocabulary_alpha: float | None = None  # sample domains ~ tokens^alpha for the tokenizer; null: the text as it is
    seq_len: int | None = None  # tokens per sequence; null: model.max_seq_len
    document_attention: str = "across"  # across documents in a sequence, or within each
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    validation_fraction: float = 0.05  # of the documents
    test_fraction: float = 0.05  # of the documents
    cache_dir: str | None = None  # of prepared corpora; null: $XDG_CACHE_HOME/moe or ~/.cache/moe
    num_workers: int | None = None  # threads that tokenize; null: one per core

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, ("python", "packages", "text"))
        require_choice("data.text_format", self.text_format, ("plain", "fairseq"))
        require_choice("data.tokenizer_type", self.tokenizer_type, ("bpe", "unigram"))
        require_choice("data.document_attention", self.document_attention, ("across", "within"))
        require_positive(
            "data",
            {
                "vocab_size": self.vocab_size,
                "seq_len": self.seq_len,
                "num_workers": self.num_workers,
                "piece_bytes": self.piece_bytes,
            },
        )
        require_fraction("data", {"validation_fraction": self.validation_fraction, "test_fraction": self.test_fraction})
        if self.validation_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                f"data.validation_fraction + data.test_fraction "
                f"({self.validation_fraction} + {self.test_fraction}) must leave text to train on"
            )
        if not 0.0 < self.character_coverage <= 1.0:
            raise ValueError(f"data.character_coverage ({self.character_coverage}) must be above 0 and at most 1")
        require_not_negative("data", {"vocabulary_alpha": self.vocabulary_alpha}, "1 is proportional, 0 equal")
        if self.name == "text" and not self.path and not self.sources:
            raise ValueError("data.path must name at least one file, folder or glob with data=text")
        for key, value in (("path", self.path), ("sources", self.sources)):
            if self.name != "text" and value:
                raise ValueError(
                    f"data.{key} ({value}) applies only with data=text, and this run has data={self.name}: leave it out"
                )
