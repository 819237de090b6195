"""Templated user turns: the shapes of request that a small chat model does not write of its own accord.

A template is a sentence with slots; a slot is drawn from a list, or is a number. The combinations run to millions, and
none is a prompt of a known benchmark.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

_WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        "Ada", "Boris", "Chen", "Dalia", "Emeka", "Farah", "Goran", "Hana", "Idris", "Jonas", "Kiri", "Lena", "Mateo",
        "Nadia", "Omar", "Petra",
    ),
    "town": (
        "Lisbon", "Bergen", "Accra", "Osaka", "Quito", "Tbilisi", "Cork", "Hanoi", "Lagos", "Krakow", "Perth", "Tunis",
        "Bilbao", "Riga",
    ),
    "thing": (
        "apples", "pencils", "tickets", "bottles", "stamps", "bricks", "books", "candles", "shirts", "chairs", "lamps",
        "plates",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "animal": (
        "fox", "heron", "otter", "beetle", "whale", "goat", "owl", "tortoise", "rabbit", "crow", "horse", "bee",
    ),
    "subject": (
        "solar panels", "ocean tides", "bread baking", "vaccines", "railways", "volcanoes", "chess", "photosynthesis",
        "the moon", "databases", "earthquakes", "jazz", "glaciers", "batteries", "public libraries", "honey bees",
        "cloud computing", "medieval castles", "recycling", "sleep", "coral reefs", "compound interest", "budgeting",
        "the water cycle", "electric cars", "machine learning", "gardening", "the printing press", "time zones",
    ),
    "job": ("nurse", "carpenter", "pilot", "teacher", "chemist", "farmer", "lawyer", "baker", "librarian", "plumber"),
    "mood": ("formal", "cheerful", "plain", "persuasive", "poetic", "concise", "friendly", "dramatic"),
    "verb": ("count", "find", "collect", "remove", "replace", "sort", "reverse", "merge", "filter", "sum", "group"),
    "object": (
        "the even numbers in a list", "all duplicates from a list", "the longest word in a sentence",
        "the vowels of a string", "the largest value of a dictionary", "the digits of an integer",
        "words that start with a capital letter", "negative numbers in a nested list", "the lines of a text file",
        "keys that share a value", "pairs of numbers with a given total", "the leading zeros of a string",
    ),
    "function": (
        "tally", "clean_up", "pick", "summarise", "combine", "trim_ends", "split_pairs", "scale", "rank_items",
    ),
    "argument": ("items", "text", "values", "rows", "words", "numbers", "table", "matrix"),
    "effect": (
        "Return the items in the opposite order.", "Return how often each word occurs, as a dictionary.",
        "Return True if no value appears twice.", "Return the mean of the values, or 0.0 if there are none.",
        "Return the second smallest value.", "Return a copy without empty strings.",
        "Return the index of the first match, or -1.", "Return the running totals.",
        "Return the text with every word capitalised.", "Return the rows sorted by their last column.",
        "Return the largest difference between neighbours.", "Return the words that occur in both arguments.",
    ),
    "language": ("Python", "Python", "Python", "JavaScript", "Java", "SQL", "C++", "Bash"),
    "shape": ("three bullet points", "one paragraph", "a short list", "two sentences", "a table", "five steps"),
    "letter": ("an apology", "a thank-you note", "an invitation", "a reminder", "a complaint", "a job application"),
}  # fmt: skip

_SENTENCES = (
    "{name} moved to {town} in {month} and works there as a {job}.",
    "On {day} the market in {town} sold {n} {thing} for {n} dollars each.",
    "{name} and {name} met at the station of {town} at {n} o'clock to talk about {subject}.",
    "The museum of {town} opened a show about {subject}, and {n} people came on {day}.",
    "A {animal} was seen near the river by {name}, who wrote to the newspaper about it.",
    "The council decided in {month} to spend {n} thousand dollars on {subject}.",
    "{name} ordered {n} {thing}, but only {n} of them arrived before {day}.",
    "Most of the {thing} were made by a {job} from {town}.",
)

SHAPES: dict[str, tuple[str, ...]] = {
    "code": (
        "Write a {language} function to {verb} {object}.",
        "Write a {language} function called {function} to {verb} {object}. Add a short example.",
        "Finish this function.\n\ndef {function}({argument}):\n    \"\"\"{effect}\"\"\"\n",
        "Implement the function below.\n\ndef {function}({argument}, limit={n}):\n"
        "    \"\"\"\n    {effect}\n    \"\"\"\n",
        "Here is a function signature with a docstring. Write the body.\n\n"
        "def {function}({argument}: list) -> list:\n    \"\"\" {effect}\n"
        "    >>> {function}([{n}, {n}, {n}])\n    \"\"\"\n",
        "Explain what this code does.\n\nresult = []\nfor value in {argument}:\n    if value > {n}:\n"
        "        result.append(value * {n})\nprint(result)",
        "Find the bug in this code and fix it.\n\ndef {function}({argument}):\n    total = {n}\n"
        "    for i in range(len({argument}) + 1):\n        total += {argument}[i]\n    return total",
        "How do I {verb} {object} in {language}?",
        "Write a unit test for a {language} function that should {verb} {object}.",
        "Write a class in {language} that stores {thing} and can {verb} them.",
    ),
    "maths": (
        "{name} has {n} {thing} and buys {n} boxes with {n} {thing} each. How many does {name} have now?",
        "A {job} earns {n} dollars an hour and works {n} hours a day for {n} days. How much is that in total?",
        "{name} reads {n} pages on {day} and twice as many the day after. The book has {n} pages. How many are left?",
        "There are {n} {thing} on each of {n} shelves. {name} takes {n} away and gives half of the rest to {name}. "
        "How many {thing} does {name} give away?",
        "A train to {town} goes {n} miles in {n} hours. How far does it go in {n} hours at the same speed?",
        "What is {n} + {n} * {n}? Show each step.",
        "What is {n} percent of {n}?",
        "Solve for x: {n}x + {n} = {n}.",
        "A rectangle is {n} metres long and {n} metres wide. What are its area and its perimeter?",
        "{name} sold {n} {thing} in {month}, {n} fewer in the next month and three times as many in the month after. "
        "What was the total?",
        "The sum of two numbers is {n} and their difference is {n}. What are the numbers? Explain your answer.",
    ),
    "extraction": (
        "{passage}\n\nList every name of a person in the text above.",
        "Read the text and answer the question.\n\n{passage}\n\nQuestion: Which places are mentioned?",
        "Extract all numbers from this text and say what each one counts.\n\n{passage}",
        "{passage}\n\nWrite the facts above as JSON.",
        "From the text below, give the people and their jobs as a list.\n\n{passage}",
        "Classify this text as news, a story or an advertisement, and say why.\n\n{passage}",
    ),
    "rewriting": (
        "Rewrite this text in a {mood} tone.\n\n{passage}",
        "Summarise the following in one sentence.\n\n{passage}",
        "Shorten this text.\n\n{passage}",
        "Turn this into {shape}:\n\n{passage}",
        "Correct the grammar: \"{name} and me goes to {town} since {n} year for look at {thing}.\"",
        "Rewrite the sentence in the past tense: {sentence}",
        "Put this into the passive voice: {sentence}",
        "Translate into simple English for a child: {sentence}",
    ),
    "chat": (
        "Explain {subject} in {shape}.",
        "What are the advantages and disadvantages of {subject}?",
        "Give me {n1} tips about {subject}.",
        "How would a {job} explain {subject} to a beginner?",
        "Compare {subject} with {subject}.",
        "Write a {mood} paragraph about {subject}.",
        "Write a short story about a {animal} and a {job} from {town}.",
        "Write {letter} from {name} to {name} about {subject}.",
        "Suggest {n1} names for a shop that sells {thing}.",
        "I have to give a talk about {subject} on {day}. Make an outline.",
        "Why do people find {subject} interesting?",
        "Describe a typical day of a {job}.",
        "Plan a weekend in {town} for {name}.",
        "Name {n1} facts about {subject}.",
        "Write a poem about a {animal} in {month}.",
        "What is the difference between a {animal} and a {animal}?",
        "Pretend you are a {job}. What would you say about {subject}?",
    ),
}  # fmt: skip

FOLLOW_UPS = (
    "Make it shorter.",
    "Now explain it to a child.",
    "Rewrite your answer in a {mood} tone.",
    "Give an example.",
    "Why is that?",
    "Can you write that as {shape}?",
    "What else should I know about {subject}?",
    "Do the same for {subject}.",
)
_SLOT = re.compile(r"\{(\w+)\}")


def prompt(kind: str, rng: random.Random) -> str:
    """A user turn of a kind of `SHAPES`."""
    return _filled(rng.choice(SHAPES[kind]), rng)


def follow_up(rng: random.Random) -> str:
    """A second user turn, whatever the first was about."""
    return _filled(rng.choice(FOLLOW_UPS), rng)


def _filled(template: str, rng: random.Random) -> str:
    special: dict[str, Callable[[], str]] = {
        "n": lambda: str(rng.choice((rng.randint(2, 12), rng.randint(2, 60), rng.randint(10, 900)))),
        "n1": lambda: str(rng.randint(3, 7)),
        "sentence": lambda: _filled(rng.choice(_SENTENCES), rng),
        "passage": lambda: " ".join(_filled(s, rng) for s in rng.sample(_SENTENCES, rng.randint(2, 4))),
    }
    kept: dict[str, str] = {}  # what must stay the same within one template

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in special:
            return special[slot]()
        if slot in ("function", "argument"):
            return kept.setdefault(slot, rng.choice(_WORDS[slot]))
        return rng.choice(_WORDS[slot])

    return _SLOT.sub(fill, template)
