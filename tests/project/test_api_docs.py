"""The API reference is the docstrings: `make docs` renders every public name with all of its words."""

from __future__ import annotations

import html
import inspect
import re
import shlex
from pathlib import Path

import pytest

pdoc = pytest.importorskip("pdoc", reason="renders the API reference; it comes with the extra `dev`")

import moe.layers  # noqa: E402 - what is rendered; without pdoc there is nothing to import it for

ROOT = Path(__file__).parents[2]

# a NamedTuple's annotations are strings that pdoc cannot resolve in the constructor it makes up for them
pytestmark = pytest.mark.filterwarnings("ignore:Error parsing type annotation:UserWarning")


def make_docs() -> list[str]:
    """The words of the command behind `make docs`."""
    (command,) = re.findall(r"^docs:\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return shlex.split(command)


def modules() -> list[str]:
    return [word for word in make_docs() if word.startswith("moe.")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` writes, written elsewhere."""
    words = make_docs()
    folder = tmp_path_factory.mktemp("docs")
    pdoc.render.configure(docformat=words[words.index("-d") + 1])
    pdoc.pdoc(*modules(), output_directory=folder)
    return folder


def words_of(text: str) -> str:
    """Letters, digits and underscores: what remains of a docstring when it becomes HTML."""
    return re.sub(r"\W", "", text)


def documented(page: str, name: str) -> str:
    """The text of the docstring of a name on a rendered page; empty if it has none."""
    section = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert section is not None, f"{name} is not on the page"
    docstring = re.search(r'<div class="docstring">(.*?)</div>', section[1], re.DOTALL)
    return "" if docstring is None else html.unescape(re.sub(r"<[^>]*>", "", docstring[1]))


@pytest.mark.parametrize("name", moe.layers.__all__)
def test_every_public_name_of_the_layers_has_its_docstring(pages: Path, name: str) -> None:
    own = inspect.getdoc(getattr(moe.layers, name))
    assert own
    assert words_of(documented((pages / "moe/layers.html").read_text(encoding="utf-8"), name)) == words_of(own)


def test_arguments_and_methods_are_shown(pages: Path) -> None:
    page = (pages / "moe/layers.html").read_text(encoding="utf-8")
    for anchor in ("MoE.__init__", "MoE.forward", "TopKRouter.update_bias", "Routing.kept", "Router.replay"):
        assert f'id="{anchor}"' in page, anchor
    assert "eval_capacity_factor" in re.sub(r"<details.*?</details>|<pre>.*?</pre>", "", page, flags=re.DOTALL)


def test_every_module_of_the_command_is_written(pages: Path) -> None:
    assert {"moe.layers", "moe.kernels"} <= set(modules())
    for module in modules():
        assert (pages / f"{module.replace('.', '/')}.html").is_file(), module


def test_every_kernel_is_written(pages: Path) -> None:
    kernels = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/op.py"))
    assert len(kernels) >= 4
    for name in kernels:
        assert (pages / f"moe/kernels/{name}.html").is_file(), name


def test_what_is_built_is_not_committed() -> None:
    words = make_docs()
    folder = words[words.index("-o") + 1].split("/")[0]
    assert f"{folder}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_missing_word_is_seen() -> None:
    page = '<section id="f"><div class="docstring"><p>one <code>two</code></p></div></section>'
    assert words_of(documented(page, "f")) == words_of("one `two`") != words_of("one `two` three")
    with pytest.raises(AssertionError, match="g is not on the page"):
        documented(page, "g")
