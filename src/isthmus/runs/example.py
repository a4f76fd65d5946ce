"""An example input on which a model runs: asked for, from data, stated by the model or its library, or guessed."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.data.batches import Batch, as_batch
from isthmus.data.sets import DataSet
from isthmus.errors import DataError, InputError
from isthmus.graph.capture import capture
from isthmus.models import exported, hugging_face, sample_shape, sample_tokens

# Shapes of one sample that are tried when nothing says what the model reads, by the rank of its first weight.
USUAL_SHAPES = {2: ((),), 3: ((128,),), 4: ((32, 32), (28, 28), (224, 224), (8, 8)), 5: ((16, 32, 32),)}

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
SYNTAX = "3,32,32 or 128:int64:1000 (shape:dtype:bound) or, of several inputs, 'ids=16:int64:1000; image=3,32,32'"

# How many samples an example has, and how many more data must run with: a program that was exported for one number of
# samples would fail later.
SAMPLES = 2


@dataclass(frozen=True)
class InputShape:
    """One input as it was asked for.

    Attributes:
        name: The keyword that the model takes it by, or None for a positional input.
        shape: Shape of one sample.
        dtype: Its kind of number; None is the model's own floating-point type, or int64 if it says it reads tokens.
        bound: Integers are drawn from 0 to here, exclusive; None leaves that to the model and its first embedding.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    bound: int | None = None


def parse_input(text: str) -> tuple[InputShape, ...]:
    """The inputs in a text such as `3,32,32`, `128:int64:1000` or `ids=16:int64:1000; image=3,32,32`.

    Raises:
        InputError: It is none.
    """
    found = tuple(_parse_one(text, item.strip()) for item in text.split(";"))
    names = [each.name for each in found if each.name is not None]
    if len(set(names)) < len(names):
        raise InputError(f"--input {text!r}: a name stands there twice; give every input once")
    if any(a.name is not None and b.name is None for a, b in itertools.pairwise(found)):
        raise InputError(f"--input {text!r}: give inputs without a name first, as a call does")
    return found


def _parse_one(text: str, item: str) -> InputShape:
    """One of the inputs in a text.

    Raises:
        InputError: It is none.
    """
    name, equals, rest = item.partition("=")
    sizes, *more = (part.strip() for part in (rest if equals else item).split(":"))
    numbers = [part.strip() for part in sizes.replace("x", ",").split(",")] if sizes else []
    if equals and not name.strip().isidentifier():
        raise InputError(f"--input {text!r}: {name.strip()!r} is no name of an input; write {SYNTAX}")
    if (not numbers and not more) or len(more) > 2 or not all(part.isdecimal() and int(part) > 0 for part in numbers):
        raise InputError(f"--input {text!r}: give the shape of one sample, such as {SYNTAX}")
    if more and more[0] not in DTYPES:
        raise InputError(f"--input {text!r}: no dtype {more[0]!r}; choose from {', '.join(DTYPES)}")
    dtype = getattr(torch, more[0]) if more else None
    if len(more) == 2 and (not more[1].isdecimal() or int(more[1]) < 1 or not more[0].startswith("int")):
        raise InputError(f"--input {text!r}: {more[1]!r} is no bound; integers take one, such as 128:int64:1000")
    shape = tuple(int(part) for part in numbers)
    return InputShape(name.strip() if equals else None, shape, dtype, int(more[1]) if len(more) == 2 else None)


