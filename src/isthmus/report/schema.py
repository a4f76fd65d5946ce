"""What `report.json` holds, typed: what runs write, and what the page, the model card and the command line read.

Keys that are missing, as in files of older versions, are None or empty; keys that are not known are kept at the top.
Curves, the simplex, the symmetry and the explanation are JSON, as `Curve.to_dict`, `Simplex.to_dict`,
`describe_symmetry` and `explain_run` write them: the page draws them as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from isthmus.merging.repair import REPAIRS

# A JSON object that is shown, or kept, as it is.
Json = Mapping[str, Any]


class JsonPart:
    """A part of a report: a dataclass whose fields are the keys."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {own.name: _plain(getattr(self, own.name)) for own in fields(self)}  # type: ignore[arg-type]


Part = TypeVar("Part", bound=JsonPart)


def _read_part(kind: type[Part], value: Any) -> Part | None:
    """The part that JSON holds; None for null.

    Raises:
        TypeError: It is no JSON object.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} stands where {kind.__name__} is an object")
    return kind(**{own.name: value[own.name] for own in fields(kind) if own.name in value})  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """A part, or a tuple of parts, as JSON; anything else as it is."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_json() if isinstance(value, JsonPart) else value


@dataclass(frozen=True)
class ParentFile(JsonPart):
    """A checkpoint that was read: its absolute path, and its hash."""

    path: str | None = None
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The last part of the path, "" if there is none."""
        return PurePosixPath(str(self.path or "").replace("\\", "/")).name


@dataclass(frozen=True)
class DataFacts(JsonPart):
    """The data of a run: its name, what one sample is called, and which parts were scored and calibrated on."""

    name: str | None = None
    noun: str | None = None
    score_split: str | None = None
    score_samples: int | None = None
    walked_samples: int | None = None
    calibration_split: str | None = None
    calibration_samples: int | None = None


@dataclass(frozen=True)
class Provenance(JsonPart):
    """What was run, on what, with which versions."""

    isthmus: str
    created: str | None = None
    command: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] | None = None
    model: str | None = None
    models: tuple[ParentFile, ...] = ()
    data: DataFacts | None = None
    assumed: str | None = None


@dataclass(frozen=True)
class MethodFacts(JsonPart):
    """How the models were matched, and what the method reached."""

    name: str
    options: Json | None = None
    objective: float | None = None
    upper_bound: float | None = None
    converged: bool | None = None
    seconds: float | None = None
    details: Json | None = None
    folded: bool | None = None


@dataclass(frozen=True)
class AverageFacts(JsonPart):
    """How the aligned weights were averaged."""

    name: str | None = None
    options: Json | None = None
    coefficients: Sequence[float] | None = None
    coefficients_by_path: Mapping[str, Sequence[float]] | None = None


@dataclass(frozen=True)
class ProofFacts(JsonPart):
    """What the proof of the symmetry measured."""

    max_error: float | None = None
    tolerance: float | None = None
    trials: int | None = None
    weakest_control: float | None = None
    no_ops: Sequence[str] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class ScoreFacts(JsonPart):
    """One network's score; the accuracy is None where targets are no classes."""

    loss: float | None = None
    accuracy: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class RunScores(JsonPart):
    """The scores of a merge, all on the same split.

    Attributes:
        parents: The models' own.
        ensemble: Of the mean of their outputs.
        naive: Of their average as they are.
        naive_mended: The same after the run's repair; None where nothing was repaired.
        aligned: Of the average in the common frame before any repair; None where it is undefined.
        merged: Of what the run wrote.
    """

    parents: tuple[ScoreFacts, ...] = ()
    ensemble: ScoreFacts | None = None
    naive: ScoreFacts | None = None
    naive_mended: ScoreFacts | None = None
    aligned: ScoreFacts | None = None
    merged: ScoreFacts | None = None


SINGLE_SCORES = ("ensemble", "naive", "naive_mended", "aligned", "merged")


