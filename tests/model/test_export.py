"""What `export` writes beside the weights: positions, dtype, tokenizer and model card; and what it refuses."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_models import CONFIG, QUIET, change_weights, make_saved

from sbp_fast.data.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.errors import UserError
from sbp_fast.model.saved import load_model, save_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.stages.huggingface import export_hugging_face, import_hugging_face


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the cat sees the dog and the dog sees the tree"] * 3, 270).save(path)
    return path


@pytest.mark.parametrize(("arm", "positions"), [("sbp", 64), ("synthesizer", 128)])
def test_an_export_has_the_positions_that_its_model_was_trained_on_and_keeps_them_through_import(
    arm: str, positions: int, tokenizer_json: Path, tmp_path: Path
) -> None:
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size, arm=arm)
    export_hugging_face(saved, tokenizer_json, tmp_path / "exported")
    import_hugging_face(tmp_path / "exported", tmp_path / "imported")
    export_hugging_face(tmp_path / "imported", tokenizer_json, tmp_path / "again")
    assert load_model(tmp_path / "imported").config.context == 64
    for directory in (tmp_path / "exported", tmp_path / "again"):
        assert read_json(directory / "config.json")["max_position_embeddings"] == positions
        assert read_json(directory / "tokenizer_config.json")["model_max_length"] == positions


def test_a_foreign_model_has_half_of_its_positions_as_context_and_all_of_them_in_its_export(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    vocabulary_size = Tokenizer(tokenizer_json).vocabulary_size
    export_hugging_face(make_saved(tmp_path / "saved", vocabulary_size), tokenizer_json, tmp_path / "foreign")
    config = read_json(tmp_path / "foreign" / "config.json")
    del config["sbp_context"]
    write_json(tmp_path / "foreign" / "config.json", {**config, "max_position_embeddings": 4001})
    import_hugging_face(tmp_path / "foreign", tmp_path / "imported")
    export_hugging_face(tmp_path / "imported", tokenizer_json, tmp_path / "exported")
    assert load_model(tmp_path / "imported").config.context == 2000
    assert read_json(tmp_path / "exported" / "config.json")["max_position_embeddings"] == 4001


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_another_dtype_rounds_the_weights_and_transformers_loads_them_as_such(
    dtype: str, tokenizer_json: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    saved = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size)
    export_hugging_face(saved, tokenizer_json, tmp_path / "float32")
    export_hugging_face(saved, tokenizer_json, tmp_path / "exported", dtype=dtype)
    whole, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "exported"))
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], weight.to(getattr(torch, dtype))) for name, weight in whole.items())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == getattr(torch, dtype)


def test_export_in_a_dtype_that_does_not_hold_a_weight_or_does_not_exist_is_refused(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    import_hugging_face(_exported_with_a_large_weight(tokenizer_json, tmp_path), tmp_path / "large")
    for dtype, message in {
        "float16": r"--dtype float16: model\.norm\.weight has values that are not finite in it; choose float32",
        "float8": "--dtype float8: is unknown; choose from float32, bfloat16, float16",
    }.items():
        with pytest.raises(UserError, match=message):
            export_hugging_face(tmp_path / "large", tokenizer_json, tmp_path / "refused", dtype=dtype)
        assert not (tmp_path / "refused").exists()


def _exported_with_a_large_weight(tokenizer_json: Path, folder: Path) -> Path:
    saved = make_saved(folder / "saved", Tokenizer(tokenizer_json).vocabulary_size)
    export_hugging_face(saved, tokenizer_json, folder / "exported")
    change_weights(folder / "exported", model__norm__weight=torch.full((24,), 1e5))
    return folder / "exported"


def test_export_over_one_made_otherwise_is_refused_and_force_replaces_it(tokenizer_json: Path, tmp_path: Path) -> None:
    saved, out = make_saved(tmp_path / "saved", Tokenizer(tokenizer_json).vocabulary_size), tmp_path / "exported"
    export_hugging_face(saved, tokenizer_json, out)
    (out / "config.json").touch()
    written = (out / "config.json").stat().st_mtime_ns
    export_hugging_face(saved, tokenizer_json, out)
    assert (out / "config.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"was made from other settings or inputs: dtype: .*--force to replace it"):
        export_hugging_face(saved, tokenizer_json, out, dtype="bfloat16", card="# A model")
    assert not (out / "README.md").exists()
    export_hugging_face(saved, tokenizer_json, out, dtype="bfloat16", card="# A model", force=True)
    assert read_json(out / "config.json")["dtype"] == "bfloat16" and (out / "README.md").read_text() == "# A model"


HARD_TEXTS = (
    *("", "<|end|>", "a<|begin|> b", "<|partner|>x", " <|end|> ", "<|end|><|end|>", "x\r\n  y\t<|end|>\n", "<|en", "é<|end|>é"),
    *("a b  c's 123", "\u200b<|begin|>", "the cat , sees .", "<pad> </s> [CLS]", "\N{GRINNING FACE} e\u0301 \ufeff", "<|END|>"),
)


def test_the_exported_tokenizer_gives_the_same_ids_as_ours_to_texts_that_spell_special_tokens(
    tokenizer_json: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(tokenizer_json)
    export_hugging_face(make_saved(tmp_path / "saved", tokenizer.vocabulary_size), tokenizer_json, tmp_path / "exported")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    exported.save_pretrained(tmp_path / "saved-again")
    for theirs in (exported, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved-again")):
        for text in HARD_TEXTS:
            ids = tokenizer.encode(text)
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert theirs(text).input_ids == [tokenizer.begin, *ids]
            assert theirs.decode([tokenizer.begin, *ids, tokenizer.end], skip_special_tokens=True) == text
        assert set(theirs.all_special_ids) == {tokenizer.begin, tokenizer.end, tokenizer.partner}
        assert theirs.partner_token_id == tokenizer.partner


def test_a_prompt_made_as_the_documentation_says_is_what_a_synthesizer_reads(tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs/how-to/share.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    ours = Tokenizer(tokenizer_json)
    saved = make_saved(tmp_path / "saved", ours.vocabulary_size, arm="synthesizer")
    export_hugging_face(saved, tokenizer_json, tmp_path / "demo-synthesizer")
    variables = {"transformers": transformers}
    exec(code.replace('"demo-synthesizer"', repr(str(tmp_path / "demo-synthesizer"))), variables)
    ids = ours.encode("The text of a document.")
    assert variables["prompt"] == [ours.begin, *ids, ours.end, ours.partner]


def test_export_with_a_tokenizer_that_is_not_the_models_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    small = make_saved(tmp_path / "small", Tokenizer(tokenizer_json).vocabulary_size - 1)
    with pytest.raises(UserError, match=r"tokenizer\.json: has 270 tokens, the model 269; give the corpus"):
        export_hugging_face(small, tokenizer_json, tmp_path / "exported")
    corpora = []
    for name in ("own", "other"):

        def body(work: StageContext, name: str = name) -> None:
            shutil.copy(tokenizer_json, work.directory / "tokenizer.json")
            work.record(name=name)

        run_stage("prepare", tmp_path / name, config={"name": name}, inputs={}, body=body, console=QUIET)
        corpora.append(tmp_path / name)
    model = Transformer(CONFIG, 270)
    model.initialize(0)
    write = lambda work: save_model(model, work.directory)  # noqa: E731
    run_stage("train", tmp_path / "model", config={}, inputs={"corpus": corpora[0]}, body=write, console=QUIET)
    export_hugging_face(tmp_path / "model", corpora[0] / "tokenizer.json", tmp_path / "exported")
    with pytest.raises(UserError, match=r"model: was not trained on .*other; give the corpus that it was trained on"):
        export_hugging_face(tmp_path / "model", corpora[1] / "tokenizer.json", tmp_path / "refused")
