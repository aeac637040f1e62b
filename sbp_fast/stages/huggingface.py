"""The commands `export` and `import`: models to and from Hugging Face directories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from sbp_fast.config import ModelConfig, RunConfig
from sbp_fast.data.tokenizer import TOKENIZER, Tokenizer
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
from sbp_fast.model.vocabulary import MEAN, fit_vocabulary
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


def check_import(directory: Path, context: int, setting: str = "--context") -> ModelConfig:
    """Return the shape of the model in a Hugging Face directory.

    Args:
        directory: of the model.
        context: longest document in tokens (0: what its positions allow).
        setting: that says the context, for the message.

    Raises:
        UserError: there is no such directory, it has another architecture, or fewer positions than `context` takes.
    """
    shape, _ = read_hugging_face_config(directory)
    if context > shape.context:
        problem = f"has {read_positions(directory)} positions, too few for a seed and a partner of {context} tokens each"
        raise UserError(directory, problem, f"set {setting} to {shape.context} or less")
    return shape


def check_start(directory: Path, config: RunConfig) -> None:
    """Refuse a model that no synthesizer of a run could start from, before any work is done.

    Raises:
        UserError: see `check_import`; or the corpus is to have another tokenizer than the model.
    """
    check_import(directory, config.model.context, "model.context")
    tokenizer_json, chosen = directory / TOKENIZER, config.corpus.tokenizer
    own = Tokenizer(tokenizer_json).vocabulary()
    if chosen == "train" or Tokenizer(chosen).vocabulary() != own:
        raise UserError(f"corpus.tokenizer = {chosen}", f"is not that of {directory}", f"set it to {tokenizer_json}")


def import_hugging_face(
    hf_directory: Path, out: Path, *, context: int = 0, console: Console = QUIET, force: bool = False
) -> Manifest:
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
    shape = check_import(directory, context)  # refuses before anything is written
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
        stage.record(positions=read_positions(directory))
        save_model(model, stage.directory)

    files = [directory / CONFIG, *weight_files(directory), *[tokenizer_json] * (tokenizer is not None)]
    inputs: dict[str, Path | str] = {file.name: hash_file(file) for file in files}
    return run_stage(
        IMPORT,
        out,
        config={"new_rows": MEAN, "context": context or shape.context},
        inputs=inputs,
        body=body,
        console=console,
        force=force,
    )
