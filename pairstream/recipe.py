"""Recipes: YAML in, frozen and checked configuration out, with overrides from the command line."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Tag, TypeAdapter, ValidationError

from pairstream.atomic import write_text
from pairstream.errors import nearest


class Config(BaseModel):
    """Base of every configuration class: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


RecipeT = TypeVar("RecipeT", bound=Config)


def recipe_names(stage: str) -> list[str]:
    """Names of the recipes that a stage carries, without path and suffix."""
    folder = files(stage) / "recipes"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_recipe(stage: str, name: str) -> Path:
    """Resolve a recipe given as a path or by its bare name.

    Args:
        stage: The package whose `recipes/` folder is searched.
        name: `path/to/file.yaml`, or the name of a carried recipe.

    Returns:
        The file.

    Raises:
        FileNotFoundError: Neither exists; the message names the nearest recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    carried = Path(str(files(stage) / "recipes" / f"{name.removesuffix('.yaml')}.yaml"))
    if carried.is_file():
        return carried
    names = recipe_names(stage)
    raise FileNotFoundError(
        f"no recipe {name!r}: expected a YAML file or one of {', '.join(names)}{nearest(name, names)}"
    )


def load_recipe(kind: type[RecipeT], stage: str, name: str, overrides: Sequence[str] = ()) -> RecipeT:
    """Read a recipe and apply command-line overrides.

    Args:
        kind: The stage's recipe class.
        stage: The stage's package name.
        name: A path or a carried recipe's name.
        overrides: Words such as `["--optim.lr", "1e-3"]`.

    Returns:
        The validated, frozen recipe.

    Raises:
        FileNotFoundError: No such recipe.
        ValueError: Not YAML, an unknown key (with the nearest valid one), a wrong type, an impossible
            combination; each named with its file and key.
    """
    path = find_recipe(stage, name)
    recipe = validate(kind, with_required(kind, read_recipe(path), overrides), str(path))
    return override(recipe, overrides, str(path)) if overrides else recipe


def read_recipe(path: Path) -> dict[str, Any]:
    """What a recipe's file says.

    Raises:
        ValueError: It is not YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML recipe: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a recipe (a mapping of keys), got {type(content).__name__}")
    return content


def show_keys(kind: type[Config], stage: str, name: str, program: str) -> None:
    """Print the keys of a recipe with the values that it gives them, and end the process; see `load_recipe`.

    Required keys may be missing in the recipe: the help that is printed names them as required.
    """
    path = find_recipe(stage, name)
    override(outline(kind, read_recipe(path), str(path)), ["--help"], program)


def outline(kind: type[Config], content: dict[str, Any], source: str) -> Any:
    """A recipe, or a part of one, that lacks what its content lacks; `--help` needs no more.

    Raises:
        ValueError: There is another fault than a missing key.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        if any(fault["type"] != "missing" for fault in error.errors()):
            raise ValueError(explain(kind, error, source)) from error
    parts: dict[str, Any] = {}
    for name, value in content.items():
        annotation: Any = kind.model_fields[name].annotation
        try:
            parts[name] = TypeAdapter(annotation).validate_python(value)
        except ValidationError:  # keys are missing in it
            if not isinstance(value, dict):
                continue
            for choice in alternatives(annotation):
                if isinstance(choice, type) and issubclass(choice, Config):
                    tag = choice.model_fields.get("kind")
                    if tag is None or tag.default == value.get("kind"):
                        parts[name] = outline(choice, value, source)
    return kind.model_construct(**parts)


def with_required(kind: type[BaseModel], content: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A recipe's content, with what command-line words say of required keys that it lacks.

    The rest of the words is left to `override`, which can change a whole recipe only.
    """
    given: dict[tuple[str, ...], list[str]] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            path, value = path_and_value(words, number)
            after = next((n for n in range(number + 1, len(words)) if words[n].startswith("--")), len(words))
            given[tuple(path)] = [value] if "=" in word else list(words[number + 1 : after])
    content = copy.deepcopy(content)
    for wanted, as_list in (("missing", False), ("tuple_type", True), ("list_type", True)):
        try:
            kind.model_validate(content)
        except ValidationError as error:
            faults = [fault for fault in error.errors() if fault["type"] == wanted]
        else:
            break
        for fault in faults:
            path = tuple(keys_of(kind, fault["loc"]))
            values = given.get(path)
            if values:
                put(content, path, values if as_list or len(values) > 1 else values[0])
    return content


def put(content: Any, path: Sequence[str], value: Any) -> None:
    """Set a key inside mappings and lists."""
    for key in path[:-1]:
        content = content[int(key)] if isinstance(content, list) else content[key]
    content[path[-1]] = value