def example_input(model: nn.Module, wanted: Sequence[int] | str | None, data: DataSet | None) -> tuple[Batch, str]:
    """A batch of two inputs on which the model runs, and what was assumed to make it.

    It is the one asked for, else the data's, else the one that the model or its library states, else one that the first
    weight suggests. Random numbers are the same in every call.

    Args:
        model: The model, in `eval()`.
        wanted: Shape of one sample, or a text as `parse_input` reads it.
        data: The data set that the model is to run on.

    Raises:
        DataError: The model does not run on the data.
        InputError: The model does not run on what was asked for, or on anything that is stated or can be guessed.
    """
    reference = next((t for t in model.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    if wanted is not None:
        inputs = parse_input(wanted) if isinstance(wanted, str) else (InputShape(None, tuple(wanted)),)
        batch, assumed = _drawn(model, inputs, reference)
        if failure := _why_not(model, batch):
            raise InputError(f"the model does not run on --input {_spoken_shapes(batch)} ({failure}): give another")
        return batch, assumed
    if data is not None:
        return _from_data(model, data, reference), ""
    tried = ""
    for batch, assumed in _candidates(model, reference):
        failure = _why_not(model, batch)
        if not failure:
            return batch, assumed
        tried = tried or f"; on {_spoken_shapes(batch)} it does not ({failure})"
    raise InputError(f"no input is known on which the model runs{tried}: give --input, such as {SYNTAX}, or --data")


def _from_data(model: nn.Module, data: DataSet, reference: Tensor) -> Batch:
    """The first samples of the data's test part.

    Raises:
        DataError: The model does not run on them, or only on some number of them.
    """
    for samples in (SAMPLES + 1, SAMPLES):
        batch = as_batch(next(iter(data.test(samples)))[0]).to(reference.device, reference.dtype)
        if failure := _why_not(model, batch):
            few = batch.head(SAMPLES)
            if samples > SAMPLES and few.size < batch.size and not _why_not(model, few):
                raise DataError(
                    f"the model runs on {SAMPLES} samples of {data.name} and not on {samples} ({failure}): "
                    "export it with a dynamic batch size"
                )
            raise DataError(
                f"the model does not run on {data.name} (samples {data.sample_shape}: {failure}): check --model"
            )
    return batch


def _candidates(model: nn.Module, reference: Tensor) -> Iterator[tuple[Batch, str]]:
    """Inputs to try, best first, and what was assumed to make each."""
    generator = torch.Generator().manual_seed(0)
    stated = sample_shape(model)
    if stated is not None:
        yield _drawn(model, (InputShape(None, stated),), reference)
        return
    own = exported.example_in_program(model)
    if own is not None:
        yield Batch(*own).to(reference.device, reference.dtype), ""
        return
    if hugging_face.is_hugging_face(model):
        found = hugging_face.example_for_config(model, SAMPLES, generator)
        for index, named in enumerate(found):
            batch = Batch((), named).to(reference.device, reference.dtype)
            assumed = f"inputs {_spoken_shapes(batch)}, from the model's configuration"
            yield batch, assumed + (", leaving out others that it can read" if index else "")
        return
    weight = next((t for t in model.state_dict().values() if t.ndim >= 2), None)
    for rest in USUAL_SHAPES.get(weight.ndim, ()) if weight is not None else ():
        assert weight is not None
        shape = (weight.shape[1], *rest)
        batch, _ = _drawn(model, (InputShape(None, shape),), reference)
        yield batch, f"inputs of shape {shape}, from the first weight's shape {tuple(weight.shape)}"


def _drawn(model: nn.Module, inputs: Sequence[InputShape], reference: Tensor) -> tuple[Batch, str]:
    """Random inputs as they were asked for, on the device of `reference`, and what was assumed of integers' range.

    Numbers of no stated kind are of the dtype of `reference`.
    A model that reads tokens and says how many there are, in its attribute `sample_tokens`, gets such by default.
    """
    vocabulary = sample_tokens(model)
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    assumed = ""
    for each in inputs:
        shape = (SAMPLES, *each.shape)
        kind = each.dtype or (reference.dtype if vocabulary is None else torch.int64)
        if kind.is_floating_point:
            value = torch.randn(shape, generator=generator, dtype=kind)
        elif kind == torch.bool:
            value = torch.randint(2, shape, generator=generator).bool()
        else:
            bound = each.bound or vocabulary
            if bound is None:
                bound = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
                assumed = f"integers from 0 to {bound - 1}" + (", the rows of the first embedding" if bound > 2 else "")
            value = torch.randint(bound, shape, generator=generator, dtype=kind)
        if each.name is None:
            args.append(value.to(reference.device))
        else:
            kwargs[each.name] = value.to(reference.device)
    return Batch(tuple(args), kwargs), assumed


def _why_not(model: nn.Module, batch: Batch) -> str:
    """Why the model does not run on a batch, in one line; empty where it does.

    A model whose parameters have no numbers is captured instead.
    """
    own = batch.clone()  # a model may work in place on what it is given
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            capture(model, own.args, own.kwargs)
            return ""
        with torch.no_grad():
            model(*own.args, **own.kwargs)
    except Exception as error:  # a foreign model may raise anything on inputs that do not fit
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


def sample_shapes(batch: Batch) -> dict[str, list[int]]:
    """Shape of one sample of every input, by name, or by number for positional ones."""
    named: dict[str, Any] = {str(index): value for index, value in enumerate(batch.args)}
    named |= dict(batch.kwargs)
    return {name: list(value.shape[1:]) for name, value in named.items() if isinstance(value, Tensor)}


def _spoken_shapes(batch: Batch) -> str:
    """The shapes of one sample in running text, such as `3,32,32` or `input_ids=16:int64`."""
    parts = []
    for name, value in [(None, x) for x in batch.args] + list(batch.kwargs.items()):
        if isinstance(value, Tensor):
            text = ",".join(str(size) for size in value.shape[1:])
            text += "" if value.is_floating_point() else f":{str(value.dtype).removeprefix('torch.')}"
            parts.append(text if name is None else f"{name}={text}")
    return "; ".join(parts)
