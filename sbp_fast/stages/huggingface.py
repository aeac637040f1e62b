"""The commands `export` and `import`: models to and from Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

from sbp_fast.config import ModelConfig
from sbp_fast.data.tokenizer import Tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.huggingface import (
    CONFIG,
    DTYPES,
    hugging_face_config,
    import_model,
    read_hugging_face_config,
    read_positions,
    weight_files,
    write_hugging_face,
)
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.pipeline.files import atomic_open, hash_file, hash_value
from sbp_fast.pipeline.manifest import MANIFEST, Manifest, check_file
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.train.task import SYNTHESIZER

QUIET = Console(quiet=True)
IMPORT = "import"


def export_hugging_face(
    model_directory: Path, tokenizer_json: Path, out: Path, *, dtype: str = "float32", card: str = "", force: bool = False
) -> Manifest:
    """Write a saved model as a Hugging Face directory of Qwen3 or Llama, with its tokenizer.

    Args:
        model_directory: output of `train`, `choose` or `import`.
        tokenizer_json: the tokenizer of the model's training corpus.
        out: directory of the output.
        dtype: of the weights: float32, bfloat16 or float16.
        card: content of `README.md`, the model card; "" writes none.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: there is no saved model or no tokenizer, the tokenizer is not the model's, transformers could not load the
            model, a weight is not finite in `dtype`, or `out` holds another output (unless `force`).
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}", "is unknown", f"choose from {', '.join(DTYPES)}")
    check_file(tokenizer_json)
    manifest, tokenizer = Manifest.read(model_directory), Tokenizer(tokenizer_json)
    require_tokenizer_of(manifest, model_directory, tokenizer_json)
    model = load_model(model_directory)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        problem = f"has {tokenizer.vocabulary_size} tokens, the model {model.vocabulary_size}"
        raise UserError(tokenizer_json, problem, "give the corpus that the model was trained on")
    positions = trained_positions(manifest, model.config)
    # refuses before anything is written
    hugging_face_config(model.config, model.vocabulary_size, positions=positions, where=model_directory)

    def body(context: StageContext) -> None:
        write_hugging_face(model, tokenizer, context.directory, positions=positions, dtype=dtype, where=model_directory)
        if card:
            with atomic_open(context.directory / "README.md") as file:
                file.write(card.encode())

    inputs: dict[str, Path | str] = {"model": Path(model_directory), "tokenizer": hash_file(tokenizer_json)}
    if card:
        inputs["model card"] = hash_value(card)
    return run_stage("export", out, config={"dtype": dtype}, inputs=inputs, body=body, console=QUIET, force=force)


def require_tokenizer_of(manifest: Manifest, model_directory: Path, tokenizer_json: Path) -> None:
    """Refuse the tokenizer of another corpus than a model was trained on, as far as manifests say which that is.

    Raises:
        UserError: the model's training read another corpus.
    """
    trained_on, corpus = manifest.inputs.get("corpus"), tokenizer_json.parent
    if trained_on and (corpus / MANIFEST).is_file() and Manifest.read(corpus).fingerprint != trained_on:
        raise UserError(model_directory, f"was not trained on {corpus}", "give the corpus that it was trained on")


def trained_positions(manifest: Manifest, config: ModelConfig) -> int:
    """Return the longest chain of positions that a model was trained on.

    An arm reads documents of at most a context; a synthesizer a seed of a context, and after it a partner of another one.

    Args:
        manifest: of the directory that holds the model.
        config: the model's shape.
    """
    if manifest.stage == IMPORT:
        return int(manifest.counts.get("positions", 2 * config.context))  # the first imports did not count them
    return 2 * config.context if manifest.counts.get("arm") == SYNTHESIZER else config.context


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
        context.record(positions=read_positions(directory))

    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in files}
    run_stage(IMPORT, out, config={}, inputs=inputs, body=body, console=QUIET, force=force)
