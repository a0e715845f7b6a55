"""The notebooks in examples/ run from the first cell to the last, and lie there with their outputs."""

import json
from collections.abc import Iterator

import pytest
from hub_client import hub_environment
from hub_server import Hub
from paths import EXAMPLES
from patience import PATIENCE
from tiny_training import save_tiny_model

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = {
    "first_steps.ipynb": "tokens a picture",
    "batch_and_state.ipynb": "1 hit",
    "finetune_lora_and_push.ipynb": "on the Hub: me/colours",
}
"""Name -> what it prints."""
SECONDS = PATIENCE
"""For a cell."""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub({"hf_me": "me"}) as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """A tiny model, few steps, and a Hub on this machine."""
    model = save_tiny_model(tmp_path / "model")
    own = {"VISUALRWKV_MODEL": str(model), "STEPS": "20", "HUB_REPO": "me/colours", "OMP_NUM_THREADS": "1"}
    folders = {name: str(tmp_path / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    return hub_environment(hub.url, tmp_path / "cache", "hf_me") | own | folders


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, environment, tmp_path):
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)
    assert NOTEBOOKS[name] in printed(notebook)


def test_every_notebook_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_lies_there_with_its_outputs(name):
    """A reader sees what each cell gives, and nothing of the machine that ran it."""
    text = (EXAMPLES / name).read_text("utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert NOTEBOOKS[name] in "".join("".join(output.get("text", [])) for output in outputs)
    assert "/tmp/" not in text and "127.0.0.1" not in text and "/home/" not in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small(name):
    assert (EXAMPLES / name).stat().st_size < 60_000
