"""The ways in which the generated conversations ask their questions."""

from __future__ import annotations

import random

DESCRIBE = (
    "Describe the picture.",
    "What do you see?",
    "What is in the picture?",
    "What does the picture show?",
    "What is there?",
    "Please describe the image.",
)
COUNT_ALL = (
    "How many shapes are there?",
    "How many shapes do you see?",
    "How many shapes are in the picture?",
    "How many objects are there?",
    "Count the shapes.",
)
COUNT = (
    "How many {nouns} are there?",
    "How many {nouns} do you see?",
    "How many {nouns} are in the picture?",
    "Count the {nouns}.",
)
ABOUT_ONE = {
    "color": (
        "What color is the {noun}?",
        "Which color is the {noun}?",
        "What is the color of the {noun}?",
        "Which color does the {noun} have?",
        "What colour is the {noun}?",
    ),
    "where": (
        "Where is the {noun}?",
        "Where do you see the {noun}?",
        "In which part of the picture is the {noun}?",
        "What is the position of the {noun}?",
    ),
    "size": (
        "How big is the {noun}?",
        "How large is the {noun}?",
        "What size is the {noun}?",
        "What is the size of the {noun}?",
        "Is the {noun} large or small?",
    ),
    "form": (
        "What shape is the {noun}?",
        "What kind of shape is the {noun}?",
        "Which shape is the {noun}?",
        "What is the {noun}?",
    ),
}
IS_THE = ("Is the {noun} {value}?",)
EXISTS = (
    "Is there {noun}?",
    "Do you see {noun}?",
    "Can you see {noun}?",
    "Is there {noun} in the picture?",
)
AT = (
    "What is {place}?",
    "What do you see {place}?",
    "Which shape is {place}?",
    "What is there {place}?",
)
OTHER_PLACES = (
    "in the top left corner",
    "at the top center",
    "in the top right corner",
    "on the left side",
    "in the middle",
    "on the right side",
    "in the bottom left corner",
    "at the bottom center",
    "in the bottom right corner",
)
WHICH_COLORS = (
    "Which colors are there?",
    "Which colors do you see?",
    "What colors are in the picture?",
)
THANKS = ("Thanks!", "Thank you!", "Thank you.")
GREETING = ("Hello!", "Hi!", "Hello.", "Good morning!")

IT = {
    "color": ("What color is it?", "Which color is it?", "And its color?", "What is its color?"),
    "where": ("Where is it?", "And where is it?", "And its position?", "Where do you see it?"),
    "size": ("How big is it?", "How large is it?", "And its size?", "Is it large or small?"),
    "form": ("What shape is it?", "And its shape?", "What kind of shape is it?"),
}
IS_IT = ("Is it {value}?", "And is it {value}?")
AND_THE = ("And the {noun}?", "What about the {noun}?", "And what about the {noun}?")
AND_COUNT = ("And {nouns}?", "And how many {nouns}?", "What about {nouns}?")
AND_ONES = ("And {color} ones?", "And how many {color} ones?", "And how many {nouns}?")
AND_HOW_MANY = ("And how many {nouns}?", "And how many {nouns} are there?")
AND_A = ("And {noun}?", "What about {noun}?", "And is there {noun}?")
AND_AT = ("And {place}?", "What about {place}?", "And what is {place}?")
OF_THOSE = (
    "How many of those are {value}?",
    "How many of them are {value}?",
    "And how many are {value}?",
    "And how many of them are {value}?",
)


def typed(rng: random.Random, question: str) -> str:
    """The question as somebody types it: sometimes in lower case, sometimes without full stop."""
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    return question
