"""Decision trees: their files, what they decide, and how they are learned."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from pydantic import ValidationError
from sklearn.tree import DecisionTreeClassifier
from tables import random_table

import multicolm
from multicolm import Ensemble
from multicolm.errors import ArtefactError, CapabilityError, TrainingError
from multicolm.policy.base import Needs, When
from multicolm.policy.cosd_tree import CosdTreePolicy
from multicolm.policy.tree import MAX_DEPTH, AssistantSplit, Feature, Leaf, Node, Split, Tree
from multicolm.score_table import ScoreTable
from multicolm.testing import check_policy, check_routing
from multicolm.training.checkpoint import Checkpoint
from multicolm.views import ModelNames, View, Views

FEATURES: tuple[Feature, ...] = get_args(Feature)
NAMES = ("left", "my model: #1", 'a "b"\\', "caf\u00e9\u2028")
KEEP, REPLACE = Leaf(False, 0.0), Leaf(True, 1.0)
ODD_NUMBERS = (0.1, 1 / 3, 0.5, 5e-324, -0.0, 1e300, -1e300, math.nextafter(0.5, 1), 0.7)


def random_node(chance: random.Random, depth: int, features: Sequence[str] = FEATURES) -> Node:
    if depth == 0 or chance.random() < 0.1:
        return Leaf(chance.random() < 0.5, chance.choice([0.25, 0.5, chance.random()]))
    threshold = chance.choice([*ODD_NUMBERS, *(chance.random() for _ in range(9))])
    below, above = (random_node(chance, depth - 1, features) for _ in range(2))
    if chance.random() < 0.2:
        names = chance.sample(NAMES, k=chance.randint(1, len(NAMES)))
        return AssistantSplit(tuple(names), below, above)
    return Split(chance.choice(features), threshold, below, above)


def thresholds_of(node: Node) -> set[float]:
    if isinstance(node, Leaf):
        return set()
    if isinstance(node, AssistantSplit):
        return thresholds_of(node.among) | thresholds_of(node.others)
    return {node.threshold} | thresholds_of(node.below) | thresholds_of(node.above)


def points(tree: Tree, seed: int, n: int = 300) -> torch.Tensor:
    """Random places, and float32 numbers on both sides of every threshold."""
    chance = random.Random(seed)
    exact = torch.tensor(sorted(thresholds_of(tree.content)), dtype=torch.float64)
    near = exact.float().tolist()
    around = torch.tensor([x for x in near if math.isfinite(x)] or [0.5])
    infinity = torch.tensor(math.inf)
    edges = torch.cat(
        [around, torch.nextafter(around, infinity), torch.nextafter(around, -infinity)]
    ).tolist()
    rows = [
        [
            *(chance.choice([chance.random(), chance.choice(edges)]) for _ in tree.used),
            *(float(chance.random() < 0.5) for _ in tree.groups),
        ]
        for _ in range(n)
    ]
    return torch.tensor(rows).reshape(n, len(tree.used) + len(tree.groups))


def leaves_of(node: Node) -> list[Leaf]:
    if isinstance(node, Leaf):
        return [node]
    assert isinstance(node, Split)
    return leaves_of(node.below) + leaves_of(node.above)


def answer(node: Node, row: dict[Any, float]) -> Leaf:
    """What a tree says at one place, by definition; 0 is an assistant of a group."""
    while not isinstance(node, Leaf):
        if isinstance(node, AssistantSplit):
            node = node.others if row[node.assistants] else node.among
        else:
            node = node.below if row[node.feature] <= node.threshold else node.above
    return node


class TestDeciding:
    @pytest.mark.parametrize("seed", range(20))
    def test_all_places_at_once_get_what_each_gets_by_definition(self, seed: int) -> None:
        tree = Tree(random_node(random.Random(seed), seed % 6))
        seen = points(tree, seed)
        decided = tree.decide(seen)
        asked = [*tree.used, *tree.groups]
        leaves = [answer(tree.content, dict(zip(asked, row, strict=True))) for row in seen.tolist()]
        assert decided.replace.tolist() == [leaf.replace for leaf in leaves]
        assert torch.equal(decided.probability, torch.tensor([x.probability for x in leaves]))
        torch.testing.assert_close(decided.log_odds, decided.probability.logit())

    @pytest.mark.parametrize("seed", range(20))
    def test_what_may_replace_is_what_replaces_for_some_values_of_the_rest(self, seed: int) -> None:
        # Each feature is asked about once, so every combination of answers can come about.
        def node(names: list[Feature]) -> Node:
            if not names:
                return Leaf(chance.random() < 0.3, 0.5)
            half = len(names[1:]) // 2
            rest = names[1 : 1 + half], names[1 + half :]
            return Split(names[0], chance.random(), node(rest[0]), node(rest[1]))

        chance = random.Random(seed)
        halves = (node(chance.sample(FEATURES, k=7)) for _ in range(2))
        whole = AssistantSplit(("left",), *halves)
        for name, half in (("left", whole.among), ("right", whole.others)):
            self.check_what_may_replace(Tree(whole), Tree(half), name)

    @staticmethod
    def check_what_may_replace(whole: Tree, tree: Tree, assistant: str) -> None:
        """``tree`` is what ``whole`` is for this assistant."""
        assert whole.can_replace(assistant) == any(leaf.replace for leaf in leaves_of(tree.content))
        known: dict[str, torch.Tensor] = {
            name: torch.rand(50) for name in FEATURES if name.endswith("_draft")
        }
        others = [name for name in FEATURES if name not in known]
        some = torch.zeros(50, dtype=torch.bool)
        for number in range(2 ** len(others)):
            rest = {
                name: torch.full((50,), 2.0 if number >> i & 1 else -1.0)
                for i, name in enumerate(others)
            }
            some |= tree.decide(torch.stack([{**known, **rest}[n] for n in tree.used], -1))[0]
        here = torch.device("cpu")
        assert torch.equal(whole.may_replace(known, 50, here, assistant=assistant), some)
        # A leaf's log-odds are 0 here: more is asked for than any has.
        assert torch.equal(whole.may_replace(known, 50, here, assistant=assistant, least=0.0), some)
        dear = whole.may_replace(known, 50, here, assistant=assistant, least=1e-6)
        assert not bool(dear.any())

    def test_the_features_in_use_are_those_that_are_asked_about(self) -> None:
        who = AssistantSplit(("b", "a"), Split("p_draft", 0.5, KEEP, REPLACE), KEEP)
        tree = Tree(Split("agreement", 0.5, KEEP, who))
        assert (tree.used, tree.groups) == (("p_draft", "agreement"), (("b", "a"),))
        assert (Tree(KEEP).used, Tree(KEEP).groups) == ((), ())


class TestJson:
    @pytest.mark.parametrize("seed", range(10))
    def test_a_tree_is_read_as_it_was_written(self, seed: int, tmp_path: Path) -> None:
        node = random_node(random.Random(seed), 5)
        saved = Tree(node).save(tmp_path / "tree.json")
        assert saved.path == tmp_path / "tree.json"
        assert Tree.read(tmp_path / "tree.json") == node

    def test_counts_are_kept(self, tmp_path: Path) -> None:
        node = Split("p_draft", 0.5, Leaf(True, 0.75, 8, 6), Leaf(False, 0.0, 5, 0))
        Tree(node).save(tmp_path / "tree.json")
        assert Tree.read(tmp_path / "tree.json") == node

    def test_equal_trees_give_equal_bytes_that_a_person_can_read(self, tmp_path: Path) -> None:
        node = Split("p_draft", 0.5, Leaf(True, 1.0, 4, 4), Leaf(False, 0.0))
        Tree(node).save(tmp_path / "one.json")
        Tree(tmp_path / "one.json").save(tmp_path / "two.json")
        text = (tmp_path / "one.json").read_text()
        assert text == (tmp_path / "two.json").read_text()
        assert text.endswith("}\n")
        assert json.loads(text) == {
            "format": 1,
            "tree": {
                "feature": "p_draft",
                "threshold": 0.5,
                "below": {
                    "replace": True,
                    "probability": 1.0,
                    "samples": 4,
                    "assistant_right": 4,
                },
                "above": {"replace": False, "probability": 0.0},
            },
        }
        assert list(json.loads(text)["tree"]) == ["above", "below", "feature", "threshold"]

    def test_only_a_tree_that_asks_for_the_assistant_has_a_new_format(self, tmp_path: Path) -> None:
        node = AssistantSplit(("left", "right"), REPLACE, KEEP)
        for number, content in ((1, Split("p_draft", 0.5, REPLACE, KEEP)), (2, node)):
            Tree(content).save(tmp_path / f"{number}.json")
            assert json.loads((tmp_path / f"{number}.json").read_text())["format"] == number
            assert Tree.read(tmp_path / f"{number}.json") == content
        assert json.loads((tmp_path / "2.json").read_text())["tree"] == {
            "assistants": ["left", "right"],
            "among": {"replace": True, "probability": 1.0},
            "others": {"replace": False, "probability": 0.0},
        }

    @pytest.mark.parametrize(
        ("assistants", "said"),
        [
            ("left", "tree.assistants: must be a list, got 'left'."),
            ([1], "tree.assistants.0: must be text, got 1; put it in quotes."),
            ([], "tree: a question about the assistant names one or more, each once; got"),
            (["a", "a"], "tree: a question about the assistant names one or more, each once; got"),
        ],
    )
    def test_a_question_for_the_assistant_names_some(
        self, assistants: Any, said: str, tmp_path: Path
    ) -> None:
        leaf = {"replace": False, "probability": 0.0}
        tree = {"assistants": assistants, "among": leaf, "others": leaf}
        (tmp_path / "tree.json").write_text(json.dumps({"format": 2, "tree": tree}))
        with pytest.raises(ArtefactError) as caught:
            Tree.read(tmp_path / "tree.json")
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"above": None}, "tree.above: must be a mapping, got nothing."),
            ({"feature": "p_drafts"}, "tree: unknown feature 'p_drafts'. Did you mean 'p_draft'?"),
            ({"feature": ["p_draft"]}, "tree.feature: must be text, got a list."),
            ({"threshold": math.nan}, "tree.threshold: must be a finite number, got nan."),
            ({"threshold": math.inf}, "tree.threshold: must be a finite number, got inf."),
            ({"threshold": 10**400}, "tree.threshold: must be a number, got 1000"),
            ({"threshold": "0.5"}, "tree.threshold: must be a number, got '0.5'."),
            ({"threshold": True}, "tree.threshold: must be a number, got true."),
            ({"belov": 1}, "tree: unknown key 'belov'. Did you mean 'below'?"),
            ({"below": {"replace": True}}, "tree.below: needs replace, probability; 'proba"),
            (
                {"below": {"replace": 1, "probability": 0.5}},
                "tree.below.replace: must be true or false, got 1.",
            ),
            (
                {"below": {"replace": True, "probability": 1.5}},
                "tree.below: probability must be from 0 to 1, got 1.5.",
            ),
            (
                {"below": {"replace": True, "probability": 1, "sample": 2}},
                "tree.below: unknown key 'sample'. Did you mean 'samples'?",
            ),
            (
                {"below": {"replace": True, "probability": 1, "samples": 2.0}},
                "tree.below.samples: must be a whole number, got 2.0.",
            ),
            (
                {"below": {"replace": True, "probability": 1, "samples": 2}},
                "tree.below: samples and assistant_right must be there both or neither",
            ),
            (
                {"below": {"replace": True, "probability": 1, "samples": 2, "assistant_right": 3}},
                "assistant_right from 0 to samples; got 2 and 3.",
            ),
            ({"below": []}, "tree.below: must be a mapping, got a list."),
        ],
    )
    def test_a_damaged_tree_is_refused_with_its_place(
        self, change: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        leaf = {"replace": False, "probability": 0.0}
        good = {"feature": "p_draft", "threshold": 0.5, "below": leaf, "above": leaf}
        path = tmp_path / "tree.json"
        path.write_text(json.dumps({"format": 1, "tree": good}))
        assert Tree(path).content == Split("p_draft", 0.5, KEEP, KEEP)
        path.write_text(json.dumps({"format": 1, "tree": {**good, **change}}))
        with pytest.raises(ArtefactError) as caught:
            Tree(path).content  # noqa: B018  # reading is the test
        assert str(caught.value).startswith(f"{path}: ")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("key", ["feature", "threshold", "below", "above"])
    def test_a_split_lacks_nothing(self, key: str, tmp_path: Path) -> None:
        leaf = {"replace": False, "probability": 0.0}
        split = {"feature": "p_draft", "threshold": 0.5, "below": leaf, "above": leaf}
        del split[key]
        outer = {"feature": "p_draft", "threshold": 0.5, "below": leaf, "above": split}
        path = tmp_path / "tree.json"
        path.write_text(json.dumps({"format": 1, "tree": outer}))
        with pytest.raises(ArtefactError) as caught:
            Tree.read(path)
        assert str(caught.value) == (
            f"{path}: tree.above: needs feature, threshold, below, above; '{key}' is missing."
        )

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is no JSON"),
            ('{"format": 1', "is no JSON"),
            ("[]", "the file: must be a mapping, got a list."),
            ('{"tree": {}}', "the file: needs format, tree; 'format' is missing."),
            (
                '{"format": 3, "tree": {}}',
                "format must be 1 or 2, got 3; a newer multicolm may read",
            ),
            ('{"format": true, "tree": {}}', "format: must be a whole number, got true."),
            ('{"format": 1, "format": 1, "tree": {}}', "the key 'format' is there twice"),
            ("[" * 100_000, "deeper than 32 questions"),
        ],
    )
    def test_what_is_no_tree_file_is_refused(self, text: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "tree.json"
        path.write_text(text)
        with pytest.raises(ArtefactError) as caught:
            Tree.read(path)
        assert str(path) in str(caught.value)
        assert said in str(caught.value)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "tree.json").write_bytes(b"\xff\xfe{}")
        with pytest.raises(ArtefactError, match=r"cannot be read .* is it whole"):
            Tree.read(tmp_path / "tree.json")

    @pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 300])
    def test_a_tree_of_too_many_questions_is_refused(self, depth: int, tmp_path: Path) -> None:
        data: dict[str, Any] = {"replace": True, "probability": 1.0}
        leaf = {"replace": False, "probability": 0.0}
        for _ in range(depth):
            data = {"feature": "p_draft", "threshold": 0.5, "below": data, "above": leaf}
        (tmp_path / "tree.json").write_text(json.dumps({"format": 1, "tree": data}))
        path = tmp_path / "tree.json"
        if depth == MAX_DEPTH:
            assert Tree(path).content.depth == MAX_DEPTH
            return
        with pytest.raises(ArtefactError, match="deeper than 32 questions") as caught:
            Tree.read(path)
        assert str(caught.value).startswith(f"{path}:")

    def test_too_many_questions_are_refused_in_python_too(self) -> None:
        node: Node = REPLACE
        for _ in range(MAX_DEPTH):
            node = Split("p_draft", 0.5, node, KEEP)
        with pytest.raises(ArtefactError, match="deeper than 32 questions"):
            Split("p_draft", 0.5, node, KEEP)

    def test_a_file_of_another_kind_is_refused_and_a_missing_one_too(self, tmp_path: Path) -> None:
        (tmp_path / "tree.yaml").write_text("keep")
        with pytest.raises(ArtefactError, match=r"a tree is a \.json file"):
            Tree.read(tmp_path / "tree.yaml")
        with pytest.raises(ArtefactError, match="is missing; keep a checkpoint's files together"):
            Tree(tmp_path / "none.json").used  # noqa: B018  # reading is the test


class TestText:
    def test_a_tree_reads_as_lines_of_if_and_else(self) -> None:
        inner = Split("p_assistant", 0.61, Leaf(False, 0.25, 4, 1), Leaf(True, 0.75, 8, 6))
        tree = Tree(Split("p_draft", 0.53, inner, KEEP))
        assert tree.as_text().splitlines()[2:] == [
            "# p_draft: probability of the base model's most likely token.",
            "# p_assistant: probability of the assistant's most likely token.",
            "if p_draft <= 0.53:",
            "    if p_assistant <= 0.61: keep 0.25  # assistant right: 1 of 4",
            "    else: replace 0.75  # assistant right: 6 of 8",
            "else: keep 0.0",
        ]
        assert all(line.startswith("# ") for line in tree.as_text().splitlines()[:2])

    def test_a_question_for_the_assistant_reads_as_a_list_of_names(self) -> None:
        inner = AssistantSplit(("math", "my model"), REPLACE, KEEP)
        assert Tree(AssistantSplit(("facts",), Leaf(False, 0.25), inner)).as_text().splitlines()[
            2:
        ] == [
            'if assistant in ["facts"]: keep 0.25',
            "else:",
            '    if assistant in ["math", "my model"]: replace 1.0',
            "    else: keep 0.0",
        ]

    @pytest.mark.parametrize("suffix", [".txt", ".tree"])
    def test_text_which_0_1_read_too_is_refused_with_what_to_give_instead(
        self, suffix: str, tmp_path: Path
    ) -> None:
        tree, path = Tree(Split("p_draft", 0.5, REPLACE, KEEP)), tmp_path / f"mine{suffix}"
        path.write_text(tree.as_text())
        with pytest.raises(ArtefactError, match=r"only shown now; give the tree\.json"):
            Tree.read(path)
        with pytest.raises(ArtefactError, match="only shown now"):
            tree.save(path)


# ---- the policy


class AlwaysLooking(CosdTreePolicy):
    """The same, except that assistants are run everywhere."""

    assistants: ClassVar[When] = "always"

    def needs(self, models: ModelNames) -> Needs:
        needs = super().needs(models)
        return Needs({**needs.always, **needs.deferred}, {})


BASE, LEFT, RIGHT, LAST = (
    random_table(name, seed) for seed, name in enumerate(("base", "left", "right", "last"))
)
PROMPTS = ["a", "b c", " c", "df", " cab", " ea"]


def written(ensemble: Ensemble, policy: Any, **settings: Any) -> list[list[tuple[int, str]]]:
    answers = ensemble.generate(PROMPTS, policy, max_new_tokens=16, seed=0, **settings)
    return [[(token.id, token.model) for token in answer.trace] for answer in answers]


def ids(ensemble: Ensemble, policy: Any, **settings: Any) -> list[list[int]]:
    return [[token for token, _ in text] for text in written(ensemble, policy, **settings)]


def ran(ensemble: Ensemble, policy: Any) -> int:
    """Tokens that assistants read."""
    answers = ensemble.generate(PROMPTS, policy, max_new_tokens=16, seed=0)
    return sum(answer.usage[name].tokens_read for answer in answers for name in ensemble.models[1:])


def likely_tree(seed: int) -> Tree:
    """A tree whose thresholds fall among what the random tables show."""
    chance = random.Random(seed)

    def node(depth: int) -> Node:
        if depth == 0:
            return Leaf(chance.random() < 0.5, chance.choice([0.25, 0.75, 0.75, 1.0]))
        name = chance.choice(FEATURES)
        top = 200 if name == "position" else 1.8 if name.startswith("entropy") else 0.9
        return Split(name, chance.uniform(0.1, top), node(depth - 1), node(depth - 1))

    return Tree(node(3))


class TestSelecting:
    @pytest.mark.parametrize("n_models", [1, 2, 3, 5])
    @pytest.mark.parametrize("seed", range(6))
    def test_the_writer_is_the_one_of_the_definition(self, seed: int, n_models: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, vocab = 200, 5
        scale = torch.rand(n_models, n, 1, generator=generator) * 5
        logits = torch.randn(n_models, n, vocab, generator=generator) * scale
        if n_models > 2:
            logits[2] = logits[1]  # ties in leaf and in sureness
        tree = likely_tree(seed)
        names = ModelNames([f"m{k}" for k in range(n_models)])
        shown = {k: View(logits[k]) for k in range(n_models)}
        views = Views(names, shown, n_positions=n, context={"place": lambda: torch.arange(n)})
        policy = CosdTreePolicy(tree=tree)
        got = policy.select(views).tolist()
        for i in range(n):
            p = logits[:, i].softmax(-1)
            tops = p.argmax(-1).tolist()
            candidates = []
            for k in range(1, n_models):
                row = {
                    "agreement": sum(top == tops[k] for top in tops) / n_models,
                    "position": float(i),
                    **{f"p_{r}": float(shown[j].top1_probs[i]) for r, j in roles(k)},
                    **{f"entropy_{r}": float(shown[j].entropy_nats[i]) for r, j in roles(k)},
                    **{f"margin_{r}": float(shown[j].margins[i]) for r, j in roles(k)},
                }
                leaf = answer(tree.content, row)
                if leaf.replace and tops[k] != tops[0]:
                    candidates.append((leaf.probability, float(p[k].max()), -k))
            assert got[i] == (-max(candidates)[2] if candidates else 0)

    @pytest.mark.parametrize("feature", FEATURES)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_a_tree_on_any_feature_keeps_the_laws(self, feature: Feature, seed: int) -> None:
        check_policy(CosdTreePolicy(tree=Tree(Split(feature, 0.5, REPLACE, KEEP))), seed=seed)
        check_policy(CosdTreePolicy(tree=Tree(Split(feature, 0.5, KEEP, REPLACE))), seed=seed)

    @pytest.mark.parametrize("seed", range(2))
    def test_how_models_are_run_changes_nothing(self, seed: int) -> None:
        policy = CosdTreePolicy(tree=likely_tree(seed))
        check_policy(policy)
        check_routing(Ensemble([BASE, LEFT, RIGHT]), PROMPTS[:3], policy, max_new_tokens=12)

    def test_a_tree_that_always_keeps_is_the_base_alone_and_runs_no_assistant(self) -> None:
        duo, policy = Ensemble([BASE, LEFT]), CosdTreePolicy(tree=Tree(KEEP))
        assert written(duo, policy) == written(Ensemble([BASE]), "single")
        assert ran(duo, policy) == 0

    @pytest.mark.parametrize("assistant", [LEFT, RIGHT])
    def test_a_tree_that_always_replaces_is_the_one_assistant(self, assistant: Any) -> None:
        duo, policy = Ensemble([BASE, assistant]), CosdTreePolicy(tree=Tree(REPLACE))
        assert ids(duo, policy) == ids(Ensemble([assistant]), "single")
        assert ids(duo, policy) != ids(Ensemble([BASE]), "single")

    def test_a_tree_that_always_replaces_is_the_rule_without_a_condition(self) -> None:
        rule = {"kind": "cosd-rule", "params": {"alpha": 2.0, "beta": 0.0}}
        quartet, policy = Ensemble([BASE, LEFT, RIGHT, LAST]), CosdTreePolicy(tree=Tree(REPLACE))
        assert written(quartet, policy) == written(quartet, rule)
        writers = {name for text in written(quartet, policy) for _, name in text}
        assert writers >= set(quartet.models[1:])

    @pytest.mark.parametrize("alpha", [0.4, 0.6])
    def test_a_tree_on_the_base_alone_is_the_rule_with_beta_0(self, alpha: float) -> None:
        rule = {"kind": "cosd-rule", "params": {"alpha": alpha, "beta": 0.0}}
        tree = Tree(Split("p_draft", math.nextafter(alpha, 0), REPLACE, KEEP))  # p < alpha
        trio = Ensemble([BASE, LEFT, RIGHT])
        assert written(trio, CosdTreePolicy(tree=tree)) == written(trio, rule)
        assert ran(trio, CosdTreePolicy(tree=tree)) == ran(trio, rule)

    def test_a_base_model_without_assistants_writes_alone(self) -> None:
        solo = Ensemble([BASE])
        assert written(solo, CosdTreePolicy(tree=Tree(REPLACE))) == written(solo, "single")

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("n_models", [2, 3, 5])
    def test_running_assistants_only_where_it_matters_changes_nothing(
        self, seed: int, n_models: int
    ) -> None:
        models = [BASE, LEFT, RIGHT, LAST, random_table("more", 9)][:n_models]
        ensemble, tree = Ensemble(models), likely_tree(seed)
        for temperature in (0.0, 0.8):
            plain = written(ensemble, AlwaysLooking(tree=tree), temperature=temperature)
            for way in ({"schedule": "stepwise"}, {"schedule": "block", "block_size": 4}):
                deferred = CosdTreePolicy(tree=tree)
                assert written(ensemble, deferred, temperature=temperature, **way) == plain

    def test_assistants_are_not_run_where_the_base_is_too_sure(self) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        sure = Split("p_draft", 0.4, Split("p_assistant", 0.3, KEEP, REPLACE), KEEP)
        lazy, eager = (kind(tree=Tree(sure)) for kind in (CosdTreePolicy, AlwaysLooking))
        assert written(trio, lazy) == written(trio, eager) != written(Ensemble([BASE]), "single")
        assert 0 < ran(trio, lazy) < ran(trio, eager)

    def test_models_are_asked_for_what_the_tree_asks_about(self) -> None:
        def needs(node: Node) -> Needs:
            return CosdTreePolicy(tree=Tree(node)).needs(ModelNames(["a", "b", "c"]))

        top1 = frozenset({"top1"})
        assert needs(REPLACE) == Needs({0: top1}, {1: top1, 2: top1})
        inner = Split("entropy_assistant", 0.5, KEEP, REPLACE)
        both = top1 | {"logprobs"}
        assert needs(Split("margin_draft", 0.5, KEEP, inner)) == Needs(
            {0: top1 | {"topk"}}, {1: both, 2: both}
        )

    def test_the_score_is_the_base_models_probability(self) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        [answer] = trio.generate(["a"], CosdTreePolicy(tree=Tree(KEEP)), max_new_tokens=5)
        for token in answer.trace:
            assert token.score == pytest.approx(math.exp(token.logprob), rel=1e-5)

    def test_an_assistant_that_no_leaf_lets_replace_is_not_run(self) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        tree = Tree(AssistantSplit(("left",), KEEP, REPLACE))
        policy = CosdTreePolicy(tree=tree)
        assert policy.uses(trio.models) == {0, 2}
        answers = trio.generate(PROMPTS, policy, max_new_tokens=16, seed=0)
        assert all(answer.usage["left"].forwards == 0 for answer in answers)
        assert written(trio, policy) == written(trio, AlwaysLooking(tree=tree))
        assert written(trio, policy) == written(
            Ensemble([BASE, RIGHT]), CosdTreePolicy(tree=Tree(REPLACE))
        )
        asks_all = Tree(AssistantSplit(("left",), KEEP, Split("agreement", 0.5, KEEP, REPLACE)))
        assert CosdTreePolicy(tree=asks_all).uses(trio.models) == {0, 1, 2}

    def test_each_assistant_is_run_only_where_the_tree_may_let_it_replace(self) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        unsure = Split("p_draft", 0.35, REPLACE, KEEP)
        tree = Tree(AssistantSplit(("left",), unsure, Split("p_draft", 0.6, REPLACE, KEEP)))
        answers = trio.generate(PROMPTS, CosdTreePolicy(tree=tree), max_new_tokens=16, seed=0)
        forwards = {
            name: sum(answer.usage[name].forwards for answer in answers) for name in trio.models
        }
        assert 0 < forwards["left"] < forwards["right"] < forwards["base"]
        assert written(trio, CosdTreePolicy(tree=tree)) == written(trio, AlwaysLooking(tree=tree))

    def test_assistants_are_known_by_their_place_where_the_ensemble_calls_them_otherwise(
        self,
    ) -> None:
        tree = Tree(AssistantSplit(("b",), REPLACE, KEEP))
        policy = CosdTreePolicy(tree=tree, made_for={"a": "", "c": "", "b": ""})
        assert policy.uses(ModelNames(["base", "left", "right"])) == {0, 2}

    def test_a_tree_that_asks_for_somebody_else_is_refused(self) -> None:
        tree = Tree(AssistantSplit(("middle",), REPLACE, KEEP))
        with pytest.raises(CapabilityError) as caught:
            Ensemble([BASE, LEFT, RIGHT]).generate(["a"], CosdTreePolicy(tree=tree))
        assert str(caught.value) == (
            "the tree of this 'cosd-tree' policy asks for assistant 'middle', and the assistants "
            "are left, right; correct the tree, or train another."
        )

    def test_without_a_tree_it_says_how_to_get_one(self) -> None:
        with pytest.raises(CapabilityError) as caught:
            Ensemble([BASE, LEFT]).generate(["a"], "cosd-tree")
        assert str(caught.value) == (
            "policy 'cosd-tree' has not learned anything yet; train one with `multicolm train "
            "ENSEMBLE SCORES --policy cosd-tree --out CHECKPOINT` and use `policy: ./CHECKPOINT`."
        )

    def test_params_out_of_range_are_refused(self) -> None:
        for params in (
            {"max_depth": 0},
            {"max_depth": MAX_DEPTH + 1},
            {"min_samples_leaf": 0},
            {"features": ()},
            {"features": ("p_drafts",)},
        ):
            with pytest.raises(ValidationError):
                CosdTreePolicy(**params)  # type: ignore[arg-type]


class TestCosts:
    """``cost_weight`` takes the assistants' costs off a leaf's log-odds."""

    TREE = Tree(
        Split("p_draft", 0.4, Leaf(True, 0.9), Split("p_draft", 0.6, Leaf(True, 0.6), KEEP))
    )

    def test_the_dearer_it_is_the_fewer_tokens_are_handed_over(self) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        dear = {
            weight: CosdTreePolicy(tree=self.TREE, cost_weight=weight)
            for weight in (0.0, 0.4, 0.5, 2.0, 3.0)  # the log-odds are 0.405 and 2.197
        }
        texts = {weight: written(trio, policy) for weight, policy in dear.items()}
        assert texts[0.0] == texts[0.4] != texts[0.5] == texts[2.0] != texts[3.0]
        assert texts[3.0] == written(Ensemble([BASE]), "single")
        assert ran(trio, dear[2.0]) > 0 == ran(trio, dear[3.0])

    @pytest.mark.parametrize(("seed", "cost_weight"), [(0, 0.405465108), (1, 0.5), (2, 1.0)])
    def test_running_assistants_only_where_it_matters_changes_nothing(
        self, seed: int, cost_weight: float
    ) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        tree = self.TREE if seed == 0 else likely_tree(seed)
        lazy, eager = (
            kind(tree=tree, cost_weight=cost_weight) for kind in (CosdTreePolicy, AlwaysLooking)
        )
        assert written(trio, lazy) == written(trio, eager)
        check_policy(lazy, seed=seed)

    def test_of_two_candidates_the_cheaper_writes_unless_the_other_is_as_much_better(self) -> None:
        # Log-odds of 2.2 and 0.85; "right" costs 3 more.
        tree = Tree(AssistantSplit(("right",), Leaf(True, 0.9), Leaf(True, 0.7)))
        logits = torch.eye(3)[:, None] * 5
        views = Views(
            ModelNames(["base", "left", "right"]),
            {k: View(logits[k]) for k in range(3)},
            n_positions=1,
            costs=[1.0, 1.0, 4.0],
        )
        writers = {
            weight: int(CosdTreePolicy(tree=tree, cost_weight=weight).select(views))
            for weight in (0.0, 0.4, 0.5, 0.8, 0.9)
        }
        assert writers == {0.0: 2, 0.4: 2, 0.5: 1, 0.8: 1, 0.9: 0}

    def test_a_negative_weight_is_refused(self) -> None:
        with pytest.raises(ValidationError):
            CosdTreePolicy(cost_weight=-0.1)


def roles(k: int) -> list[tuple[str, int]]:
    return [("draft", 0), ("assistant", k)]


# ---- learning


def table(
    top1: Sequence[Sequence[int]],
    gold: Sequence[int],
    probs: Sequence[Sequence[float]],
    *,
    known: Sequence[Sequence[bool]] | None = None,
    names: Sequence[str] | None = None,
) -> ScoreTable:
    n, m = len(top1), len(top1[0])
    logprobs = torch.tensor(probs, dtype=torch.float64).log().float()
    return ScoreTable(
        models=ModelNames(names or [f"m{k}" for k in range(m)]),
        gold_ids=torch.tensor(gold),
        gold_logprobs=torch.full((n, m), -1.0),
        known=torch.ones(n, m, dtype=torch.bool) if known is None else torch.tensor(known),
        top1_ids=torch.tensor(top1),
        top1_logprobs=logprobs,
        entropies=-logprobs,
        margins=logprobs.exp() / 2,
        example=torch.arange(n) % 3,
        place=torch.arange(n) // 3,
        base={},
    )


def random_scores(
    seed: int, n: int = 600, m: int = 3, names: Sequence[str] | None = None
) -> ScoreTable:
    """Scores where a model that is surer is right more often, with some positions unknown."""
    chance = random.Random(seed)
    top1, gold, probs, known = [], [], [], []
    for _ in range(n):
        gold.append(chance.randrange(5))
        sure = [chance.uniform(0.05, 1) for _ in range(m)]
        top1.append([gold[-1] if chance.random() < p else chance.randrange(5) for p in sure])
        probs.append(sure)
        known.append([chance.random() < 0.95 for _ in range(m)])
    return table(top1, gold, probs, known=known, names=names)


def by_hand(scores: ScoreTable, features: Sequence[str]) -> tuple[list[list[float]], list[int]]:
    """What is learned from, position by position: features, and 1 where the assistant is right."""
    rows, labels = [], []
    for k in range(1, scores.n_models):
        for i in range(len(scores)):
            ids, gold = scores.top1_ids[i].tolist(), int(scores.gold_ids[i])
            known = scores.known[i].tolist()
            needed = known if "agreement" in features else [known[0], known[k]]
            if not all(needed) or ids[0] == ids[k] or gold not in (ids[0], ids[k]):
                continue
            row = {"agreement": ids.count(ids[k]) / len(ids), "position": float(scores.place[i])}
            for role, j in roles(k):
                row[f"p_{role}"] = float(scores.top1_logprobs[i, j].exp())
                row[f"entropy_{role}"] = float(scores.entropies[i, j])
                row[f"margin_{role}"] = float(scores.margins[i, j])
            rows.append([row[name] for name in features])
            labels.append(int(ids[k] == gold))
    return rows, labels


class TestLearning:
    @pytest.mark.parametrize("balance", [True, False])
    @pytest.mark.parametrize("max_depth", [1, 3, 8])
    @pytest.mark.parametrize(
        "features",
        [
            ("p_draft", "p_assistant"),
            ("p_assistant",),
            ("margin_draft", "entropy_assistant", "agreement"),
            FEATURES,
        ],
    )
    def test_the_tree_asks_what_the_one_of_scikit_learn_asks_and_its_leaves_count(
        self, features: tuple[Feature, ...], max_depth: int, balance: bool
    ) -> None:
        scores = random_scores(max_depth)
        policy = CosdTreePolicy(
            features=features, max_depth=max_depth, min_samples_leaf=4, balance=balance
        ).fit(scores)
        assert policy.tree is not None
        theirs = DecisionTreeClassifier(
            max_depth=max_depth,
            min_samples_leaf=4,
            class_weight="balanced" if balance else None,
            random_state=0,
        )
        rows, labels = by_hand(scores, features)
        theirs.fit(torch.tensor(rows).numpy(), labels)
        ends = torch.from_numpy(theirs.apply(torch.tensor(rows).numpy()))
        here = torch.bincount(ends, minlength=theirs.tree_.node_count)
        here_right = torch.bincount(ends[torch.tensor(labels) == 1], minlength=len(here))
        generator = torch.Generator().manual_seed(7)
        new = torch.cat([torch.tensor(rows), torch.rand(2000, len(features), generator=generator)])
        ends = torch.from_numpy(theirs.apply(new.numpy()))
        columns = [features.index(name) for name in policy.tree.used]
        replaces, probability, _ = policy.tree.decide(new[:, columns])
        wanted = (here_right[ends] + 1) / (here[ends] + 2)
        torch.testing.assert_close(probability, wanted, atol=1e-6, rtol=0)
        assert torch.equal(replaces, 2 * here_right[ends] > here[ends])
        assert policy.tree.content.depth == theirs.get_depth()
        assert 0 < int(replaces.sum()) < len(replaces)

    def test_only_positions_where_one_of_the_two_is_right_are_learned_from(self) -> None:
        top1 = [[1, 2], [1, 2], [1, 2], [1, 1], [1, 2], [1, 2]]
        gold = [1, 2, 3, 1, 2, 2]
        known = [[True, True]] * 4 + [[False, True], [True, False]]
        scores = table(top1, gold, [[0.5, 0.5]] * 6, known=known)
        policy = CosdTreePolicy(balance=False).fit(scores)
        assert policy.tree is not None
        # The first two are left; neither question nor majority tells them apart.
        assert policy.tree.content == Leaf(False, 0.5, samples=2, assistant_right=1)

    def test_roll_outs_say_who_is_right_where_there_are_some(self) -> None:
        """The corpus says the base model; the texts that follow say the assistant, or both."""
        scores = table([[1, 2]] * 12, [1] * 12, [[0.5, 0.5]] * 12)
        rollouts = torch.tensor([[0.0, 1.0]] * 6 + [[1.0, 1.0]] * 4 + [[torch.nan, torch.nan]] * 2)
        policy = CosdTreePolicy().fit(replace(scores, rollouts=rollouts))
        # Six for the assistant and two, without roll-outs, for the base model.
        assert policy.tree is not None and policy.tree.content == Leaf(True, 7 / 10, 8, 6)

    def test_agreement_is_learned_where_every_model_is_known(self) -> None:
        top1, gold = [[1, 2, 2]] * 4, [2] * 4
        known = [[True, True, False], [True, True, True]] * 2
        scores = table(top1, gold, [[0.5] * 3] * 4, known=known)
        counts = []
        for features in (("p_draft",), ("p_draft", "agreement")):
            policy = CosdTreePolicy(features=features).fit(scores)  # type: ignore[arg-type]
            assert policy.tree is not None and isinstance(policy.tree.content, Leaf)
            counts.append(policy.tree.content.samples)
        assert counts == [6, 4]

    def test_a_threshold_between_two_kinds_of_positions_is_found(self) -> None:
        top1 = [[1, 2]] * 20
        gold = [2] * 10 + [1] * 10
        scores = table(top1, gold, [[0.25, 0.5]] * 10 + [[0.75, 0.5]] * 10)
        policy = CosdTreePolicy().fit(scores)
        assert policy.tree is not None
        root = policy.tree.content
        assert isinstance(root, Split) and root.feature == "p_draft"
        assert root.threshold == pytest.approx(0.5)
        assert (root.below, root.above) == (Leaf(True, 11 / 12, 10, 10), Leaf(False, 1 / 12, 10, 0))

    def test_a_leaf_replaces_where_the_assistant_is_more_often_right(self) -> None:
        """However rare that is elsewhere: balance chooses the questions, and no leaf goes by it."""
        top1, gold = [[1, 2]] * 24, [2] * 2 + [1] * 22
        probs = [[0.25, 0.5]] * 12 + [[0.75, 0.5]] * 12
        for balance in (False, True):
            policy = CosdTreePolicy(balance=balance).fit(table(top1, gold, probs))
            assert policy.tree is not None and isinstance(policy.tree.content, Split)
            assert policy.tree.content.below == Leaf(False, 3 / 14, 12, 2)

    def test_with_balance_questions_part_the_rarer_kind_from_the_others(self) -> None:
        # One question parts 10 of 11 assistants that are right from 400 that are wrong; the other
        # parts 350 that are wrong and nothing else, and is better where each position counts once.
        rows = [(2, 0.9, 0.9)] * 40 + [(2, 0.1, 0.1)] + [(1, 0.9, 0.1)] * 30
        rows += [(1, 0.1, 0.9)] * 300 + [(1, 0.1, 0.1)] * 700
        top1, gold = [[1, 2]] * len(rows), [row[0] for row in rows]
        scores = table(top1, gold, [row[1:] for row in rows])
        asked = []
        for balance in (False, True):
            policy = CosdTreePolicy(balance=balance, max_depth=1).fit(scores)
            theirs = DecisionTreeClassifier(
                max_depth=1, min_samples_leaf=5, class_weight="balanced" if balance else None
            ).fit(scores.top1_logprobs.exp().numpy(), [g == 2 for g in gold])
            assert policy.tree is not None
            asked.append(policy.tree.used)
            assert asked[-1] == (FEATURES[theirs.tree_.feature[0]],)

    @pytest.mark.parametrize("n_each", [1, 5])
    def test_who_is_always_right_and_who_is_always_wrong_are_told_apart(self, n_each: int) -> None:
        """By who they are: all are equally sure."""
        n = 40
        top1 = [[1, *[2, 3] * n_each]] * n
        gold = [2] * n
        gold[::4] = [1] * len(gold[::4])  # the base model, which nobody can tell either
        scores = table(top1, gold, [[0.5] * (1 + 2 * n_each)] * n)
        policy = CosdTreePolicy().fit(scores)
        good = scores.models[1::2]
        assert policy.tree is not None and isinstance(policy.tree.content, AssistantSplit)
        assert policy.tree.content.assistants == good
        assert policy.tree.content.among == Leaf(
            True, (30 * n_each + 1) / (n * n_each + 2), *(n * n_each, 30 * n_each)
        )
        assert policy.uses(scores.models) == {0, *range(1, 1 + 2 * n_each, 2)}
        forgetful = CosdTreePolicy(features=("p_draft", "p_assistant")).fit(scores).tree
        assert forgetful is not None and isinstance(forgetful.content, Leaf)

    def test_it_learns_for_ten_assistants(self) -> None:
        names = ["base", *(f"m{k}" for k in range(10))]
        ensemble = Ensemble([random_table(name, seed) for seed, name in enumerate(names)])
        policy = CosdTreePolicy(max_depth=6).fit(random_scores(8, m=11, names=ensemble.models))
        assert policy.tree is not None and policy.tree.groups
        plain = written(ensemble, AlwaysLooking(tree=policy.tree))
        assert written(ensemble, policy) == plain
        assert len({name for text in plain for _, name in text}) > 2

    @pytest.mark.parametrize(
        ("gold", "leaf"), [(1, Leaf(False, 1 / 11, 9, 0)), (2, Leaf(True, 10 / 11, 9, 9))]
    )
    @pytest.mark.parametrize("balance", [True, False])
    def test_where_always_the_same_is_right_the_tree_is_one_leaf(
        self, gold: int, leaf: Leaf, balance: bool
    ) -> None:
        scores = table([[1, 2]] * 9, [gold] * 9, [[0.1 * i, 0.5] for i in range(1, 10)])
        policy = CosdTreePolicy(balance=balance).fit(scores)
        assert policy.tree is not None and policy.tree.content == leaf

    @pytest.mark.parametrize("top1", [[[1, 1]] * 5, [[1, 2]] * 5, [[1]] * 5])
    def test_there_must_be_something_to_learn_from(self, top1: list[list[int]]) -> None:
        scores = table(top1, [3] * 5, [[0.5] * len(top1[0])] * 5)
        with pytest.raises(TrainingError) as caught:
            CosdTreePolicy().fit(scores)
        assert str(caught.value).startswith("policy 'cosd-tree' finds nothing to learn from: at no")
        assert "base model 'm0'" in str(caught.value)

    def test_equal_tables_give_equal_files(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            tree = CosdTreePolicy(features=FEATURES, max_depth=6).fit(random_scores(3)).tree
            assert tree is not None
            tree.save(tmp_path / f"{name}.json")
        assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()

    def test_a_tree_of_three_examples_writes_with_real_models(self, tmp_path: Path) -> None:
        """Three texts of eight tokens, two assistants; the checkpoint says what the policy says."""
        tiny = multicolm.load("tiny")
        policy = CosdTreePolicy(min_samples_leaf=2).fit(random_scores(5, n=24, names=tiny.models))
        assert policy.tree is not None and policy.tree.content.depth > 0
        Checkpoint(policy, summary="Of three examples.").save_pretrained(tmp_path / "tree")
        prompts = ["What is 3 + 4?", "Where does the willow live?", "Hello"]
        traces = []
        for chosen in (policy, tmp_path / "tree", AlwaysLooking(tree=policy.tree)):
            answers = tiny.generate(prompts, chosen, max_new_tokens=12)
            traces.append([[(t.id, t.model) for t in a.trace] for a in answers])
        assert traces[0] == traces[1] == traces[2]
        assert {model for text in traces[0] for _, model in text} > {tiny.models[0]}

    @pytest.mark.parametrize("n", [1, 3])
    def test_three_positions_are_enough_to_learn_something(self, n: int) -> None:
        duo = Ensemble([BASE, LEFT])
        probs = [[0.3, 0.5], [0.8, 0.5], [0.2, 0.5]][:n]
        scores = table([[1, 2]] * n, [2, 1, 2][:n], probs, names=duo.models)
        policy = CosdTreePolicy(balance=False).fit(scores)
        assert policy.tree is not None and policy.tree.content.depth == 0
        assert ids(duo, policy) == ids(Ensemble([LEFT]), "single")


class TestFilesOfAUser:
    def test_an_edited_file_changes_who_writes(self, tmp_path: Path) -> None:
        trio = Ensemble([BASE, LEFT, RIGHT])
        (tmp_path / "policy.yaml").write_text("kind: cosd-tree\nparams: {tree: tree.json}\n")
        Tree(Split("p_draft", 0.5, Leaf(True, 0.8, 5, 4), KEEP)).save(tmp_path / "tree.json")
        text = (tmp_path / "tree.json").read_text()
        before = written(trio, tmp_path)
        assert before != written(Ensemble([BASE]), "single")
        (tmp_path / "tree.json").write_text(text.replace('"replace": true', '"replace": false'))
        assert written(trio, tmp_path) == written(Ensemble([BASE]), "single")
        (tmp_path / "tree.json").write_text(text.replace('"threshold": 0.5', '"threshold": 0.3'))
        assert written(trio, tmp_path) not in (before, written(Ensemble([BASE]), "single"))

    def test_a_damaged_tree_is_named_before_anything_is_written(self, tmp_path: Path) -> None:
        (tmp_path / "policy.yaml").write_text("kind: cosd-tree\nparams: {tree: tree.json}\n")
        (tmp_path / "tree.json").write_text('{"format": 1, "tree": {"replace": true}}')
        with pytest.raises(
            ArtefactError, match=r"tree\.json: tree: needs replace, probability; 'prob"
        ):
            Ensemble([BASE, LEFT]).generate(["a"], tmp_path)

    def test_using_a_tree_takes_no_scikit_learn(self, tmp_path: Path) -> None:
        Tree(Split("p_draft", 0.5, REPLACE, KEEP)).save(tmp_path / "tree.json")
        program = (
            "import sys; sys.modules['sklearn'] = None\n"
            "import torch\n"
            "from multicolm.policy.cosd_tree import CosdTreePolicy\n"
            "from multicolm.policy.tree import Tree\n"
            f"tree = CosdTreePolicy(tree=Tree({str(tmp_path / 'tree.json')!r})).tree\n"
            "print(tree.decide(torch.tensor([[0.2], [0.8]]))[0].tolist())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout == "[True, False]\n"
