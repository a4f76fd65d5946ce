"""Every model moved into the common frame, into a folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from isthmus.checkpoint.folders import new_folder
from isthmus.checkpoint.writing import save_state
from isthmus.models.hugging_face import is_hugging_face
from isthmus.report.schema import RunReport
from isthmus.runs.card import spoken
from isthmus.runs.facts import describe_alignment, describe_proof, describe_symmetry, provenance
from isthmus.runs.folder import save_hugging_face, write_run
from isthmus.runs.inputs import load_inputs
from isthmus.runs.prepare import prepare
from isthmus.runs.recipe import Recipe
from isthmus.symmetry.alignment import apply
from isthmus.symmetry.groups import keeps_function


def run_align(recipe: Recipe, out: Path, *, force: bool = False, command: str = "") -> RunReport:
    """Writes every model, moved into the common frame, and the alignment into a folder; returns the report.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the folder cannot be written.
        IsthmusError: Anything else that `load_inputs` and the steps of the run raise.
    """
    recipe.check()
    with new_folder(out, force) as folder:
        start = time.perf_counter()
        inputs = load_inputs(recipe)
        symmetry, proof, alignment = prepare(recipe, inputs)
        names = _aligned_names([member.model for member in recipe.models])
        if is_hugging_face(inputs.architecture):
            names = [name.removesuffix(".safetensors") for name in names]
        for index, (model, name) in enumerate(zip(inputs.models, names, strict=True)):
            moved = apply(alignment, model, index)
            if is_hugging_face(moved):
                save_hugging_face(moved, recipe, folder / name)
            else:
                save_state(moved.state_dict(), folder / name, metadata={"format": "pt"})
        alignment.save(folder / "alignment.safetensors")
        kept = "each computes the function it had before."
        if not keeps_function(alignment):
            kept = "its linear maps do not commute with nonlinearities, so they do not compute what they did before."
        report = RunReport(
            provenance=provenance(recipe, inputs, command),
            method=describe_alignment(recipe, alignment),
            proof=describe_proof(proof),
            symmetry=describe_symmetry(symmetry, alignment),
            aligned=names,
            seconds=time.perf_counter() - start,
            verdict=f"{len(names)} models aligned by {spoken(recipe.align.method)}; {kept}",
        )
        write_run(folder, recipe, report)
    return report


def _aligned_names(paths: Sequence[str]) -> list[str]:
    """A file name for every aligned model: the source's own where they differ, numbered where not."""
    stems = [Path(path).stem if Path(path).suffix else Path(path).name for path in paths]
    if len(set(stems)) == len(stems) and "alignment" not in stems:
        return [f"{stem}.safetensors" for stem in stems]
    return [f"{index}-{stem}.safetensors" for index, stem in enumerate(stems)]
