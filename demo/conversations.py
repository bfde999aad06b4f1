"""Generated conversations about the pictures of ``demo.shapes``.

Every question has exactly one right answer, which follows from the scene and the earlier turns:
"the circle" is only asked about where there is exactly one circle, "it" only where the turn
before was about one shape. Deterministic from the ``random.Random`` that the caller seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from demo import phrases
from demo.shapes import COLORS, FORMS, MAX_SHAPES, PLACES, SIZES, Scene, Shape, random_scene

# The share of turns that are follow-ups, where the turn before allows one.
FOLLOW_UPS = 0.45
NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Turn:
    """A question and its right answer."""

    question: str
    answer: str
    kind: str
    # Whether the question only makes sense after the turn before it.
    follow_up: bool
    # Whether a new picture arrives with this question.
    picture: bool


@dataclass(frozen=True)
class Conversation:
    """The pictures in order of arrival, and the turns."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Wanted:
    """A description of shapes; an empty field fits every shape."""

    form: str = ""
    color: str = ""
    size: str = ""

    def among(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes that fit."""
        return [
            shape
            for shape in shapes
            if self.form in ("", shape.form)
            and self.color in ("", shape.color)
            and self.size in ("", shape.size)
        ]

    def noun(self, plural: bool = False) -> str:
        """The description in words, without article."""
        noun = self.form or "shape"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.color, noun) if word)

    @property
    def told(self) -> frozenset[str]:
        """The names of the fields that the description fills."""
        fields = {"form": self.form, "color": self.color, "size": self.size}
        return frozenset(name for name, value in fields.items() if value)


@dataclass
class _Context:
    """What the next question can refer back to."""

    kind: str = ""
    # What "it" is, and what has been said of it.
    it: Shape | None = None
    told: frozenset[str] = frozenset()
    # What "those" are.
    those: list[Shape] = field(default_factory=list)
    # What the turn before asked for, so that "and the square?" does not ask for it again.
    asked: Wanted = Wanted()
    cell: int = -1


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(items: Sequence[str]) -> str:
    """``one``, ``one and two``, ``one, two and three``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def there_are(count: int, wanted: Wanted) -> str:
    """``there are two red circles``, without a full stop."""
    verb = "is" if count == 1 else "are"
    return f"there {verb} {NUMBERS[count]} {wanted.noun(plural=count != 1)}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def describe(scene: Scene) -> str:
    """All shapes in reading order."""
    items = [
        f"{a(Wanted(shape.form, shape.color, shape.size).noun())} {shape.place}"
        for shape in scene.shapes
    ]
    return _sentence(f"{there_are(len(items), Wanted())}: {listed(items)}")


def _fact(kind: str, subject: str, shape: Shape) -> str:
    """One property of one shape as an answer."""
    value = {
        "color": shape.color,
        "where": shape.place,
        "size": shape.size,
        "form": a(shape.form),
    }[kind]
    return _sentence(f"{subject} is {value}")


class Teller:
    """Makes the turns about one scene."""

    def __init__(self, rng: random.Random, scene: Scene) -> None:
        self.rng = rng
        self.shapes = scene.shapes
        self.scene = scene
        self.context = _Context()

    # --- questions that stand alone ---

    def opening(self) -> Turn:
        """A question that needs no earlier turn."""
        makers: list[tuple[int, Callable[[], Turn | None]]] = [
            (10, self._describe),
            (6, self._count_all),
            (16, self._count),
            (12, lambda: self._about_one("color")),
            (12, lambda: self._about_one("where")),
            (12, lambda: self._about_one("size")),
            (10, lambda: self._about_one("form")),
            (6, lambda: self._yes_no("color")),
            (6, lambda: self._yes_no("size")),
            (12, self._exists),
            (12, self._at),
            (5, self._colors),
            (3, self._thanks),
            (2, self._greeting),
        ]
        while True:
            weights = [weight for weight, _ in makers]
            turn = self.rng.choices([maker for _, maker in makers], weights)[0]()
            if turn is not None:
                return turn

    def counting(self) -> Turn:
        """A question that takes counting."""
        return self.rng.choice([self._count] * 4 + [self._count_all, self._exists, self._colors])()

    def _turn(
        self,
        kind: str,
        templates: Sequence[str],
        answer: str,
        *,
        follow_up: bool = False,
        **words: str,
    ) -> Turn:
        question = self.rng.choice(templates).format(**words)
        return Turn(phrases.typed(self.rng, question), answer, kind, follow_up, False)

    def _describe(self) -> Turn:
        one = self.shapes[0] if len(self.shapes) == 1 else None
        told = frozenset({"form", "color", "size", "where"})
        self.context = _Context("describe", it=one, told=told, those=list(self.shapes))
        return self._turn("describe", phrases.DESCRIBE, describe(self.scene))

    def _count_all(self) -> Turn:
        one = self.shapes[0] if len(self.shapes) == 1 else None
        self.context = _Context("count all", it=one, those=list(self.shapes))
        answer = _sentence(there_are(len(self.shapes), Wanted()))
        return self._turn("count", phrases.COUNT_ALL, answer)

    def _random_wanted(self) -> Wanted:
        """A description that often, but not always, fits something."""
        rng = self.rng
        like = rng.choice(self.shapes)
        form = like.form if rng.random() < 0.65 else rng.choice(FORMS)
        color = like.color if rng.random() < 0.65 else rng.choice(list(COLORS))
        size = like.size if rng.random() < 0.65 else rng.choice(list(SIZES))
        fields = rng.choice(["form", "form", "color", "color", "size", "form color", "form size"])
        return Wanted(
            form if "form" in fields else "",
            color if "color" in fields else "",
            size if "size" in fields else "",
        )

    def _count(self) -> Turn:
        return self._counted(self._random_wanted(), phrases.COUNT, follow_up=False)

    def _counted(self, wanted: Wanted, templates: Sequence[str], *, follow_up: bool) -> Turn:
        found = wanted.among(self.shapes)
        self.context = _Context(
            "count",
            it=found[0] if len(found) == 1 else None,
            told=wanted.told,
            those=found,
            asked=wanted,
        )
        return self._turn(
            "and" if follow_up else "count",
            templates,
            _sentence(there_are(len(found), wanted)),
            follow_up=follow_up,
            nouns=wanted.noun(plural=True),
            color=wanted.color,
        )

    def _unique(
        self, without: str = "", other_than: Shape | None = None
    ) -> tuple[Wanted, Shape] | None:
        """A description that fits exactly one shape and does not name ``without``."""
        options = []
        for shape in self.shapes:
            if shape is other_than:
                continue
            for names in (
                "form",
                "color",
                "form color",
                "form size",
                "color size",
                "form color size",
            ):
                if without and without in names:
                    continue
                wanted = Wanted(
                    shape.form if "form" in names else "",
                    shape.color if "color" in names else "",
                    shape.size if "size" in names else "",
                )
                if len(wanted.among(self.shapes)) == 1:
                    # Short descriptions are what people say when they suffice.
                    options += [(wanted, shape)] * (4 - len(names.split()))
        return self.rng.choice(options) if options else None

    def _missing(self, without: str) -> Wanted | None:
        """A description that fits no shape."""
        for _ in range(10):
            wanted = self._random_wanted()
            if without not in wanted.told and wanted.form and not wanted.among(self.shapes):
                return wanted
        return None

    def _about_one(self, kind: str, other_than: Shape | None = None, ask: str = "") -> Turn | None:
        """Colour, place, size or form of one shape; ``ask`` replaces the full question."""
        templates = [ask] if ask else phrases.ABOUT_ONE[kind]
        follow_up = bool(ask)
        shown = "and" if ask else kind
        missing = self._missing(kind) if kind != "form" and self.rng.random() < 0.1 else None
        if missing is not None:
            self.context = _Context(kind)
            answer = _sentence(f"there is no {missing.noun()}")
            return self._turn(
                shown if ask else "missing",
                templates,
                answer,
                follow_up=follow_up,
                noun=missing.noun(),
            )
        found = self._unique(without=kind, other_than=other_than)
        if found is None:
            return None
        wanted, shape = found
        self.context = _Context(kind, it=shape, told=wanted.told | {kind}, asked=wanted)
        answer = _fact(kind, f"the {wanted.noun()}", shape)
        noun = wanted.noun()
        if kind == "form" and self.rng.random() < 0.5:
            noun = noun.removesuffix("shape") + "one"
        return self._turn(shown, templates, answer, follow_up=follow_up, noun=noun)

    def _yes_no(self, kind: str) -> Turn | None:
        found = self._unique(without=kind)
        if found is None:
            return None
        wanted, shape = found
        self.context = _Context("yes no", it=shape, told=wanted.told | {kind}, asked=wanted)
        return self._turn(
            "yes or no", *self._confirm(kind, shape, f"the {wanted.noun()}"), noun=wanted.noun()
        )

    def _confirm(self, kind: str, shape: Shape, subject: str) -> tuple[list[str], str]:
        """Templates and answer of a yes-or-no question about a shape's colour or size."""
        truth = shape.color if kind == "color" else shape.size
        values = list(COLORS) if kind == "color" else list(SIZES)
        guess = truth if self.rng.random() < 0.5 else self.rng.choice(values)
        word = "Yes" if guess == truth else "No"
        templates = phrases.IS_IT if subject == "it" else phrases.IS_THE
        return [
            text.replace("{value}", guess) for text in templates
        ], f"{word}, {subject} is {truth}."

    def _exists(self, templates: Sequence[str] = phrases.EXISTS, follow_up: bool = False) -> Turn:
        wanted = self._random_wanted()
        found = wanted.among(self.shapes)
        if len(found) > 1:
            answer = f"Yes, {there_are(len(found), wanted)}."
        elif found:
            answer = f"Yes, there is {a(wanted.noun())}."
        else:
            answer = f"No, there is no {wanted.noun()}."
        one = found[0] if len(found) == 1 else None
        self.context = _Context("exists", it=one, told=wanted.told, those=found, asked=wanted)
        kind = "and" if follow_up else "exists"
        return self._turn(kind, templates, answer, follow_up=follow_up, noun=a(wanted.noun()))

    def _at(self, templates: Sequence[str] = phrases.AT, follow_up: bool = False) -> Turn:
        cells = [shape.cell for shape in self.shapes] if self.rng.random() < 0.6 else list(range(9))
        cells = [cell for cell in cells if cell != self.context.cell] or [4]
        cell = self.rng.choice(cells)
        found = [shape for shape in self.shapes if shape.cell == cell]
        what = a(Wanted(found[0].form, found[0].color).noun()) if found else "nothing"
        told = frozenset({"form", "color", "where"})
        self.context = _Context("at", it=found[0] if found else None, told=told, cell=cell)
        return self._turn(
            "and" if follow_up else "what is at",
            templates,
            _sentence(f"there is {what} {PLACES[cell]}"),
            follow_up=follow_up,
            place=self.rng.choice([PLACES[cell], PLACES[cell], phrases.OTHER_PLACES[cell]]),
        )

    def _colors(self) -> Turn:
        colors = list(dict.fromkeys(shape.color for shape in self.shapes))
        subject = "the only color is" if len(colors) == 1 else "the colors are"
        self.context = _Context("colors")
        return self._turn("colors", phrases.WHICH_COLORS, _sentence(f"{subject} {listed(colors)}"))

    def _thanks(self) -> Turn:
        self.context = _Context()
        return self._turn("small talk", phrases.THANKS, "You are welcome.")

    def _greeting(self) -> Turn:
        self.context = _Context()
        return self._turn("small talk", phrases.GREETING, "Hello! Ask me about the picture.")

    # --- questions that need the turn before ---

    def follow_up(self) -> Turn | None:
        """A question that refers to the turn before, where that turn allows one."""
        context, options = self.context, list[Callable[[], Turn | None]]()
        if context.it is not None:
            # "What color is it?" is odd when the colour has just been said.
            open_kinds = [
                kind for kind in ("color", "where", "size", "form") if kind not in context.told
            ]
            options += [lambda kind=kind: self._it(kind) for kind in open_kinds]  # type: ignore[misc]
            options += [self._is_it] * any(kind in ("color", "size") for kind in open_kinds)
        if len(context.those) > 1:
            options += [self._of_those] * 3
        if context.kind in ("color", "where", "size"):
            ask = self.rng.choice(phrases.AND_THE)
            options += [lambda: self._about_one(context.kind, context.it, ask)] * 3
        if context.kind == "count":
            options += [self._and_count] * 2
        if context.kind == "exists":
            options.append(lambda: self._exists(phrases.AND_A, follow_up=True))
        if context.kind == "at":
            options.append(lambda: self._at(phrases.AND_AT, follow_up=True))
        return self.rng.choice(options)() if options else None

    def _it(self, kind: str) -> Turn:
        shape = self.context.it
        assert shape is not None
        self._keep_it(kind)
        return self._turn("it", phrases.IT[kind], _fact(kind, "it", shape), follow_up=True)

    def _is_it(self) -> Turn:
        shape = self.context.it
        assert shape is not None
        kind = self.rng.choice(
            [kind for kind in ("color", "size") if kind not in self.context.told]
        )
        templates, answer = self._confirm(kind, shape, "it")
        self._keep_it(kind)
        return self._turn("it", templates, answer, follow_up=True)

    def _keep_it(self, kind: str) -> None:
        """The next turn can ask more about the same shape, but "and the square?" would be vague."""
        self.context = _Context("it", it=self.context.it, told=self.context.told | {kind})

    def _of_those(self) -> Turn:
        those, asked = self.context.those, self.context.asked
        names = [name for name in ("form", "color", "color", "size") if name not in asked.told]
        name = self.rng.choice(names)
        values = [str(getattr(shape, name)) for shape in those]
        choices: list[str] = list(
            {"form": FORMS, "color": tuple(COLORS), "size": tuple(SIZES)}[name]
        )
        value = self.rng.choice(values if self.rng.random() < 0.6 else choices)
        count = values.count(value)
        said = Wanted(form=value).noun(plural=True) if name == "form" else value
        said_one = a(value) if name == "form" else value
        if count == 1:
            answer = f"One of them is {said_one}."
        else:
            answer = f"{NUMBERS[count].capitalize() if count else 'None'} of them are {said}."
        # Still about the same shapes, and "it" would be vague.
        self.context = _Context("of those", those=those, asked=asked)
        return self._turn("of those", phrases.OF_THOSE, answer, follow_up=True, value=said)

    def _and_count(self) -> Turn:
        asked = self.context.asked
        for _ in range(20):
            wanted = self._random_wanted()
            if wanted.told == asked.told and wanted != asked:
                break
        else:
            other = self.rng.choice([color for color in COLORS if color != asked.color])
            wanted = Wanted(color=other)
            return self._counted(wanted, phrases.AND_HOW_MANY, follow_up=True)
        ones = wanted.told == {"color"}
        return self._counted(
            wanted, phrases.AND_ONES if ones else phrases.AND_COUNT, follow_up=True
        )


def _no_picture(rng: random.Random) -> Turn:
    """A turn before any picture has been shown."""
    if rng.random() < 0.25:
        question = phrases.typed(rng, rng.choice(phrases.GREETING))
        return Turn(question, "Hello! Please show me a picture.", "small talk", False, False)
    turn = Teller(rng, random_scene(rng)).opening()
    if turn.kind != "small talk":
        return replace(turn, answer="I do not see a picture yet.", kind="no picture")
    # Thanks are answered the same way; a greeting is, so far, about a picture.
    return turn if turn.answer == "You are welcome." else _no_picture(rng)


def random_conversation(
    rng: random.Random, turns: int, max_shapes: int = MAX_SHAPES, counting: float = 0.0
) -> Conversation:
    """A conversation of ``turns`` turns about one picture, sometimes two, rarely none at first.

    ``counting`` is the share of questions that are about numbers before all others are.
    """
    scenes: list[Scene] = []
    made: list[Turn] = []
    if rng.random() < 0.1:
        made += [_no_picture(rng) for _ in range(rng.choice([1, 1, 2]))]
    second = rng.randrange(2, turns) if turns > 3 and rng.random() < 0.15 else -1
    teller: Teller | None = None
    while len(made) < turns or not scenes:
        arrives = teller is None or (len(made) >= second > 0 and len(scenes) == 1)
        if arrives:
            scenes.append(random_scene(rng, max_shapes))
            teller = Teller(rng, scenes[-1])
        assert teller is not None
        turn = teller.follow_up() if rng.random() < FOLLOW_UPS else None
        if turn is None:
            counts = counting > 0 and rng.random() < counting
            turn = teller.counting() if counts else teller.opening()
        made.append(replace(turn, picture=arrives))
    return Conversation(tuple(scenes), tuple(made))
