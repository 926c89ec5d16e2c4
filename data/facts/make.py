"""Makes facts.csv and reading.csv, the embedded questions: `python data/facts/make.py`. Same lists, same seed, same files.

facts    what a small model partly knows: capitals, continents, chemical symbols, opposites, past tenses, plurals
reading  what it has to read: who was given what, in generated sentences
"""

import csv
import random
from pathlib import Path

CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Austria Vienna|Poland Warsaw|Hungary Budapest|Greece Athens
Sweden Stockholm|Norway Oslo|Finland Helsinki|Denmark Copenhagen|Ireland Dublin|Russia Moscow|Ukraine Kyiv|Turkey Ankara|Egypt Cairo|Kenya Nairobi
Ethiopia Addis Ababa|Nigeria Abuja|Ghana Accra|Senegal Dakar|Morocco Rabat|Algeria Algiers|Tunisia Tunis|Iran Tehran|Iraq Baghdad|Syria Damascus
Lebanon Beirut|Jordan Amman|Israel Jerusalem|Afghanistan Kabul|Pakistan Islamabad|India New Delhi|Nepal Kathmandu|Bangladesh Dhaka|Thailand Bangkok
Vietnam Hanoi|Cambodia Phnom Penh|Indonesia Jakarta|Philippines Manila|Japan Tokyo|China Beijing|Mongolia Ulaanbaatar|Australia Canberra
New Zealand Wellington|Canada Ottawa|Mexico Mexico City|Cuba Havana|Jamaica Kingston|Colombia Bogota|Venezuela Caracas|Peru Lima|Chile Santiago
Argentina Buenos Aires|Uruguay Montevideo|Brazil Brasilia|Ecuador Quito|Bulgaria Sofia|Romania Bucharest|Serbia Belgrade|Croatia Zagreb|Iceland Reykjavik
Belgium Brussels|Scotland Edinburgh|Wales Cardiff|England London|Libya Tripoli|Zimbabwe Harare|Angola Luanda|Cyprus Nicosia|Latvia Riga|Estonia Tallinn"""
SYMBOLS = """hydrogen H|helium He|lithium Li|carbon C|nitrogen N|oxygen O|fluorine F|neon Ne|sodium Na|magnesium Mg|aluminum Al|silicon Si|phosphorus P
sulfur S|chlorine Cl|argon Ar|potassium K|calcium Ca|titanium Ti|chromium Cr|manganese Mn|iron Fe|cobalt Co|nickel Ni|copper Cu|zinc Zn|bromine Br
silver Ag|tin Sn|iodine I|tungsten W|platinum Pt|gold Au|mercury Hg|lead Pb|uranium U|radium Ra|arsenic As|barium Ba|plutonium Pu"""
CONTINENTS = """France Europe|Kenya Africa|Japan Asia|Brazil South America|Canada North America|Nigeria Africa|India Asia|Peru South America|Mexico North America
Poland Europe|Ethiopia Africa|Thailand Asia|Chile South America|Cuba North America|Sweden Europe|Ghana Africa|Vietnam Asia|Argentina South America
Greece Europe|Morocco Africa|China Asia|Bolivia South America|Jamaica North America|Norway Europe|Senegal Africa|Nepal Asia|Uruguay South America
Spain Europe|Zimbabwe Africa|Mongolia Asia|Ecuador South America|Germany Europe|Uganda Africa|Pakistan Asia|Colombia South America|Italy Europe"""
OPPOSITES = """hot cold|big small|fast slow|high low|light dark|rich poor|happy sad|young old|strong weak|early late|empty full|open closed|hard soft
wet dry|clean dirty|deep shallow|wide narrow|thick thin|long short|cheap expensive|easy difficult|loud quiet|sweet bitter|true false|right wrong
inside outside|above below|begin end|buy sell|win lose|love hate|push pull|day night|black white|male female|north south|east west|front back
first last|always never|more less|war peace|life death|friend enemy|question answer|summer winter|heavy light|smooth rough|brave cowardly|alive dead"""
PASTS = """go went|eat ate|see saw|take took|come came|give gave|run ran|write wrote|drive drove|speak spoke|break broke|choose chose|fly flew|know knew
grow grew|throw threw|draw drew|sing sang|swim swam|begin began|drink drank|ring rang|sit sat|stand stood|find found|think thought|buy bought
bring brought|teach taught|catch caught|sleep slept|keep kept|feel felt|leave left|lose lost|build built|send sent|spend spent|make made|hold held
tell told|sell sold|say said|pay paid|hear heard|meet met|win won|fall fell|forget forgot|wake woke"""
PLURALS = """child children|man men|woman women|foot feet|tooth teeth|mouse mice|goose geese|person people|leaf leaves|knife knives|wife wives|life lives
wolf wolves|half halves|city cities|baby babies|lady ladies|story stories|box boxes|bus buses|church churches|potato potatoes|tomato tomatoes|hero heroes"""
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Liam Maria Noah Olivia Peter Rosa Sam Tina Victor".split()
THINGS = "key ball book cup hat coin bell lamp map rope shoe ring kite drum spoon clock".split()
PLACES = "kitchen garden garage office library attic cellar hall station school market church".split()


def pairs(text: str) -> list[tuple[str, str]]:
    known = [item for line in text.splitlines() for item in line.split("|")]
    # "New Zealand Wellington": all words but the last name the subject, unless the answer has two words.
    two_words = (
        "Addis Ababa",
        "New Delhi",
        "Phnom Penh",
        "Mexico City",
        "Buenos Aires",
        "South America",
        "North America",
    )
    cut = [
        next((len(item) - len(end) for end in two_words if item.endswith(" " + end)), item.rfind(" ") + 1)
        for item in known
    ]
    return [(item[:at].strip(), item[at:]) for item, at in zip(known, cut)]


def facts(chooser: random.Random) -> list[list[str]]:
    kinds = [
        ("capital", CAPITALS, "The capital of {} is"),
        ("symbol", SYMBOLS, "The chemical symbol for {} is"),
        ("continent", CONTINENTS, "{} is a country in"),
        ("opposite", OPPOSITES, "The opposite of {} is"),
        ("past", PASTS, "The past tense of the verb {} is"),
        ("plural", PLURALS, "One {}, two"),
    ]
    rows = []
    for kind, text, stem in kinds:
        known = pairs(text)
        answers = sorted({answer for _, answer in known})
        for subject, answer in known:
            wrong = chooser.sample([other for other in answers if other != answer], 3)
            rows.append(question(chooser, kind, stem.format(subject), answer, wrong))
    chooser.shuffle(rows)  # so that the first questions, which a limit keeps, are of every kind
    return rows


def reading(chooser: random.Random, n: int = 400) -> list[list[str]]:
    """Three kinds, from easy to hard: who was given it, what was taken, what lies there."""
    rows = []
    for number in range(n):
        people, things, place = chooser.sample(NAMES, 4), chooser.sample(THINGS, 7), chooser.choice(PLACES)
        if number % 3 == 0:
            kind, answer, wrong = "receiver", people[1], [people[0], *people[2:]]
            stem = f"When {people[0]} and {people[1]} went to the {place}, {people[0]} gave a {things[0]} to"
        elif number % 3 == 1:
            kind, answer, wrong = "taken", things[0], things[1:4]
            stem = f"{people[2]} lost the {things[1]}. {people[0]} gave the {things[0]} to {people[1]}. {people[1]} thanked {people[0]} and took the"
        else:
            kind, answer, wrong = "listed", things[0], things[4:]
            listed = [f"a {thing}" for thing in chooser.sample(things[:4], 4)]
            stem = f"{people[0]} went to the {place} and bought {', '.join(listed[:3])} and {listed[3]}. In the bag there is a"
        rows.append(question(chooser, kind, stem, answer, wrong))
    return rows


def question(chooser: random.Random, kind: str, stem: str, answer: str, wrong: list[str]) -> list[str]:
    choices = [answer, *wrong]
    chooser.shuffle(choices)
    return [kind, stem, *choices, str(choices.index(answer))]


if __name__ == "__main__":
    for name, rows in {"facts": facts(random.Random(0)), "reading": reading(random.Random(1))}.items():
        with (Path(__file__).parent / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [["kind", "stem", "a", "b", "c", "d", "answer"], *rows]
            )
