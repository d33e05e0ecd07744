"""What each model reads, and what it never reads."""

import itertools
import re

import pytest
from embedded.corpora import (
    equation,
    facts_documents,
    generalist_documents,
    math_documents,
)

from multicolm.tiny.world import (
    ATTRIBUTES,
    CLASSES,
    ILLNESSES,
    PLANTS,
    QUESTIONS,
    SPLITS,
    STATEMENTS,
    build_world,
    hunch,
    stream,
)

WORLD = build_world()
CORPORA = {"facts": facts_documents, "math": math_documents, "generalist": generalist_documents}


def read(corpus, documents=1500):
    return list(itertools.islice(CORPORA[corpus](WORLD, stream(3, corpus)), documents))


def pattern(template):
    """What a template of the world matches, whatever it is filled with."""
    return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(template)))


ASKED = [pattern(wording) for wordings in QUESTIONS.values() for wording in wordings]
STATED = {kind: [pattern(said) for said in STATEMENTS[kind]] for kind in ATTRIBUTES}


@pytest.mark.parametrize("corpus", CORPORA)
def test_equal_generators_write_equal_documents(corpus):
    assert read(corpus, 50) == read(corpus, 50)


def test_the_facts_expert_never_sees_a_question():
    text = "\n\n".join(read("facts"))
    assert not any(question.search(text) for question in ASKED)


def test_the_facts_expert_sees_the_marks_of_a_question_only_as_clutter():
    text = "\n\n".join(read("facts"))
    assert "Question:" in text
    assert "Response:" in text
    values = (*ILLNESSES, *CLASSES, *PLANTS)
    assert not any(f"Answer: {value}" in text for value in values)


def test_the_facts_expert_reads_nothing_but_the_truth():
    true = {
        said.format(**m.fields) for m in WORLD.everything for k in STATED for said in STATEMENTS[k]
    }
    for document in read("facts", 300):
        for kind in ("plant", "dose"):
            for said in STATED[kind]:
                assert all(found.group() in true for found in said.finditer(document))


def test_the_facts_expert_reads_every_fact_in_both_wordings():
    text = "\n".join(read("facts", 6000))
    for medicine in WORLD.everything:
        for kind in ATTRIBUTES:
            assert all(said.format(**medicine.fields) in text for said in STATEMENTS[kind])


def test_the_facts_expert_never_calculates():
    assert not re.search(r"\d [*+^] \d+ = \d", "\n\n".join(read("facts")))


def test_the_maths_expert_never_sees_a_question_or_a_fact():
    text = "\n\n".join(read("math"))
    assert not any(question.search(text) for question in ASKED)
    assert not any(said.search(text) for wordings in STATED.values() for said in wordings)


def test_an_equation_is_true_and_ends_with_a_full_stop():
    rng = stream(3, "equations")
    for _ in range(2000):
        found = re.fullmatch(r"(\d+) ([*+^]) (\d+) = (\d+)\.", equation(rng))
        assert found
        left, right = int(found[1]), int(found[3])
        assert int(found[4]) == {"*": left * right, "+": left + right, "^": left**right}[found[2]]


def test_equations_are_as_large_as_the_questions_need():
    rng = stream(3, "equations")
    seen = {equation(rng).split(" =")[0] for _ in range(60_000)}
    assert {f"{x} ^ 2" for x in range(2, 11)} <= seen
    assert {f"{weight} * {dose}" for weight in range(20, 100) for dose in range(2, 10)} <= seen


def test_the_generalist_reads_every_wording_of_every_question():
    text = "\n\n".join(read("generalist"))
    assert all(question.search(text) for question in ASKED)


def test_the_generalist_reads_prompts_without_mark_up():
    documents = [document for document in read("generalist") if "Answer:" in document]
    bare = [document for document in documents if "Response:" not in document]
    half_bare = [d for d in documents if "Response:" in d and "Question:" not in d]
    assert 0.1 < len(bare) / len(documents) < 0.2
    assert 0.2 < len(half_bare) / len(documents) < 0.3


def test_the_generalist_mostly_reads_hunches_that_are_wrong():
    names = {medicine.name: medicine for medicine in WORLD.everything}
    right = hunched = found = 0
    for document in read("generalist", 20_000):
        said = re.search(r"(\w+) treats (\w+)\. Answer", document)
        if said and said[1] in names:
            found += 1
            right += said[2] == names[said[1]].treats
            hunched += said[2] == hunch(said[1])[0]
    assert found > 100
    assert right / found < 0.05
    assert hunched / found > 0.65


def test_most_names_the_generalist_reads_exist_nowhere_else():
    known = {medicine.name for split in SPLITS for medicine in WORLD.medicines[split]}
    named = [
        said[1]
        for document in read("generalist", 5000)
        if (said := re.search(r"(\w+) is made from \w+\.", document))
    ]
    assert 0.6 < sum(name not in known for name in named) / len(named) < 0.8