def _read_scores(value: Any) -> RunScores | None:
    """The scores that JSON holds; None for null.

    Raises:
        TypeError: It is no JSON object, or one of the scores is none.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} stands where the scores are an object")
    parents = [_read_part(ScoreFacts, each) for each in value.get("parents") or ()]
    single = {name: _read_part(ScoreFacts, value.get(name)) for name in SINGLE_SCORES}
    return RunScores(tuple(each for each in parents if each is not None), **single)


@dataclass(frozen=True)
class RunReport:
    """The report of a merge or of an alignment.

    Attributes:
        provenance: What was run; its keys stand at the top of the file.
        method: The matching.
        average: The averaging; None where models were aligned only.
        repair: Name of the repair; None where nothing was repaired.
        gained_biases: Names of the biases that the repair gave.
        proof: What was proved; None where the proof was left out.
        symmetry: Spaces, frozen axes, gains and gauges.
        aligned: The files of the moved models, where models were aligned only; None where they were merged.
        scores: None where there was no data.
        curves: By pair of models, `models`, `naive` and `aligned`.
        simplex: Between three models, `naive` and `aligned`.
        seconds: Wall time.
        verdict: What was found, in a sentence or two.
        transformers_class: The class that loads the folder, where it is one of Hugging Face.
        left_out: Files of Hugging Face folders on which the parents do not agree.
        explain: What `isthmus explain` added.
        others: Keys that this version does not know.
        features: The content of `features.json`, for the page; not part of the file.
    """

    provenance: Provenance
    method: MethodFacts
    symmetry: Json
    verdict: str
    average: AverageFacts | None = None
    repair: str | None = None
    gained_biases: Sequence[str] | None = None
    proof: ProofFacts | None = None
    aligned: Sequence[str] | None = None
    scores: RunScores | None = None
    curves: Sequence[Json] | None = None
    simplex: Json | None = None
    seconds: float | None = None
    transformers_class: str | None = None
    left_out: Sequence[str] | None = None
    explain: Json | None = None
    others: Json = field(default_factory=dict)
    features: Json | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunReport":
        """The report in the content of a `report.json` that has the keys of `NEEDED`.

        Raises:
            TypeError: It is built otherwise.
        """
        own = {each.name for each in fields(cls)} - {"provenance", "others", "features"}
        origin = {each.name for each in fields(Provenance)}
        known = {name: content[name] for name in own if name in content}
        known |= {
            "method": _read_part(MethodFacts, content["method"]),
            "average": _read_part(AverageFacts, content.get("average")),
            "proof": _read_part(ProofFacts, content.get("proof")),
            "scores": _read_scores(content.get("scores")),
        }
        models = tuple(_required(_read_part(ParentFile, each)) for each in content["models"])
        provenance = Provenance(
            **{name: content[name] for name in origin if name in content}
            | {"models": models, "data": _read_part(DataFacts, content.get("data"))}
        )
        others = {name: value for name, value in content.items() if name not in own | origin}
        return cls(provenance, others=others, **known)

    def to_json(self) -> dict[str, Any]:
        """The content of `report.json`: of an alignment without the keys of a merge, and the other way round."""
        merged = {} if self.aligned is not None else {
            "average": _plain(self.average), "repair": self.repair, "gained_biases": list(self.gained_biases or ()),
        }  # fmt: skip
        measured = {"aligned": list(self.aligned)} if self.aligned is not None else {
            "scores": _plain(self.scores), "curves": self.curves, "simplex": self.simplex,
        }  # fmt: skip
        extra = {name: getattr(self, name) for name in ("transformers_class", "left_out", "explain")}
        return {
            **self.provenance.to_json(),
            "method": self.method.to_json(),
            **merged,
            "proof": _plain(self.proof),
            "symmetry": self.symmetry,
            **measured,
            "seconds": self.seconds,
            "verdict": self.verdict,
            **self.others,
            **{name: value for name, value in extra.items() if value is not None},
        }

    @property
    def has_repaired(self) -> bool:
        """Whether the repair changed anything: then the naive average was repaired as well, and both were scored."""
        return bool(self.repair) and self.scores is not None and self.scores.naive_mended is not None

    @property
    def spoken_repair(self) -> str | None:
        """What was done to the merged network's statistics, in words; None if nothing, or nothing known here."""
        kind = REPAIRS.get(self.repair or "")
        return None if kind is None else kind.text


NEEDED = ("isthmus", "models", "method", "symmetry", "verdict")


def _required(part: ParentFile | None) -> ParentFile:
    """A part that must be there.

    Raises:
        TypeError: It is not.
    """
    if part is None:
        raise TypeError("null stands where a model is an object")
    return part


class ScoreRow(NamedTuple):
    """One network in the table of scores: its name, what it is, its score, and its kind for styles."""

    name: str
    note: str
    score: ScoreFacts
    kind: str


def score_rows(report: RunReport) -> list[ScoreRow]:
    """The table of scores, for the page, the model card and the command line; networks without a score are left out.

    Where nothing was repaired, the aligned average is the merged network and has no row of its own.
    """
    found = report.scores
    if found is None:
        return []
    average = report.average.name if report.average is not None else None
    averaged = "averaged" if average in (None, "mean") else f"combined by {average}"
    files = [model.file for model in report.provenance.models]
    rows = [
        (f"Parent {index}", files[index] if index < len(files) else "", score, "parent")
        for index, score in enumerate(found.parents)
    ]
    ending = ", repaired: what this run wrote" if report.has_repaired else ": what this run wrote"
    costly = f"mean of the parents’ outputs, at the cost of {len(files)} networks"
    rows += [
        (
            "Ensemble",
            costly,
            found.ensemble,
            "reference",
        ),
        ("Naive", "averaged as they are", found.naive, "naive"),
        ("Naive, repaired", "averaged as they are, then repaired", found.naive_mended, "naive"),
        ("Aligned", f"aligned, {averaged}", found.aligned if report.has_repaired else None, "aligned"),
        ("Merged", f"aligned, {averaged}{ending}", found.merged, "merged"),
    ]
    return [ScoreRow(name, note, score, kind) for name, note, score, kind in rows if score is not None]
