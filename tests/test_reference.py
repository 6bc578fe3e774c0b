"""The reference pages are those that the code generates, and leave nothing out."""

import subprocess
import sys

import pytest

from mythos_jax.config import Config
from mythos_jax.reference import DOCS, _sections, cli_page, config_page, field_descriptions
from mythos_jax.typed import annotated_hints


@pytest.mark.parametrize(("name", "make"), [("config.md", config_page), ("cli.md", cli_page)])
def test_a_page_is_what_the_code_generates(name, make):
    assert (DOCS / name).read_text() == make(), "run `python -m mythos_jax.reference`"


@pytest.mark.parametrize("section", list(_sections(Config)), ids=lambda section: section.section or "config")
def test_every_field_has_a_description(section):
    descriptions = field_descriptions(section)
    assert list(descriptions) == list(annotated_hints(section))
    for name, hint in annotated_hints(section).items():
        if not hasattr(hint, "section"):
            assert len(descriptions[name]) > 5, name


def test_fields_and_flags_are_on_their_pages():
    """A bound, an exception to one, a description on the line above, one beside the field; a flag of a subcommand."""
    page = config_page()
    assert "| `spike_factor` | a number > 1, or 0 for none | `0.0` | a loss above this multiple of" in page
    assert "| `attention` | `gqa`, `mla` | `gqa` | grouped-query attention" in page
    assert (
        "| `mean_loops` | an integer >= 1, or null | `null` | mean of the distribution (default: model.loops) |" in page
    )
    assert "## training.depth\n" in page
    flag = "| `--held-out-fraction F` | fraction of documents held out; of a single document, its end (default 0.05) |"
    assert flag in cli_page()
    assert "    mythos convert SRC DST --to FORMAT [flags]\n" in cli_page()


def test_the_pages_are_made_without_jax():
    code = "import sys; sys.modules['jax'] = None; from mythos_jax.reference import *; config_page(); cli_page()"
    subprocess.run([sys.executable, "-c", code], check=True)
