"""The commands `export` and `import`: models to and from Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.model.huggingface import (
    CONFIG,
    hugging_face_config,
    import_model,
    read_hugging_face_config,
    weight_files,
    write_hugging_face,
)
from sbp_fast.model.saved import load_model, save_model
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


def import_hugging_face(hf_directory: Path, out: Path, *, force: bool = False) -> None:
    """Turn a Hugging Face directory of Qwen3 or Llama into a saved model, in float32.

    Raises:
        UserError: there is no such directory, it has another architecture or weights that do not fit its configuration, or
            `out` holds another output (unless `force`).
    """
    directory = Path(hf_directory)
    read_hugging_face_config(directory)  # refuses before anything is written
    files = [directory / CONFIG, *weight_files(directory)]

    def body(context: StageContext) -> None:
        save_model(import_model(directory), context.directory)

    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in files}
    run_stage("import", out, config={}, inputs=inputs, body=body, console=QUIET, force=force)
