from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest

from multicolm import plugins
from multicolm.errors import ConfigError, UnknownNameError
from multicolm.plugins import Registry


def registry(built_in: dict[str, str] | None = None) -> Registry[object]:
    return Registry("policy", "multicolm.tests.nobody", built_in)


class Yes:
    pass


class No:
    pass


def test_a_decorated_class_is_known_by_its_name() -> None:
    known = registry()
    assert known.register("yes")(Yes) is Yes
    assert known.get("yes") is Yes
    assert known.names() == ["yes"] and list(known) == ["yes"]
    assert "yes" in known and "no" not in known and 3 not in known


def test_a_name_that_is_taken_is_refused_with_both_classes() -> None:
    known = registry()
    known.register("yes")(Yes)
    with pytest.raises(ConfigError) as caught:
        known.register("yes")(No)
    assert str(caught.value) == (
        f"policy 'yes' is already registered by {__name__}.Yes; choose another name."
    )


def test_a_class_that_is_defined_anew_takes_the_place_of_the_old_one() -> None:
    known = registry()
    known.register("yes")(Yes)
    again = type("Yes", (), {"__module__": __name__})
    known.register("yes")(again)
    assert known.get("yes") is again


def test_an_address_is_imported_on_first_use() -> None:
    known = registry({"ordered": "collections:OrderedDict", "broken": "no_such_module:Class"})
    assert known.names() == ["broken", "ordered"]
    assert known.get("ordered").__name__ == "OrderedDict"
    with pytest.raises(ModuleNotFoundError):
        known.get("broken")


def test_the_name_of_an_address_cannot_be_taken_by_another_class() -> None:
    known = registry({"yes": f"{__name__}:Yes"})
    known.register("yes")(Yes)
    with pytest.raises(ConfigError, match="policy 'yes' is already"):
        known.register("yes")(No)


def test_an_unknown_name_is_told_the_nearest_one() -> None:
    known = registry()
    known.register("entropy")(Yes)
    with pytest.raises(UnknownNameError) as caught:
        known.get("entrpy")
    assert str(caught.value) == ("unknown policy 'entrpy'. Did you mean 'entropy'? Known: entropy.")


def test_an_installed_package_adds_a_class_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(*, group: str) -> list[EntryPoint]:
        assert group == "multicolm.tests.nobody"
        return [EntryPoint("ordered", "collections:OrderedDict", group)]

    monkeypatch.setattr(plugins, "entry_points", found)
    known = registry()
    known.register("yes")(Yes)
    assert known.names() == ["ordered", "yes"]
    assert known.get("ordered").__name__ == "OrderedDict"


def test_the_built_in_policies_and_backends_are_known_without_being_imported() -> None:
    import subprocess

    code = (
        "import sys, multicolm\n"
        "from multicolm.plugins import backends, policies\n"
        "assert 'cosd-rule' in policies and 'transformers' in backends\n"
        "print('multicolm.policy.cosd' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
