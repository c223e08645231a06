"""A recipe: one YAML file with everything about a pipeline run, validated before anything starts."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from pipelines.compute.config import ClusterConfig
from pipelines.conditions.config import CONFIGS, Condition, TextCondition
from pipelines.config import SECRET, Config, merge, runtime
from pipelines.errors import MisuseError, UserError
from pipelines.secrets import refusal
from pipelines.stages.autoencoder.config import AutoencoderConfig
from pipelines.stages.diffusion.config import DiffusionSettings
from pipelines.stages.evaluate.config import EvaluateConfig
from pipelines.stages.export.config import ExportConfig
from pipelines.stages.latents.config import LatentsSettings
from pipelines.stages.pairs.config import PairsConfig
from pipelines.tracking.config import TrackingConfig


class Recipe(Config):
    """Everything about a pipeline run: a section for each stage, and what they share.

    Without `autoencoder` and `diffusion`, a recipe makes pairs alone.

    Args:
        name: the run's name in MLflow and in the report.
        root: where artifacts go; a local folder or any fsspec URL.
        seed: the seed of everything random.
        condition: what the model is conditioned on: its name, or `kind` and settings. Recipes of version 0.1 say it as
            `latents.tokenizer`, `diffusion.text` and `diffusion.caption_dropout`, which still means the same.
        pairs, autoencoder, latents, diffusion, evaluate, export: the stages.
        tracking: MLflow.
        cluster: the Ray cluster to use, or to start.
    """

    name: str
    root: str = runtime("runs/ldm")
    seed: int = 0
    condition: Condition = TextCondition(kind="text")
    pairs: PairsConfig
    autoencoder: AutoencoderConfig | None = None
    latents: LatentsSettings = LatentsSettings()
    diffusion: DiffusionSettings | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = runtime(TrackingConfig())
    cluster: ClusterConfig = runtime(ClusterConfig())

    @model_validator(mode="after")
    def _sections_are_there(self) -> "Recipe":
        # Whether sections fit each other is for the stages to say that a command selects (`plan.check`).
        for name in ("autoencoder", "diffusion"):
            if name in self.model_fields_set and getattr(self, name) is None:
                raise ValueError(f"section `{name}` is empty: fill it in, or take it out to leave the stage out")
        if self.diffusion is not None and self.autoencoder is None:
            raise ValueError("diffusion needs a first stage: add a section `autoencoder` to the recipe")
        for name, needed in (("latents", "autoencoder"), ("evaluate", "diffusion"), ("export", "diffusion")):
            if name in self.model_fields_set and getattr(self, needed) is None:
                raise ValueError(f"section `{name}` needs a section `{needed}`: add it, or take `{name}` out")
        if "://" not in self.pairs.source + self.root and _inside(self.root, self.pairs.source):
            raise ValueError(f"root {self.root} must not lie inside pairs.source {self.pairs.source}: choose another")
        return self

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default written out, as JSON values, without the stages that it leaves out."""
        left_out = {"condition", "autoencoder", "latents"} if self.autoencoder is None else set()
        left_out |= {"diffusion", "evaluate", "export"} if self.diffusion is None else set()
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in left_out}

    def to_yaml(self) -> str:
        """Return the resolved recipe, which is a runnable recipe itself."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: each `a.b=c`, laid over the file; values are YAML.

    Raises:
        UserError: the file cannot be read.
        MisuseError: it is not a recipe: an unknown key, a wrong type, a value out of range.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise MisuseError(f"recipe {path} is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise MisuseError(f"recipe {path} must be a mapping of sections, but holds {type(values).__name__}")
    values = _with_condition(values, str(path))
    changes = [_with_named_kind(_parse_override(override)) for override in overrides]
    # The kind may be named after its settings.
    kind = reduce(lambda known, each: _kind(each, known), changes, _kind(values))
    # For what it refuses of all of them together.
    _with_condition(reduce(merge, changes, {}), "--set", kind)
    laid_over = (_with_condition(each, "--set", kind) for each in changes)
    return parse_recipe(reduce(merge, laid_over, _of_kind(values, kind)), origin=str(path))


def parse_recipe(values: dict[str, Any], *, origin: str = "recipe") -> Recipe:
    """Validate a recipe that is already in memory; raise MisuseError as `load_recipe` does."""
    try:
        return Recipe.model_validate(_with_condition(values, origin))
    except ValidationError as error:
        raise MisuseError(f"{origin}: {_describe(error)}") from error


# Where recipes of version 0.1 had what is the condition's now.
_MOVED = (
    ("latents", "tokenizer", "tokenizer"),
    ("diffusion", "text", "transformer"),
    ("diffusion", "caption_dropout", "dropout"),
)


def _with_condition(values: dict[str, Any], origin: str, kind: Any = "text") -> dict[str, Any]:
    """Move the settings of a text condition from where they were in version 0.1 to `condition`.

    Args:
        values: a recipe, or overrides of one.
        origin: where they come from, for messages.
        kind: of the condition, if they do not say.

    Raises:
        MisuseError: the condition is of another kind, or has them too.
    """
    moved: dict[str, Any] = {}
    kind, condition = _kind(values, kind), values.get("condition")
    there = condition if isinstance(condition, dict) else {"kind": kind}
    for section, old, new in _MOVED:
        if isinstance(values.get(section), dict) and old in values[section]:
            moved[new] = values[section][old]
            values = {**values, section: {name: value for name, value in values[section].items() if name != old}}
            if kind != "text":
                raise MisuseError(
                    f"{origin}: {section}.{old} is of condition text, but the recipe's condition is {kind}: leave "
                    "it out"
                )
            if new in there:
                raise MisuseError(
                    f"{origin}: {section}.{old} is the former name of condition.{new}, which is there too: leave it out"
                )
    return {**values, "condition": {**there, **moved}} if moved else values


def _kind(values: Mapping[str, Any], otherwise: Any = "text") -> Any:
    condition = values.get("condition")
    if condition is None:
        return otherwise
    return condition.get("kind", otherwise) if isinstance(condition, dict) else condition


def _of_kind(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Take out the settings of a condition in whose place overrides put another kind."""
    return _with_named_kind(values) if _kind(values) == kind else {**values, "condition": {"kind": kind}}


