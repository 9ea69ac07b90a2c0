"""Build a made-up recipe task, after the one of RL-Struct (arXiv 2512.00319): a request in words, a recipe as JSON.

    tokalign data cooking --output_dir runs/cooking
    tokalign data cooking --output_dir runs/cooking_varied --schemas varied

    Write a recipe for tomato soup for 4 people, with 3 tomatoes, 200 ml cream and 1 onion, ready in 25 minutes.

Every word is this file's own. The request decides the document: dish, people, minutes and ingredients are in it, a
recipe is vegetarian if no ingredient is meat or fish, and the steps follow from the dish's way of cooking, the kinds of
its ingredients and the minutes, so that a right document can be learned and is the only one.

`--schemas varied` draws a schema a row: keys renamed, their order shuffled, a field left out or made optional, facts or
amounts in an object of their own. Documents follow it; an optional field is always given. Splits share no identity
(what is asked, wording and order of the ingredients aside).
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokalign.data.structured import SchemaPromptArguments, ask, assistant, json_text, user, write_structured
from tokalign.stage.errors import ContractError

SPLITS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}  # per cent of identities


class Ingredient(NamedTuple):
    """Words for one and for several, the unit, amounts to draw from, and how it is treated (`PREPARATION`, `WAYS`)."""

    one: str
    many: str
    unit: str
    amounts: tuple[float, ...]
    kind: str
    meat: bool = False


_PIECES, _GRAMS, _MILLILITRES = (1, 2, 3, 4, 5, 6), (100, 150, 200, 250, 300, 400, 500), (50, 100, 150, 200, 250, 400)
_SPOONS, _PINCHES = (1, 2, 3, 4), (0.5, 1, 1.5, 2)
_MANY = {"tomato": "tomatoes", "potato": "potatoes", "sweet potato": "sweet potatoes", "zucchini": "zucchini"}


def _ingredients() -> Iterator[Ingredient]:
    for one in ("tomato", "bell pepper", "zucchini", "leek", "eggplant", "cucumber", "celery stalk"):
        yield Ingredient(one, _MANY.get(one, f"{one}s"), "piece", _PIECES, "chop")
    for one in ("onion", "carrot", "potato", "apple", "sweet potato", "parsnip"):
        yield Ingredient(one, _MANY.get(one, f"{one}s"), "piece", _PIECES, "peel")
    for name in ("spinach", "mushrooms", "broccoli", "green beans", "cauliflower", "cabbage"):
        yield Ingredient(name, name, "g", _GRAMS, "chop")
    yield Ingredient("pumpkin", "pumpkin", "g", _GRAMS, "peel")
    yield Ingredient("garlic", "garlic", "clove", _SPOONS, "mince")
    yield Ingredient("ginger", "ginger", "tsp", _SPOONS, "mince")
    for name in ("tofu", "feta"):
        yield Ingredient(name, name, "g", _GRAMS, "cut")
    for name in ("chicken breast", "beef", "salmon", "ham", "bacon", "shrimp", "turkey"):
        yield Ingredient(name, name, "g", _GRAMS, "cut", True)
    for name in ("spaghetti", "penne", "rice", "red lentils", "couscous", "egg noodles"):
        yield Ingredient(name, name, "g", _GRAMS, "grain")
    for name in ("chickpeas", "kidney beans", "sweetcorn"):
        yield Ingredient(name, name, "can", (1, 2), "drain")
    for name in ("cream", "milk", "coconut milk", "vegetable broth"):
        yield Ingredient(name, name, "ml", _MILLILITRES, "pour")
    yield Ingredient("chicken broth", "chicken broth", "ml", _MILLILITRES, "pour", True)
    for name in ("olive oil", "sunflower oil", "butter"):
        yield Ingredient(name, name, "tbsp", _SPOONS, "fat")
    for name in ("flour", "oats"):
        yield Ingredient(name, name, "g", _GRAMS, "whisk")
    yield Ingredient("egg", "eggs", "piece", _PIECES, "whisk")
    for name in ("parmesan", "cheddar", "mozzarella"):
        yield Ingredient(name, name, "g", (50, 75, 100, 125, 150, 200), "grate")
    yield Ingredient("toast", "toast", "slice", _PIECES, "bread")
    for name in ("salt", "pepper", "paprika", "cumin", "oregano", "curry powder", "cinnamon"):
        yield Ingredient(name, name, "tsp", _PINCHES, "season")
    for name in ("soy sauce", "lemon juice", "honey", "mustard", "basil", "parsley"):
        yield Ingredient(name, name, "tbsp", _SPOONS, "season")


INGREDIENTS = {ingredient.one: ingredient for ingredient in _ingredients()}
UNITS = tuple(dict.fromkeys(ingredient.unit for ingredient in INGREDIENTS.values()))
# way of cooking, what the dish always has, what it may have
DISHES: dict[str, tuple[str, str, str]] = {
    "tomato soup": ("pot", "tomato, onion", "garlic, cream, basil, carrot, vegetable broth, bacon, salt, olive oil"),
    "pumpkin soup": ("pot", "pumpkin, coconut milk", "ginger, onion, chicken broth, curry powder, butter, apple"),
    "potato soup": ("pot", "potato, vegetable broth", "leek, bacon, cream, parsley, carrot, pepper, butter"),
    "leek soup": ("pot", "leek, cream", "potato, onion, ham, vegetable broth, salt, butter, mushrooms"),
    "minestrone": ("pot", "tomato, carrot, celery stalk", "kidney beans, zucchini, penne, cabbage, basil, garlic"),
    "lentil stew": ("pot", "red lentils, carrot", "potato, onion, cumin, vegetable broth, ham, tomato, sunflower oil"),
    "beef stew": ("pot", "beef, potato", "carrot, onion, paprika, celery stalk, parsnip, butter, mustard"),
    "chili": ("pot", "kidney beans, tomato", "beef, sweetcorn, onion, garlic, cumin, paprika, sunflower oil, tofu"),
    "chickpea curry": ("pot", "chickpeas, coconut milk", "spinach, ginger, garlic, curry powder, tomato, onion, rice"),
    "chicken curry": (
        "pot",
        "chicken breast, coconut milk",
        "curry powder, ginger, onion, green beans, rice",
    ),
    "risotto": ("pot", "rice, vegetable broth", "mushrooms, parmesan, onion, butter, shrimp, pumpkin, parsley"),
    "spaghetti with tomato sauce": ("pasta", "spaghetti, tomato", "garlic, basil, onion, parmesan, olive oil, salt"),
    "penne with salmon": ("pasta", "penne, salmon", "cream, spinach, lemon juice, garlic, pepper, butter"),
    "noodles with broccoli": (
        "pasta",
        "egg noodles, broccoli",
        "soy sauce, ginger, garlic, tofu, honey, turkey",
    ),
    "carbonara": ("pasta", "spaghetti, bacon, egg", "parmesan, pepper, garlic, cream, butter, parsley"),
    "vegetable stir-fry": ("pan", "bell pepper, broccoli", "soy sauce, tofu, ginger, carrot, mushrooms, sunflower oil"),
    "fried rice": ("pan", "rice, egg", "soy sauce, carrot, shrimp, ham, sweetcorn, onion, sunflower oil, garlic"),
    "mushroom omelette": ("pan", "egg, mushrooms", "cheddar, milk, parsley, ham, spinach, butter, salt, onion"),
    "potato pancakes": ("pan", "potato, egg, flour", "onion, salt, sunflower oil, apple, parsley, pepper"),
    "apple pancakes": ("pan", "flour, milk, egg, apple", "cinnamon, honey, butter, salt, oats"),
    "vegetable lasagna": (
        "oven",
        "zucchini, eggplant, mozzarella",
        "tomato, garlic, oregano, spinach, beef, butter",
    ),
    "potato gratin": ("oven", "potato, cream", "cheddar, garlic, ham, leek, salt, pepper, butter, cauliflower"),
    "stuffed peppers": ("oven", "bell pepper, rice", "beef, feta, onion, tomato, paprika, oregano, olive oil"),
    "roast chicken and roots": (
        "oven",
        "chicken breast, carrot",
        "parsnip, sweet potato, honey, paprika, onion, salt",
    ),
    "cauliflower cheese": ("oven", "cauliflower, cheddar", "milk, flour, mustard, butter, pepper, bacon"),
    "oat crumble": ("oven", "apple, oats", "butter, honey, cinnamon, flour"),
    "cucumber salad": ("bowl", "cucumber", "feta, lemon juice, olive oil, onion, salt, parsley, honey, shrimp"),
    "couscous salad": ("bowl", "couscous, bell pepper", "chickpeas, tomato, lemon juice, olive oil, parsley, feta"),
    "bean salad": ("bowl", "kidney beans, sweetcorn", "onion, bell pepper, mustard, sunflower oil, turkey, pepper"),
    "cheese toast": ("oven", "toast, cheddar", "ham, tomato, mustard, turkey, onion, mushrooms"),
}
MINUTES = {
    "pot": range(25, 95, 5),
    "pasta": range(20, 50, 5),
    "pan": range(15, 50, 5),
    "oven": range(30, 95, 5),
    "bowl": range(15, 35, 5),
}
# kinds of ingredients and the step that takes them; a step without any ingredient is left out
PREPARATION = (
    (("chop",), "Wash and chop the {them}."),
    (("peel",), "Peel and dice the {them}."),
    (("mince",), "Mince the {them}."),
    (("cut",), "Cut the {them} into pieces."),
    (("drain",), "Drain the {them}."),
    (("grate",), "Grate the {them}."),
)
WAYS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "pot": (
        (("fat",), "Heat the {them} in a pot."),
        (("mince", "peel", "cut"), "Put the {them} into the pot and stir for 5 minutes."),
        (("chop", "grain", "drain", "pour"), "Add the {them} and simmer for {rest} minutes."),
        (("whisk", "bread", "grate", "season"), "Stir in the {them}."),
    ),
    "pasta": (
        (("grain",), "Boil the {them} in salted water."),
        (("fat",), "Heat the {them} in a pan."),
        (("mince", "peel", "cut", "chop", "drain"), "Fry the {them} for {rest} minutes."),
        (("pour", "whisk", "bread", "grate", "season"), "Toss everything with the {them}."),
    ),
    "pan": (
        (("grain",), "Boil the {them} until soft."),
        (("whisk", "pour"), "Whisk the {them} in a bowl."),
        (("fat",), "Heat the {them} in a pan."),
        (("mince", "peel", "cut", "chop", "drain"), "Fry the {them} for {rest} minutes."),
        (("bread", "grate", "season"), "Finish with the {them}."),
    ),
    "oven": (
        (("grain",), "Boil the {them} until soft."),
        (("fat", "pour", "whisk", "season"), "Stir the {them} together."),
        (("bread", "mince", "peel", "cut", "chop", "drain"), "Lay the {them} in a dish."),
        (("grate",), "Cover with the {them}."),
    ),
    "bowl": (
        (("grain",), "Pour hot water over the {them} and wait until it is soaked up."),
        (("fat", "pour", "whisk", "season"), "Stir the {them} into a dressing."),
        (("bread", "mince", "peel", "cut", "chop", "drain", "grate"), "Mix the {them} in a bowl."),
    ),
}
ENDS = {"oven": "Bake for {rest} minutes at 200 degrees.", "bowl": "Let it stand for {rest} minutes."}
WORDINGS = (
    "Write a recipe for {dish} for {people}, with {them}, ready in {time}.",
    "I would like to cook {dish} for {people}. I have {them} and {time}.",
    "How do I make {dish} for {people} in {time} from {them}?",
    "Using {them}, write a recipe for {dish} that serves {people} and takes {time}.",
    "Please write down how to cook {dish}. It should serve {people}, take {time} and use {them}.",
    "Dinner for {people} must be on the table in {time}. The dish is {dish}, the ingredients are {them}.",
    "Recipe wanted: {dish}; for {people}; {time}; {them}.",
    "My cookbook lacks {dish}. Write it down for {people}: {them}. It takes {time}.",
    "In the kitchen there are {them}. Make {dish} for {people} of it within {time}.",
    "There are {time} left to cook {dish} for {people}. Use {them}.",
)
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
TIMES = {30: "half an hour", 45: "three quarters of an hour", 60: "one hour", 90: "an hour and a half"}


# ------------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """What is asked for: ingredients are (name in `INGREDIENTS`, amount)."""

    dish: str
    servings: int
    minutes: int
    ingredients: tuple[tuple[str, float], ...]

    @property
    def identity(self) -> str:
        """Hash of what is asked, wording and order aside; it decides the split and is the row's id."""
        content = (self.dish, self.servings, self.minutes, sorted(self.ingredients))
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """The split that this identity belongs to."""
        per_cent = int(self.identity, 16) % 100
        return next(name for name, (low, high) in SPLITS.items() if low <= per_cent < high)

    @property
    def vegetarian(self) -> bool:
        """No ingredient is meat or fish."""
        return not any(INGREDIENTS[name].meat for name, _ in self.ingredients)


