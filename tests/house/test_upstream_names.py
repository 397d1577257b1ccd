"""Names of other libraries that an upgrade may take away: all are listed, and all exist."""

import importlib
import inspect
import sys

import pytest

from tests.house.found_names import overridden, private
from tests.house.sources import modules, room
from tests.house.upstream_names import UPSTREAM_NAMES

LISTED = [
    (place, owner, name)
    for place, owners in UPSTREAM_NAMES.items()
    for owner, names in owners.items()
    for name in names.split()
]


@pytest.mark.parametrize(("place", "owner", "name"), LISTED)
def test_a_listed_name_exists_upstream_and_its_room_uses_it(
    place: str, owner: str, name: str
) -> None:
    module, _, class_name = owner.rpartition(".")
    found = getattr(importlib.import_module(module), class_name)
    assert hasattr(found, name) or f".{name}" in _source(found), f"used by {place}"
    assert any(name in path.read_text() for m, path in modules().items() if room(m) == place)


def test_every_override_and_every_private_attribute_is_listed() -> None:
    assert set(overridden()) <= set(LISTED)
    assert private() <= {(place, name) for place, _, name in LISTED}


def _source(found: type) -> str:
    """Return the files of a class and its bases: attributes may be set outside the class."""
    files = {base.__module__ for base in found.__mro__} - {"builtins"}
    return "".join(inspect.getsource(sys.modules[name]) for name in files)