def _with_named_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Write a condition that is only named as a mapping, which others can be laid over."""
    condition = values.get("condition")
    return {**values, "condition": {"kind": condition}} if isinstance(condition, str) else values


def _inside(inner: str, outer: str) -> bool:
    folder = Path(outer).expanduser().resolve()
    return folder.is_dir() and Path(inner).expanduser().resolve().is_relative_to(folder)


def _parse_override(text: str) -> dict[str, Any]:
    path, separator, raw = text.partition("=")
    names = path.strip().split(".")
    if not separator or not all(names):
        raise MisuseError(f"--set takes section.key=value, but got {text!r}")
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError as error:
        raise MisuseError(f"--set {path}: {raw!r} is not valid YAML: {' '.join(str(error).split())}") from error
    for name in reversed(names):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def _describe(error: ValidationError) -> str:
    """Return the first problem on one line: where, which value, what to do. Unknown keys first: they cause others."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _UNKNOWN)
    first = problems[0]
    where = ".".join(_written(first["loc"]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == SECRET:
        # Without the value.
        return refusal(".".join([where, *first["ctx"]["path"]])) + more
    if first["type"] in _UNKNOWN:
        known = _known_names(Recipe, first["loc"][:-1])
        nearest = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}{more}"
    if first["type"] == "missing":
        return f"{where} is missing: add it to the recipe or pass --set {where}=VALUE{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    shown = "" if isinstance(first["input"], dict | Config) else f", got {first['input']!r}"
    return f"{where}: {message}{shown}{more}" if where else f"{message}{more}"


def _written(location: tuple[int | str, ...]) -> list[str]:
    """Return a place as a recipe has it: pydantic also names the kind of a condition."""
    parts = [str(part) for part in location]
    return parts[:1] + parts[2:] if parts[:1] == ["condition"] and parts[1:2] and parts[1] in CONFIGS else parts


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _known_names(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the names allowed at a place in a recipe by walking its types."""
    if location[:1] == ("condition",):
        model, location = CONFIGS[str(location[1])], location[2:]
    for part in location:
        model = _section(model, str(part)) or model
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    if dataclasses.is_dataclass(model):
        return ["preset", *(field.name for field in dataclasses.fields(model))]
    return []


def _section(model: Any, name: str) -> Any:
    if isinstance(model, type) and issubclass(model, BaseModel) and name in model.model_fields:
        return _plain_type(model.model_fields[name].annotation)
    if dataclasses.is_dataclass(model):
        return _plain_type(typing.get_type_hints(model).get(name))
    return None


def _plain_type(annotation: Any) -> Any:
    """Return the configuration class inside `Annotated[X, …]`, `tuple[X, ...]` or `X | None`."""
    if typing.get_origin(annotation) in (Annotated, tuple):
        return _plain_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _plain_type(next(arg for arg in typing.get_args(annotation) if arg is not type(None)))
    return annotation
