"""The names of the package, and the API behind them."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_synthesis import make_inputs, settings

import sbp_fast
from sbp_fast import api


def test_package_has_the_names_of_the_api_and_no_module_hides_one() -> None:
    modules = {module.name for module in pkgutil.iter_modules(sbp_fast.__path__)}
    assert set(api.__all__) <= set(dir(sbp_fast)) and not modules & set(api.__all__)
    assert all(getattr(sbp_fast, name) is getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        sbp_fast.no_such_name  # noqa: B018


def test_reference_page_names_the_whole_api() -> None:
    page = (Path(__file__).parents[1] / "docs/reference/python.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page or f".{name}" in page for name in api.__all__)


def test_importing_the_package_or_its_errors_imports_no_torch() -> None:
    program = "import sys; import sbp_fast; from sbp_fast import errors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_documents_are_generated_after_a_text_and_after_none_as_the_seed_says(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    corpus, model = sbp_fast.PreparedCorpus(inputs["corpus"]), sbp_fast.load_model(inputs["model"])
    config = settings(tmp_path)
    texts = sbp_fast.generate_documents(model, corpus, "a text", count=3, config=config)
    assert len(texts) == 3 and texts == sbp_fast.generate_documents(model, corpus, "a text", count=3, config=config)
    other = config.model_copy(update={"seed": config.seed + 1})
    assert texts != sbp_fast.generate_documents(model, corpus, "a text", count=3, config=other)
    assert len(sbp_fast.generate_documents(model, corpus)) == 1
