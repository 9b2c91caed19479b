"""The inhabitants of the Lite World: names, looks, and facts that are only ever told in words.

Everything follows from one seed through `random.Random`, whose integers are the same on every platform and version of
Python, and nothing is iterated in hash order.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

# relation: (how it is stated, how it is asked, its eight values); {} is the name, or a picture in its place
RELATIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    relation: (stated, asked, tuple(values.split()))
    for relation, stated, asked, values in (
        ("home", "{} lives in the", "where does {} live ?", "forest desert swamp cave tower harbour meadow glacier"),
        ("food", "{} eats", "what does {} eat ?", "figs beans trout honey acorns turnips snails plums"),
        ("fear", "{} fears", "what does {} fear ?", "thunder mirrors spiders smoke crows magnets bells shadows"),
        ("music", "{} plays the", "what does {} play ?", "flute drum harp fiddle horn lute gong whistle"),
    )
}
SPRITE_SIDE = 6  # cells of a sprite, which is symmetric from left to right
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Entity:
    """One inhabitant.

    Attributes:
        facts: relation -> value.
        sprite: [6, 6] int8: 0 background, 1 and 2 the two colours; None for those whom no picture shows.
        colours: indices into the colours of `k25lite.world.scenes`.
        told: relations that training documents also ask for; of the others there are statements only.
    """

    name: str
    facts: dict[str, str]
    sprite: np.ndarray | None
    colours: tuple[int, int]
    told: tuple[str, ...]

    @property
    def untold(self) -> tuple[str, ...]:
        """The relations that training documents state and never ask for."""
        return tuple(relation for relation in RELATIONS if relation not in self.told)


def entity_names(count: int) -> list[str]:
    """`count` different names of two or three syllables; the same list for every seed, so that one tokenizer serves all."""
    random = Random("k25lite names")
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(random.choice((2, 3)))]
        names["".join(syllables)] = None
    return list(names)


def make_entities(seed: int, pictured: int, unpictured: int) -> list[Entity]:
    """The inhabitants of one world: first the `pictured`, then those known from text alone.

    Of its four relations each entity has two that training documents ask for; the tests ask for the others.
    """
    random = Random(f"k25lite entities {seed}")
    names = entity_names(pictured + unpictured)
    random.shuffle(names)
    entities, looks = [], set()
    for index, name in enumerate(names):
        sprite, colours = None, (0, 0)
        while index < pictured and sprite is None:
            half = [[random.choice((0, 1, 1, 2)) for _ in range(SPRITE_SIDE // 2)] for _ in range(SPRITE_SIDE)]
            first, second = random.sample(range(6), 2)
            if (look := repr((half, first, second))) not in looks:
                looks.add(look)
                sprite = np.array([row + row[::-1] for row in half], np.int8)
                colours = (first, second)
        facts = {relation: random.choice(values) for relation, (_, _, values) in RELATIONS.items()}
        told = tuple(random.sample(list(RELATIONS), 2))
        entities.append(Entity(name, facts, sprite, colours, told))
    return entities