def override(recipe: RecipeT, words: Sequence[str], source: str = "the recipe") -> RecipeT:
    """Apply command-line words to a recipe; see `load_recipe`.

    `--KEY.kind KIND` goes over to another kind of configuration: what the recipe itself says of keys that this kind
    has, too, stays where it fits; its other keys have their defaults.
    """
    said = f"{source} with {' '.join(words)}"
    named = [path_and_value(words, number) for number, word in enumerate(words) if word.startswith("--")]
    # Kinds first, and outer ones before those inside, since they decide which keys there are.
    for path, value in sorted(named, key=lambda pair: (pair[0][-1] != "kind", len(pair[0]))):
        recipe = make_room(recipe, path, value, said)

    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def unchecked(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Leave the checks to `validate` below: tyro would report a broken rule in words of its own, and exit."""
        if not (isinstance(info.type, type) and issubclass(info.type, Config)):
            return None
        fields = []
        for name, field in info.type.model_fields.items():
            default = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
            if isinstance(info.default, info.type):
                default = getattr(
                    info.default, name, default
                )  # a required key of a kind just chosen has none
            kind = offered(field.annotation, default)
            fields.append(StructFieldSpec(name, kind, default, field.description))  # pyright: ignore

        def construct(**values: Any) -> Any:
            return info.type.model_construct(**values)

        construct.__doc__ = info.type.__doc__  # what --help says of these keys
        return StructConstructorSpec(construct, tuple(fields))

    with registry:
        changed = tyro.cli(
            type(recipe),
            default=recipe,
            args=list(words),
            prog=source,
            config=(tyro.conf.AvoidSubcommands,),
        )
    return validate(type(recipe), changed.model_dump(mode="json"), said)


def path_and_value(words: Sequence[str], number: int) -> tuple[list[str], str]:
    """The key that a command-line word names, and the value beside it."""
    name, equals, value = words[number].removeprefix("--").partition("=")
    if not equals:
        value = words[number + 1] if number + 1 < len(words) else ""
    return name.replace("-", "_").split("."), value


def make_room(config: Any, path: Sequence[str], value: str, source: str, above: str = "") -> Any:
    """Give a recipe the kind of configuration that a command-line key asks for, so that tyro finds the key.

    Args:
        config: The recipe, or a part of it.
        path: The key from here on. One that nobody knows is left to tyro, which names the nearest.
        value: What it is to be; matters for `kind`.
        source: For the message.
        above: The path so far.

    Returns:
        The same with another kind, or with a part that was null.

    Raises:
        ValueError: No such kind, or a key of another kind than the one there is.
    """
    name, *rest = path
    if name not in type(config).model_fields or not rest:
        return config
    choices = [
        choice
        for choice in alternatives(type(config).model_fields[name].annotation)
        if isinstance(choice, type) and issubclass(choice, Config)
    ]
    kinds = {
        choice.model_fields["kind"].default: choice for choice in choices if "kind" in choice.model_fields
    }
    part = getattr(config, name, None)
    here = f"{above}{name}"
    if rest == ["kind"] and kinds:
        if value not in kinds:
            raise ValueError(
                f"{source}: {here}.kind: expected one of {', '.join(kinds)}, got {value!r}{nearest(value, kinds)}"
            )
        if getattr(part, "kind", None) != value:
            part = as_kind(part, kinds[value])
    elif part is None and len(choices) == 1:
        part = choices[0].model_construct()  # tyro asks for what has no default
    if isinstance(part, Config):
        having = [kind for kind, choice in kinds.items() if rest[0] in choice.model_fields]
        if having and rest[0] not in type(part).model_fields:
            keys = ", ".join(sorted(set(type(part).model_fields) - {"kind"}))
            owners = " and ".join(filter(None, (", ".join(having[:-1]), having[-1])))
            raise ValueError(
                f"{source}: {here}.{rest[0]}: {here} is of kind {part.kind}, which has {keys}; "  # pyright: ignore
                f"{owners} {'has' if len(having) == 1 else 'have'} {rest[0]}: "
                f"give --{here}.kind {having[0]} for it"
            )
        part = make_room(part, rest, value, source, f"{here}.")
    if part is getattr(config, name, None):
        return config
    return config.model_copy(update={name: part})


def as_kind(part: Any, kind: type[Config]) -> Config:
    """A configuration of another kind, with what was said of the keys that both have, where it fits."""
    kept = {
        name: getattr(part, name)
        for name in (part.model_fields_set if isinstance(part, Config) else ())
        if name != "kind" and name in kind.model_fields
    }
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        wrong = {fault["loc"][0] for fault in error.errors() if fault["loc"]}
    return kind.model_construct(**{name: value for name, value in kept.items() if name not in wrong})


def offered(annotation: Any, default: Any) -> Any:
    """What the command line may set of a key: where plain values and lists of configurations may stand, the one that
    the recipe has. tyro would make subcommands of such a choice.
    """
    if isinstance(default, Config):
        return type(default)  # one kind may be a subclass of another
    choices = alternatives(annotation)
    lists = [
        choice
        for choice in choices
        if get_origin(choice) in (list, tuple)
        and any(isinstance(inner, type) and issubclass(inner, Config) for inner in get_args(choice))
    ]
    plain = [choice for choice in choices if choice not in lists]
    if not lists or not plain:
        return annotation
    has_list = isinstance(default, list | tuple) and any(isinstance(value, Config) for value in default)
    return Union[tuple(lists if has_list else plain)]  # noqa: UP007 - of as many as there are


def validate(kind: type[RecipeT], content: dict[str, Any], source: str) -> RecipeT:
    """Build a recipe from plain data, with errors that name the source and the key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain(kind, error, source)) from error