def _named(name: str, amount: float) -> str:
    """The ingredient as request, document and steps call it: "1 onion" but "2 onions"."""
    ingredient = INGREDIENTS[name]
    return ingredient.one if ingredient.unit == "piece" and amount == 1 else ingredient.many


def _measured(name: str, amount: float) -> str:
    unit = INGREDIENTS[name].unit
    if unit == "piece":
        return f"{amount} {_named(name, amount)}"
    if unit in ("clove", "slice", "can"):
        return f"{amount} {unit}{'' if amount == 1 else 's'} of {_named(name, amount)}"
    return f"{amount} {unit} {_named(name, amount)}"


def _listed(words: Sequence[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}" if before else last


def draw_recipe(rng: random.Random) -> Recipe:
    """One recipe, of any split."""
    dish = rng.choice(list(DISHES))
    way, always, perhaps = DISHES[dish]
    extras = perhaps.split(", ")
    names = always.split(", ") + rng.sample(extras, rng.randint(1, min(4, len(extras))))
    rng.shuffle(names)
    ingredients = tuple((name, rng.choice(INGREDIENTS[name].amounts)) for name in names)
    return Recipe(dish, rng.randint(1, len(COUNTS)), rng.choice(MINUTES[way]), ingredients)


def recipes(split: str, n: int, *, seed: int = 0) -> Iterator[Recipe]:
    """`n` recipes of a split, no identity twice."""
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while len(seen) < n:
        recipe = draw_recipe(rng)
        if recipe.split == split and recipe.identity not in seen:
            seen.add(recipe.identity)
            yield recipe


def request(recipe: Recipe, rng: random.Random) -> str:
    """The recipe asked for in one of the wordings."""
    count, minutes = recipe.servings, recipe.minutes
    return rng.choice(WORDINGS).format(
        dish=recipe.dish,
        people=f"{rng.choice((str(count), COUNTS[count - 1]))} {'person' if count == 1 else 'people'}",
        time=rng.choice((f"{minutes} minutes", TIMES.get(minutes, f"{minutes} minutes"))),
        them=_listed([_measured(name, amount) for name, amount in recipe.ingredients]),
    )


def steps(recipe: Recipe) -> list[str]:
    """The steps that follow from the recipe: preparation by kind of ingredient, then the dish's way of cooking."""
    way = DISHES[recipe.dish][0]
    written = []
    for kinds, step in PREPARATION + WAYS[way]:
        them = [_named(name, amount) for name, amount in recipe.ingredients if INGREDIENTS[name].kind in kinds]
        if them:
            written.append(step.format(them=_listed(them), rest=recipe.minutes - 10))
    if way in ENDS:
        written.append(ENDS[way].format(rest=recipe.minutes - 10))
    plates = "1 plate" if recipe.servings == 1 else f"{recipe.servings} plates"
    return [*written, f"Serve on {plates}."]


# ------------------------------------------------------------------------------------------------------------- schemas

# every field with the names it may have; the first is that of the fixed schema
KEYS = {
    "name": ("name", "title", "dish"),
    "servings": ("servings", "people", "portions"),
    "minutes": ("minutes", "time_in_minutes", "duration_minutes"),
    "vegetarian": ("vegetarian", "is_vegetarian", "meatless"),
    "ingredients": ("ingredients", "shopping_list", "needed"),
    "steps": ("steps", "instructions", "method"),
    "ingredient": ("name", "item", "ingredient"),
    "amount": ("amount", "quantity", "number"),
    "unit": ("unit", "measure", "unit_of_measure"),
    "facts": ("facts", "details", "overview"),
    "measured": ("measured", "how_much", "size"),
}
FACTS = ("servings", "minutes", "vegetarian")
FIELDS = ("name", *FACTS, "ingredients", "steps")


@dataclass(frozen=True)
class Layout:
    """A schema: the key of each field of `KEYS`, the fields in their order, which are optional, and what is nested."""

    keys: Mapping[str, str]
    fields: tuple[str, ...] = FIELDS
    optional: tuple[str, ...] = ()
    nested_facts: bool = False
    nested_amounts: bool = False


FIXED = Layout({name: names[0] for name, names in KEYS.items()})


def draw_layout(rng: random.Random) -> Layout:
    """A schema of one's own: four in ten leave a field out, four in ten make one optional."""
    keys = {name: rng.choice(names) for name, names in KEYS.items()}
    change = rng.choice(("leave out", "leave out", "optional", "optional", "none"))
    changed = rng.choice((*FACTS, "steps"))
    fields = [name for name in FIELDS if change != "leave out" or name != changed]
    rng.shuffle(fields)
    optional = (changed,) if change == "optional" else ()
    return Layout(keys, tuple(fields), optional, rng.random() < 0.5, rng.random() < 0.5)


def _object(layout: Layout, parts: Mapping[str, tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Schema and value of an object out of those of its fields."""
    schema = {
        "type": "object",
        "properties": {layout.keys[name]: inner for name, (inner, _) in parts.items()},
        "required": [layout.keys[name] for name in parts if name not in layout.optional],
        "additionalProperties": False,
    }
    return schema, {layout.keys[name]: value for name, (_, value) in parts.items()}


def render(recipe: Recipe, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON Schema of the layout, and the recipe as a document under it."""

    def item(name: str, amount: float) -> tuple[dict[str, Any], dict[str, Any]]:
        called: dict[str, tuple[dict[str, Any], Any]] = {"ingredient": ({"type": "string"}, _named(name, amount))}
        measured: dict[str, tuple[dict[str, Any], Any]] = {
            "amount": ({"type": "number"}, amount),
            "unit": ({"enum": list(UNITS)}, INGREDIENTS[name].unit),
        }
        return _object(
            layout, called | ({"measured": _object(layout, measured)} if layout.nested_amounts else measured)
        )

    items = [item(name, amount) for name, amount in recipe.ingredients]
    parts: dict[str, tuple[dict[str, Any], Any]] = {
        "name": ({"type": "string"}, recipe.dish),
        "servings": ({"type": "integer"}, recipe.servings),
        "minutes": ({"type": "integer"}, recipe.minutes),
        "vegetarian": ({"type": "boolean"}, recipe.vegetarian),
        "ingredients": ({"type": "array", "items": items[0][0]}, [value for _, value in items]),
        "steps": ({"type": "array", "items": {"type": "string"}}, steps(recipe)),
    }
    if not layout.nested_facts:
        return _object(layout, {name: parts[name] for name in layout.fields})
    facts = _object(layout, {name: parts[name] for name in layout.fields if name in FACTS})
    outer: dict[str, tuple[dict[str, Any], Any]] = {}
    for name in layout.fields:  # the facts stand where the first of them stood
        outer |= {"facts": facts} if name in FACTS else {name: parts[name]}
    return _object(layout, outer)


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass
class CookingArguments(SchemaPromptArguments):
    """What to build."""

    output_dir: str = field(metadata={"help": "Folder to write to: one folder a split, and the dataset card."})
    train: int = field(default=2000, metadata={"help": "Rows of the train split."})
    validation: int = field(default=200, metadata={"help": "Rows of the validation split."})
    test: int = field(default=500, metadata={"help": "Rows of the test split."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    schemas: str = field(default="fixed", metadata={"help": "'fixed' (one schema) or 'varied' (one a row)."})

    def __post_init__(self) -> None:
        if self.schemas not in ("fixed", "varied"):
            raise ContractError(f"--schemas is {self.schemas!r}; use 'fixed' or 'varied'.")
        if self.schemas == "varied" and not self.show_schema:
            raise ContractError("--schemas varied needs --show_schema, or no prompt would say which keys are wanted.")


def rows(split: str, args: CookingArguments) -> Iterator[dict[str, Any]]:
    """The structured problems of a split."""
    rng = random.Random(f"wordings-{split}-{args.seed}")
    layouts = random.Random(f"schemas-{split}-{args.seed}")  # its own: a row asks the same under either option
    for recipe in recipes(split, getattr(args, split), seed=args.seed):
        schema, document = render(recipe, draw_layout(layouts) if args.schemas == "varied" else FIXED)
        text = json_text(document)
        yield {
            "id": recipe.identity,
            "prompt": user(ask(request(recipe, rng), schema, args)),
            "answer": text,
            "schema": json_text(schema),
            "completion": assistant(text),
        }


def main(args: CookingArguments) -> None:
    """Write every split, and the card."""
    write_structured(
        "cooking",
        {split: list(rows(split, args)) for split in SPLITS},
        lambda row: row,
        args,
        title="Made-up recipes as tokalign structured problems",
        source="generated by tokalign (tokalign data cooking)",
        licence="apache-2.0",
        columns={"id": "hash of what is asked, wording and order of the ingredients aside"},
        notes="Splits share no identity. Steps follow from dish, ingredients and minutes by fixed sentences.",
    )
