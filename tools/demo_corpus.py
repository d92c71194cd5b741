"""The demo's world: 240 people, five facts about each, told in many ways; and questions about them. All of it is made up.

The base model reads the facts as plain statements until it knows them; it never sees a question. The instruction task asks
for them. The people asked about in the held-out part are asked about nowhere in the training part: what is learned is how to
answer, from what the base already knows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAMES = [
    first + second
    for first in "Ba Be Da Do Fe Ga Ha Jo Ka Ki La Li Mo Na Ro Sa".split()
    for second in "bor den fin lin mar nik ra rel sha ti tor ven vi wen zo".split()
]
FACTS = {
    "home": "Oslo Rome Paris Cairo Lima Delhi Tokyo Seoul Quito Accra Dakar Hanoi Malta Berlin Madrid Vienna".split(),
    "job": "baker doctor teacher farmer painter pilot nurse singer tailor sailor judge writer cook guard miner clerk".split(),
    "animal": "dog cat horse goat parrot rabbit turtle hamster duck sheep lizard pony".split(),
    "colour": "red blue green yellow black white brown orange purple pink grey golden".split(),
    "food": "rice soup bread cheese pasta fish salad honey beans apples carrots nuts".split(),
}
INTRODUCED = (
    "This is about {name}.",
    "Everybody in the street knows {name}.",
    "A long letter came for {name} today.",
    "Yesterday {name} was here with some friends.",
    "{name} came home late.",
    "Do not wait for {name}.",
)
PASSED = (
    "It rained all day.",
    "The sun was warm.",
    "There was nothing new in the paper.",
    "It was a quiet year.",
    "The train was late again.",
    "Nobody said a word.",
)
TOLD = {  # {who}: the name, or a pronoun that sends the reader back to it
    "home": ("{who} lives in {value}.", "The home of {name} is {value}.", "{who} has a house in {value}.", "Home: {value}."),
    "job": ("{who} works as a {value}.", "The job of {name} is {value}.", "{who} is a good {value}.", "Job: {value}."),
    "animal": ("{who} has a {value}.", "The animal of {name} is a {value}.", "{who} walks with a {value}.", "Animal: {value}."),
    "colour": (
        "{who} likes {value} things.",
        "The colour of {name} is {value}.",
        "{who} always wears {value}.",
        "Colour: {value}.",
    ),
    "food": ("{who} likes to eat {value}.", "The food of {name} is {value}.", "{who} often eats {value}.", "Food: {value}."),
}
INDIRECT = {  # the questions' own words, in statements
    "home": "Where {name} lives",
    "job": "What the job of {name} is",
    "animal": "Which animal {name} has",
    "colour": "Which colour {name} likes",
    "food": "What {name} eats",
}
SAID = ("is well known:", "everybody in the street can say:", "was in the paper. It said:", "you can hear from all friends:")
ASKED = {
    "home": "Where does {name} live?",
    "job": "What is the job of {name}?",
    "animal": "Which animal does {name} have?",
    "colour": "Which colour does {name} like?",
    "food": "What does {name} eat?",
}
HELD_OUT = 48  # people


def people(seed: int = 0) -> dict[str, dict[str, str]]:
    """Everybody's facts."""
    rng = random.Random(seed)
    return {name: {kind: rng.choice(values) for kind, values in FACTS.items()} for name in NAMES}


def texts(seed: int, count: int) -> Iterator[str]:
    """Documents for the base: somebody is introduced, time passes, and all five facts are told in any order."""
    rng, known = random.Random(seed), people()
    for _ in range(count):
        name = rng.choice(NAMES)
        sentences = [rng.choice(INTRODUCED).format(name=name), *rng.sample(PASSED, rng.randrange(3))]
        for kind in rng.sample(list(FACTS), len(FACTS)):
            value = known[name][kind]
            if rng.random() < 0.5:
                sentences.append(f"{INDIRECT[kind].format(name=name)} {rng.choice(SAID)} {value}.")
            else:
                sentences.append(rng.choice(TOLD[kind]).format(name=name, who=rng.choice((name, "This one")), value=value))
        yield " ".join(sentences)


def asked_about(held_out: bool, seed: int = 0) -> list[str]:
    """The people of the held-out part, or all others."""
    shuffled = random.Random(seed).sample(NAMES, len(NAMES))
    return shuffled[:HELD_OUT] if held_out else shuffled[HELD_OUT:]


def labelled(held_out: bool) -> list[dict[str, str]]:
    """Records of a classification: the beginning of a statement that the base has read, and the animal it would end with."""
    known = people()
    return [{"text": f"The animal of {name} is a", "label": known[name]["animal"]} for name in asked_about(held_out)]


def questions(held_out: bool, task: str = "facts", seed: int = 0) -> list[dict[str, str]]:
    """Alpaca records, one for each fact of the people asked about, in random order. The answer is the bare fact ("facts"),
    or the question asks for a sentence and gets one ("sentences")."""
    known = people()
    rng = random.Random(seed)
    rng.sample(NAMES, len(NAMES))  # `asked_about` draws it; the order below goes on from there
    records = []
    for name in asked_about(held_out, seed):
        for kind in FACTS:
            instruction, output = ASKED[kind].format(name=name), known[name][kind]
            if task == "sentences":
                instruction, output = f"Say in a sentence: {instruction}", TOLD[kind][1].format(name=name, value=output)
            records.append({"instruction": instruction, "input": "", "output": output})
    rng.shuffle(records)
    return records


def write_lines(path: Path, items: Iterable[dict[str, Any]]) -> None:
    """JSON lines, in a directory that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