def dump_recipe(recipe: Config, path: Path) -> None:
    """Write a resolved recipe, which can be run again as it is."""
    write_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def explain(kind: type[BaseModel], error: ValidationError, source: str) -> str:
    """One message for all faults of a recipe."""
    lines = []
    for fault in error.errors():
        key = ".".join(keys_of(kind, fault["loc"])) or "(the whole recipe)"
        if fault["type"] == "extra_forbidden":
            fields = fields_at(kind, fault["loc"][:-1])
            hint = nearest(str(fault["loc"][-1]), fields)
            lines.append(f"{key}: unknown key{hint or '; valid here: ' + ', '.join(fields)}")
        elif fault["type"] == "union_tag_not_found":
            tag = str(fault.get("ctx", {}).get("discriminator")).strip("'")
            lines.append(
                f"{key}: no {tag}, which says what it is: expected {tag} beside the keys {list(fault['input'])}"
            )
        elif fault["type"] == "union_tag_invalid":
            told = fault.get("ctx", {})
            tag, came = str(told.get("discriminator")).strip("'"), str(told.get("tag"))
            valid = [name.strip(" '") for name in str(told.get("expected_tags")).split(",")]
            lines.append(
                f"{key}.{tag}: expected one of {', '.join(valid)}, got {came!r}{nearest(came, valid)}"
            )
        else:
            came = f" (got {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
            said = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            lines.append(f"{key}: {said}{came}")
    return f"{source}: " + ("; ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines))


def keys_of(kind: Any, location: Sequence[int | str]) -> list[str]:
    """A place as its writer knows it: the keys, without the tags of unions."""
    keys: list[str] = []
    for part in location:
        choices = alternatives(kind) if kind is not None else []
        models = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        named = any(part in choice.model_fields for choice in models)
        is_tag = not named and (
            tagged(kind, part) is not None
            or any(
                "kind" in choice.model_fields and choice.model_fields["kind"].default == part
                for choice in models
            )
        )
        if not is_tag:
            keys.append(str(part))
        kind = step_into(kind, part) if kind is not None else None
    return keys


def fields_at(kind: Any, location: Sequence[int | str]) -> list[str]:
    """Names of the fields at a place in a recipe class; union tags in the location are followed."""
    for part in location:
        kind = step_into(kind, part)
        if kind is None:
            return []
    choices = [
        choice for choice in alternatives(kind) if isinstance(choice, type) and issubclass(choice, BaseModel)
    ]
    return sorted({name for choice in choices for name in choice.model_fields})


def step_into(kind: Any, part: int | str) -> Any:
    for choice in alternatives(kind):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            if part in choice.model_fields:
                return choice.model_fields[str(part)].annotation
            tag = choice.model_fields.get("kind")
            if tag is not None and tag.default == part:
                return choice
        elif get_origin(choice) in (list, tuple) and isinstance(part, int):
            return get_args(choice)[0]
    return tagged(kind, part)


def tagged(kind: Any, part: int | str) -> Any:
    """The alternative that a union knows by a pydantic `Tag`; None when there is none of that name."""
    inner = get_args(kind)
    if get_origin(kind) is Annotated:
        if any(isinstance(note, Tag) and note.tag == part for note in inner[1:]):
            return inner[0]
        return tagged(inner[0], part)
    if get_origin(kind) in (Union, types.UnionType):
        return next((found for choice in inner if (found := tagged(choice, part)) is not None), None)
    return None


def alternatives(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for choice in get_args(kind) for inner in alternatives(choice)]
    return [kind]
