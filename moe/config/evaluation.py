"""How a run is validated and sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config.checks import require_not_negative, require_positive


@dataclass
class EvalConfig:
    """Validation during training, the final figures and the text samples."""

    every: int | None = None  # steps between validations; null: only at the end
    max_tokens: int | None = None  # per domain, while training; null: the whole split
    prompts: list[str] = field(default_factory=list)  # of samples.txt; empty: one sample without a prompt
    sample_tokens: int = 128  # length of each sample; less where the model has no further positions
    temperature: float = 0.8  # of the samples; 0 is greedy
    top_p: float = 0.95  # of the samples: nucleus probability

    def __post_init__(self) -> None:
        require_positive(
            "eval", {"every": self.every, "max_tokens": self.max_tokens, "sample_tokens": self.sample_tokens}
        )
        require_not_negative("eval", {"temperature": self.temperature}, "0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"eval.top_p ({self.top_p}) must be above 0 and at most 1")
