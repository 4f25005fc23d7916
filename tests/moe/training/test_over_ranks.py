from __future__ import annotations

import warnings

import pytest

from moe.training.over_ranks import without_view_warning


def test_only_the_warning_of_the_whole_model_is_silenced() -> None:
    text = "FSDP2-wrapped module ({}) returned a view tensor. An in-place op on this view"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with without_view_warning():
            warnings.warn(text.format("FSDPTransformer"), stacklevel=1)
            with pytest.raises(UserWarning, match="FSDPTransformerLayer"):
                warnings.warn(text.format("FSDPTransformerLayer"), stacklevel=1)
        with pytest.raises(UserWarning, match="FSDPTransformer"):
            warnings.warn(text.format("FSDPTransformer"), stacklevel=1)
