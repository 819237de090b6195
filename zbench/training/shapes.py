"""User turns of shapes that a small chat model does not write of its own accord.

A template is a sentence with slots; a slot is drawn from a list, or is a number. The combinations run to millions, and
none is a prompt of a known benchmark. Their words are few all the same: what a drafter learns of them it learns of
little else. An opening is the beginning of a request only; the model writes on from it, with words of its own.
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
OPENINGS: dict[str, tuple[str, ...]] = {
    "code": (
        "Write a {language} function that", "Write a {language} function named", "Write a {language} program to",
        "Write a {language} script that", "Implement a {language} class", "Create a {language} function to",
        "How do I use", "How can I write a {language}", "Fix the error in this {language} code:\n\n",
        "Explain this {language} code:\n\n", "Write the body of this function:\n\ndef",
        "Finish the following function.\n\ndef is_", "Fill in this function.\n\ndef count_",
        "Please complete:\n\ndef get_", "def find_", "def sum_", "def remove_", "def check_",
        "Complete the function below.\n\nfrom typing import List\n\n\ndef",
        "Implement this:\n\ndef {function}({argument}):\n    \"\"\"", "Given a list of integers, write",
        "Given a string, write a function", "Write a recursive function", "Write a SQL query that",
        "Write a regular expression", "Convert this code to {language}:", "What does this function return?\n\ndef",
        "Write an algorithm", "Design a data structure", "Write an HTML page",
    ),
    "maths": (
        "{name} has {n}", "{name} buys", "{name} and {name} are", "{name} is {n} years old.", "{name} wants to",
        "{name} earns", "{name}'s", "A {job} has", "A store sells", "A farmer", "A school has", "In a class of {n}",
        "There are {n}", "If a train", "If {n} people", "If x", "If {name} gives", "It takes {n}", "The price of",
        "The ratio of", "The average of", "The length of a rectangle", "How many ways", "How many hours",
        "What is the probability", "What is the area", "What is the sum of", "Solve the equation",
        "Solve the following", "Calculate the", "Find the value of", "Find the derivative", "Simplify",
        "A bag contains", "A car travels", "Every day {name}", "Last week, {name}", "During {month}, {name}",
        "Half of the {thing}", "Twice as many", "Three friends", "On {day}, {name}", "A recipe calls for",
        "{name} reads",
    ),
    "instructions": (
        "Generate a list of", "Generate a", "Create a list of", "Create a story", "Create a", "List", "List {n1}",
        "Name", "Name {n1}", "Give me", "Give an example of", "Describe", "Describe the", "Explain", "Explain how",
        "Explain why", "Explain the concept of", "What is", "What are", "What are the", "What does", "What causes",
        "Who", "Who was", "When did", "Where", "Why do", "Why is", "How does", "How do", "How to", "How would you",
        "Is it", "Can you", "Could you please", "Tell me", "Suggest", "Propose", "Outline", "Compare", "Contrast",
        "Write a", "Write a short", "Write a poem", "Write a letter to", "Write an email", "Write a speech",
        "Write a product description", "Write a review", "Write a headline for", "Write a dialogue between",
        "Write a tweet", "Write a summary of", "Write two sentences", "Design a", "Plan a", "Develop a", "Compose",
        "Imagine", "Imagine you are", "Pretend", "Act as", "You are a {job}.", "Suppose", "Discuss", "Analyze",
        "Evaluate", "Predict", "Identify", "Determine", "Provide", "Recommend", "Find", "Make a", "Brainstorm",
        "Construct", "Come up with", "Summarize the", "In {n1} sentences,", "Using an analogy,", "For a beginner,",
        "My {job}", "I need", "I want to", "I have", "I am", "I'm planning", "Help me", "Should I", "Which",
    ),
    "texts": (
        "Rewrite the sentence:", "Rewrite this sentence so that", "Rewrite the following paragraph",
        "Edit this sentence", "Correct the following sentence:", "Correct the spelling", "Paraphrase:",
        "Paraphrase the following", "Summarize this text:", "Summarize the following passage.\n\n", "Translate",
        "Translate the following", "Classify the following", "Classify these words", "Categorize", "Sort the following",
        "Arrange the following", "Extract the", "Extract all", "Identify the subject", "Identify the sentiment",
        "Find the synonyms", "Replace the word", "Fill in the blank:", "Continue the story:", "Complete the sentence:",
        "Read this:", "Convert the following", "Turn the following", "Combine these sentences:", "Change the tone",
        "Based on the text below,", "Given the following", "Here is a paragraph:", "Is this statement true",
        "Answer the question based on", "Choose the correct", "Question:", "Text:", "Sentence:", "Topic:",
    ),
}  # fmt: skip
_SLOT = re.compile(r"\{(\w+)\}")


def prompt(kind: str, rng: random.Random) -> str:
    """A user turn of a kind of `SHAPES`."""
    return _filled(rng.choice(SHAPES[kind]), rng)


def opening(rng: random.Random) -> str:
    """The first words of a user turn, for a model to write on from."""
    return _filled(rng.choice(OPENINGS[rng.choice(list(OPENINGS))]), rng)


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
