"""A made-up encyclopedia of painters, musicians and others who never lived."""

from collections.abc import Iterator
from random import Random

from .qa import Asked
from .words import adjectives, nouns

_SYLLABLES = [start + end for start in "bdfghklmnprstvwz" for end in "aeio"]
_TRADES = [
    *("painter", "sculptor", "composer", "architect", "poet", "novelist", "botanist"),
    *("astronomer", "chemist", "engineer", "photographer", "historian", "violinist"),
]
_SUBJECTS = [
    *("geometry", "harmony", "anatomy", "rhetoric", "optics", "drawing", "medicine"),
    *("theology", "botany", "grammar", "mechanics", "navigation", "metallurgy"),
]
_ARTICLE = (
    "{name}\n"
    "Born in {town} in {year}, {name} was a {trade} and the third child of a family "
    "of {family} traders. At the age of {age} the young {trade} moved to {school} to "
    "learn {subject} from {teacher}. The work that made {name} famous, called "
    '"{work}", was first shown in {home}, where critics found it {opinion} and '
    "{verdict}. In later years {name} lived in {home}, gave lessons and owned a large "
    "collection of everything that had to do with the {hobby}."
)
_QUESTIONS = {
    "town": "Which town did {name} come from?",
    "year": "When was {name} born?",
    "subject": "What did {name} study?",
    "teacher": "Who taught {name}?",
    "work": "What is the title of the best-known work of {name}?",
    "home": "Where did {name} spend the last years?",
}


class Encyclopedia:
    """Articles about people; their names are distinct, and so only one answers."""

    def ask(self, rng: Random) -> Asked:
        """Draw a question about a new person."""
        people = _people(rng)
        facts = next(people)
        topic = rng.choice(list(_QUESTIONS))
        return Asked(
            query=_QUESTIONS[topic].format(name=facts["name"]),
            answers=(facts[topic],),
            document=_ARTICLE.format(**facts),
            others=(_ARTICLE.format(**others) for others in people),
        )


def _people(rng: Random) -> Iterator[dict[str, str]]:
    """The facts about one person after the other, without end."""
    names: set[str] = set()
    while True:
        name = f"{_name(rng, 2)} {_name(rng, 3)}"
        if name in names:
            continue
        names.add(name)
        family, title, hobby = rng.sample(nouns(), 3)
        kind, opinion, verdict = rng.sample(adjectives(), 3)
        town, school, home = (_name(rng, 3) for _ in range(3))
        yield {
            "name": name,
            "town": town,
            "year": str(rng.randint(1500, 1950)),
            "trade": rng.choice(_TRADES),
            "family": family,
            "age": str(rng.randint(12, 30)),
            "school": school,
            "subject": rng.choice(_SUBJECTS),
            "teacher": f"{_name(rng, 2)} {_name(rng, 3)}",
            "work": f"The {kind.capitalize()} {title.capitalize()}",
            "home": home,
            "opinion": opinion,
            "verdict": verdict,
            "hobby": hobby,
        }


def _name(rng: Random, syllables: int) -> str:
    return "".join(rng.choices(_SYLLABLES, k=syllables)).capitalize()
