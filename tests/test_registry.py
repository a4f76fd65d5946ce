"""Configured objects from names and texts, and back."""

import pytest

from helpers.refusals import refuses
from isthmus.average import AVERAGES
from isthmus.errors import InputError
from isthmus.match import METHODS
from isthmus.registry import configure_text, spell


@pytest.mark.parametrize("name", METHODS)
def test_a_method_as_usual_is_spelt_by_its_name(name):
    method = configure_text("method", name, METHODS)
    assert spell(method) == name
    assert configure_text("method", spell(method), METHODS) == method


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("cca?gamma=0.1", "cca?gamma=0.1"),
        ("orthogonal_matching?start=activations&max-sweeps=0", "orthogonal_matching?max_sweeps=0&start=activations"),
        ("orthogonal_matching?invertible=true&restarts=3", "orthogonal_matching?invertible=true"),
    ],
)
def test_options_that_are_not_the_usual_ones_are_spelt_out(text, spelt):
    method = configure_text("method", text, METHODS)
    assert set(spell(method).partition("?")[2].split("&")) == set(spelt.partition("?")[2].split("&"))
    assert configure_text("method", spell(method), METHODS) == method


def test_averages_are_spelt_alike():
    assert spell(configure_text("average", "ties?density=0.5", AVERAGES)) == "ties?density=0.5"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cca?gamma", "'gamma' is not a new key=value"),
        ("cca?gamma=1&gamma=2", "'gamma=2' is not a new key=value"),
        ("cca?gama=1", "cca has no option 'gama' .did you mean 'gamma'"),
        ("ca?gamma=1", "no method 'ca' .did you mean 'cca'"),
    ],
)
def test_what_is_misspelt_is_refused(text, told):
    with refuses(InputError, told):
        configure_text("method", text, METHODS)
