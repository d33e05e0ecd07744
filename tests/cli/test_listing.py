from __future__ import annotations

import json
from importlib.metadata import version

from multicolm import __version__, catalog
from multicolm.plugins import policies


def test_models_are_listed_with_what_is_known_of_them(run) -> None:
    result = run("ls", "models")
    assert (result.code, result.err) == (0, "")
    heading, *lines = result.out.splitlines()
    assert heading.split() == ["name", "parameters", "context", "licence", "summary"]
    assert [line.split()[0] for line in lines] == catalog.names("models")
    assert not any(line.endswith(" ") for line in lines)


def test_ensembles_are_listed_with_their_models(run) -> None:
    result = run("ls", "ensembles")
    assert "tiny " in result.out and "generalist, facts, math" in result.out
    entries = json.loads(run("ls", "ensembles", "--json").out)
    assert [entry["name"] for entry in entries] == catalog.names("ensembles")
    assert entries[0]["models"] == ["generalist", "facts", "math"]


def test_policies_are_listed_with_their_params(run) -> None:
    assert "alpha=0.5, beta=0.5" in run("ls", "policies").out
    entries = json.loads(run("ls", "policies", "--json").out)
    assert [entry["name"] for entry in entries] == [
        *catalog.names("policies"),
        *catalog.names("trained"),
    ]
    [rule] = [entry for entry in entries if entry["name"] == "cosd-rule"]
    assert rule["params"] == {"alpha": 0.5, "beta": 0.5}
    assert "2502.08020" in rule["source"]


def test_a_plug_in_without_a_preset_is_listed_too(run, monkeypatch) -> None:
    monkeypatch.setitem(policies._addresses, "from-elsewhere", "somewhere:Policy")
    entries = json.loads(run("ls", "policies", "--json").out)
    [entry] = [entry for entry in entries if entry["name"] == "from-elsewhere"]
    assert entry["summary"] == "no preset: a plug-in"


def test_one_can_list_nothing_else(run) -> None:
    result = run("ls", "modls")
    assert result.code == 2
    assert "'modls' is not one of 'models', 'ensembles', 'policies'" in result.err


def test_versions_are_those_that_are_installed(run) -> None:
    found = json.loads(run("version", "--json").out)
    assert found["multicolm"] == __version__
    assert found["torch"] == version("torch")
    lines = run("version").out.splitlines()
    assert [line.split()[0] for line in lines] == list(found)


def test_what_is_not_installed_is_said_to_be_missing(run, monkeypatch) -> None:
    from multicolm.cli import version as verb

    monkeypatch.setattr(verb, "_LIBRARIES", ("no-such-library",))
    assert run("version").out.splitlines()[-1] == "no-such-library not installed"
    assert json.loads(run("version", "--json").out)["no-such-library"] is None


def test_validate_prints_what_it_checked(run) -> None:
    result = run("validate", "tiny", "entropy")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "tiny: ok"
    assert lines[1] == "  checked  settings: base model generalist, assistants facts, math"
    assert lines[-2:] == ["entropy: ok", "  checked  policy entropy: kind and params"]


def test_validate_exits_with_two_if_anything_is_wrong(run, tmp_path) -> None:
    file = tmp_path / "duo.yaml"
    file.write_text("base_model: a\nmodels:\n  a: {model: org/name, dtyp: auto}\n")
    result = run("validate", "tiny", str(file))
    assert result.code == 2
    assert f"{file}: not ok\n  error  {file}:3:24: models.a.dtyp: unknown key" in result.out
    first, second = map(json.loads, run("validate", "--json", "tiny", str(file)).out.splitlines())
    assert first["ok"] and not second["ok"]
    assert len(second["errors"]) == 1


def test_validate_warns_of_a_model_that_may_change(run, tmp_path) -> None:
    file = tmp_path / "duo.yaml"
    file.write_text("base_model: a\nmodels:\n  a: {model: org/name}\n")
    result = run("validate", str(file))
    assert result.code == 0
    assert result.out.splitlines()[1:] == [
        "  checked  settings: only a",
        "  checked  policy single: kind, params, the models it speaks of",
        "  checked  model a: org/name was not looked up",
        "  warning  models.a: the Hub id 'org/name' has no `revision`, so its weights may change "
        "under you; pin the commit.",
    ]
