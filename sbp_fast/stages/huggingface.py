"""The commands `export` and `import`: models to and from Hugging Face directories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.huggingface import (
    CONFIG,
    hugging_face_config,
    import_model,
    read_hugging_face_config,
    weight_files,
    write_hugging_face,
)
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.vocabulary import MEAN, fit_vocabulary
from sbp_fast.pipeline.files import hash_file
from sbp_fast.pipeline.manifest import check_file
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

QUIET = Console(quiet=True)


def export_hugging_face(model_directory: Path, tokenizer_json: Path, out: Path, *, force: bool = False) -> None:
    """Write a saved model as a Hugging Face directory of Qwen3 or Llama, with its tokenizer.

    Raises:
        UserError: there is no saved model or no tokenizer, transformers could not load the model, or `out` holds another output
            (unless `force`).
    """
    check_file(tokenizer_json)
    model, tokenizer = load_model(model_directory), Tokenizer(tokenizer_json)
    hugging_face_config(model.config, model.vocabulary_size, where=model_directory)  # refuses before anything is written

    def body(context: StageContext) -> None:
        write_hugging_face(model, tokenizer, context.directory, where=model_directory)

    inputs: dict[str, Path | str] = {"model": Path(model_directory), "tokenizer": hash_file(tokenizer_json)}
    run_stage("export", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)


def import_hugging_face(
    hf_directory: Path, out: Path, *, context: int = 0, console: Console = QUIET, force: bool = False
) -> None:
    """Turn a Hugging Face directory of Qwen3 or Llama into a saved model, in float32, with its tokenizer.

    The output's `tokenizer.json` is the directory's with the special tokens of this project, and the model has one row of
    embeddings for each of its tokens (see `fit_vocabulary`). A directory without a tokenizer leaves the rows as they are.

    Args:
        hf_directory: of a model, perhaps with its `tokenizer.json`.
        out: directory of the output.
        context: longest document in tokens, which a seed and its partner together may be twice (0: half of the model's
            positions). Training and generation reserve memory for it, and models made for long texts have far more than needed.
        console: says what became of the rows.
        force: replace an output that was made from other inputs.

    Raises:
        UserError: there is no such directory, it has another architecture, weights that do not fit its configuration or a
            tokenizer that does not fit them, fewer positions than `context` takes, or `out` holds another output (unless
            `force`).
    """
    directory = Path(hf_directory)
    shape, _ = read_hugging_face_config(directory)  # refuses before anything is written
    if context > shape.context:
        problem = f"has {2 * shape.context} positions, and documents of {context} tokens take twice their length"
        raise UserError(directory, problem, f"set --context to {shape.context} or less")
    tokenizer_json = directory / TOKENIZER
    tokenizer = Tokenizer(tokenizer_json) if tokenizer_json.is_file() else None

    def body(stage: StageContext) -> None:
        model = import_model(directory)
        model.config = shape.model_copy(update={"context": context or shape.context})
        if tokenizer is None:
            console.say(f"no {TOKENIZER} beside the model: it keeps its {model.vocabulary_size} rows of embeddings")
        else:
            fitted = fit_vocabulary(model, tokenizer, directory)
            for line in fitted.describe():
                console.say(line)
            stage.record(vocabulary=asdict(fitted))
            tokenizer.save(stage.directory / TOKENIZER)
        save_model(model, stage.directory)

    files = [directory / CONFIG, *weight_files(directory), *[tokenizer_json] * (tokenizer is not None)]
    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in files}
    run_stage(
        "import",
        out,
        config={"new_rows": MEAN, "context": context or shape.context},
        inputs=inputs,
        body=body,
        console=console,
        force=force,
    )
