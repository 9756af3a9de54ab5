"""What notebooks and prompts show: tables that hold what the text holds, and no arrays."""

import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
import zoo
from specs import SPECS

import jaxpeft
from jaxpeft.methods import lora, vera
from jaxpeft.spec import name_of
from jaxpeft.table import html_table

BASE = {"layers": {"up": {"kernel": jnp.ones((6, 64, 96))}, "down": {"kernel": jnp.ones((6, 96, 64))}}}
SITES = jaxpeft.find(BASE, ".*", layouts={".*": "lio"})


class Cells(HTMLParser):
    """The caption and the rows of a table; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.caption = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "caption":
            self.caption += data


def test_html_is_escaped():
    cells = Cells(html_table([("a<b>", "&"), ("1", "x")], "<caption>"))
    assert cells.rows == [["a<b>", "&"], ["1", "x"]]
    assert cells.caption == "<caption>"


@pytest.mark.parametrize("of", ["sites", "summary"])
def test_html_holds_what_the_text_holds(of):
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2), SITES)
    shown = SITES if of == "sites" else jaxpeft.summary(adapter)
    cells = Cells(shown._repr_html_())
    lines = str(shown).splitlines()[of == "summary" :]
    assert [" ".join(filter(None, row)) for row in cells.rows] == [re.sub(r"  +", " ", line) for line in lines[:-1]]
    assert lines[-1] in cells.caption


def test_an_adapter_is_told_without_its_arrays():
    adapter = jaxpeft.init(jax.random.key(0), lora.Spec(rank=2, rslora=True), SITES)
    count = 2 * 6 * 2 * (64 + 96)
    assert (
        repr(adapter) == str(adapter) == f"Adapter(lora(rslora=True, rank=2), 2 groups, {count:,} trained parameters)"
    )
    cells = Cells(adapter._repr_html_())
    assert cells.caption == repr(adapter)
    assert cells.rows[1] == ["layers/down/kernel", "6", "96", "64", "a 6x2x96, b 6x2x64", f"{count // 2:,}"]
    shapes = jax.eval_shape(lambda: adapter)
    assert repr(shapes) == repr(adapter)
    assert "no arrays" in repr(jax.tree.map(lambda leaf: None if leaf is None else "place", adapter))


def test_what_all_groups_share_is_a_row():
    adapter = jaxpeft.init(jax.random.key(0), vera.Spec(rank=4), SITES)
    assert [row[0] for row in Cells(adapter._repr_html_()).rows[1:]] == list(adapter.params)


@pytest.mark.parametrize("name", SPECS)
def test_every_method_is_told(name):
    """Its arguments are those that differ from their defaults, and the parameters are all there."""
    made = zoo.MODELS["plain scanned"]()
    sites = jaxpeft.find(made.params, made.pattern)
    adapter = jax.eval_shape(lambda: jaxpeft.init(jax.random.key(0), SPECS[name], sites, made.params))
    assert repr(adapter).startswith(f"Adapter({name_of(SPECS[name])}(")
    rows = Cells(adapter._repr_html_()).rows[1:]
    assert sum(int(row[-1].replace(",", "")) for row in rows) == jaxpeft.count(adapter)
