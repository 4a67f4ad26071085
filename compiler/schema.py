"""The build file's keys, types and limits. Validation, messages and the JSON Schema for editors all come from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Percentile = Annotated[int, Field(ge=1, le=99)]
Length = Annotated[int, Field(gt=0)]
PerChannel = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(strict=False, min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputTable(_Table):
    """One input of the model."""

    name: str | None = Field(default=None, description="Parameter of the model's forward; by position if left out.")
    shape: tuple[Length, ...] = Field(strict=False, description="Shape of one sample, without the batch.")
    dtype: Literal[DTYPES] = Field(default="float32", description="torch's name of the element type.")  # type: ignore[valid-type]


def _list_of_inputs(value: Any) -> Any:
    """``{ids = {shape = [128]}}`` and ``{ids = [128]}`` read as ``[{name = "ids", shape = [128]}]``."""
    if not isinstance(value, Mapping):
        return value
    if "shape" in value and not isinstance(value["shape"], Mapping):
        return [value]
    return [{"name": name, **entry} if isinstance(entry, Mapping) else {"name": name, "shape": entry} for name, entry in value.items()]


_InputForms = list[InputTable] | dict[str, InputTable | list[int]] | InputTable


class ModelTable(_Table):
    """Where the fine-tuned model comes from."""

    source: str = Field(description="'file.py:function' that returns a torch module, a '.pt2' file, or a Hugging Face folder.")
    weights: str | None = Field(
        default=None, description="State dict for a 'file.py:function' module: .safetensors, or a torch file that loads with weights_only."
    )
    inputs: Annotated[tuple[InputTable, ...], Field(strict=False), BeforeValidator(_list_of_inputs, json_schema_input_type=_InputForms)] = Field(
        default=(), description="Inputs in order, as a list of {name, shape, dtype} or a table name -> shape. Not needed where the source knows them."
    )


def _pair(value: Any) -> Any:
    """``size = 224`` reads as ``[224, 224]``."""
    return [value, value] if isinstance(value, int) else value


Size = Annotated[tuple[Length, Length], Field(strict=False), BeforeValidator(_pair, json_schema_input_type=int | tuple[int, int])]


class DataTable(_Table):
    """Samples to learn from, to choose by and to judge with."""

    source: str = Field(description="'file.py:function', a folder or .zip of class folders of images, or an .npz.")
    size: Size | None = Field(
        default=None, description="Images: height and width (or one number for both) after a resize of the shorter side and a centre crop."
    )
    mean: PerChannel | None = Field(default=None, description="Images: subtracted per channel, on a scale of 0 to 1. One number means grey images.")
    std: PerChannel | None = Field(default=None, description="Images: divided by, per channel, on a scale of 0 to 1.")
    augment: tuple[Literal["flip", "shift"], ...] = Field(
        (), strict=False, description="Images: random left-right flips and shifts by up to an eighth while training."
    )

    rename: dict[str, str] = Field(default_factory=dict, description="Images: class folders that mean another class, name in the folder -> name of the class.")

    @model_validator(mode="after")
    def _same_channels(self) -> DataTable:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise PydanticCustomError("channels", "has {std} channels but mean has {mean}", {"key": "std", "mean": len(self.mean), "std": len(self.std)})
        if self.std is not None and min(self.std) <= 0:
            raise PydanticCustomError("std", "must be greater than 0", {"key": "std"})
        return self


class AccuracyTable(_Table):
    """What the compiled artifact must keep."""

    metric: str = Field(
        default="top1", description="'top1' (fraction of samples whose largest output is the label), or 'file.py:function' of (outputs, labels)."
    )
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Largest loss against the source model, in the metric's unit: 0.01 is one point of top1."
    )
    floor: Annotated[float, Field(allow_inf_nan=False)] | None = Field(default=None, description="Least value of the metric itself.")

    @model_validator(mode="after")
    def _fractions(self) -> AccuracyTable:
        if self.metric == "top1":
            for key, value in (("max_drop", self.max_drop), ("floor", self.floor)):
                if value is not None and value >= 1:
                    raise PydanticCustomError("fraction", "{value} is not a fraction: one point of top1 is 0.01", {"key": key, "value": value})
        return self


class BudgetTable(_Table):
    """Limits of the artifact as measured on its device; what is left out is free. 1 MB is 1 000 000 bytes."""

    latency_ms: Positive | None = Field(default=None, description="Milliseconds for one sample, at 'percentile'.")
    percentile: Percentile | None = Field(default=None, description="Which percentile of the latencies must be inside latency_ms: 90 if left out.")
    memory_mb: Positive | None = Field(default=None, description="Private dirty memory that the model adds to its process, in MB.")
    size_mb: Positive | None = Field(default=None, description="Size of the artifact's file, in MB.")


class TargetTable(_Table):
    """One artifact to make and measure."""

    name: str = Field(description="A target of 'edgesmith targets', such as onnxruntime, litert or executorch.")
    device: str = Field(default="host", description="A device of 'edgesmith devices'.")
    threads: Annotated[int, Field(ge=1)] = Field(default=1, description="Threads that the runtime may use.")
    budget: BudgetTable | None = Field(default=None, description="Limits of this target where they differ from [budget].")


class PipelineTable(_Table):
    """What happens to the model before it is lowered."""

    passes: tuple[str, ...] = Field(default=(), strict=False, description="Passes in order, with options: 'prune{ratio=0.3}'. See 'edgesmith passes'.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of everything that is random.")


class BuildFile(_Table):
    """edgesmith.toml"""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, title="edgesmith.toml")

    model: ModelTable
    data: DataTable | None = None
    accuracy: AccuracyTable = AccuracyTable()
    budget: BudgetTable = BudgetTable()
    target: tuple[TargetTable, ...] = Field(default=(), strict=False)
    pipeline: PipelineTable = PipelineTable()


_TABLES: dict[tuple[str, ...], type[BaseModel]] = {
    (): BuildFile,
    ("model",): ModelTable,
    ("model", "inputs"): InputTable,
    ("data",): DataTable,
    ("accuracy",): AccuracyTable,
    ("budget",): BudgetTable,
    ("target",): TargetTable,
    ("target", "budget"): BudgetTable,
    ("pipeline",): PipelineTable,
}


def keys_of(table: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that the table at a path (array indices left out) may have; none if there is no such table."""
    return tuple(_TABLES[table].model_fields) if table in _TABLES else ()


def tables_with(key: str) -> tuple[str, ...]:
    """Dotted names of the tables that have ``key``."""
    return tuple(".".join(path) for path, table in _TABLES.items() if path and key in table.model_fields)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the build file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **BuildFile.model_json_schema(mode="validation")}
