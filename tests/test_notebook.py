"""The notebook runs from its first cell to its last, and shows what its text speaks of."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_tour(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads wait for each other where the machine is busy
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    data = [out.data for out in shown if out.output_type in ("execute_result", "display_data")]
    printed = "".join(out.text for out in shown if out.output_type == "stream" and out.name == "stdout")
    assert data[0]["text/plain"] == "'bottom left'" and data[-1]["text/plain"] == "False"
    assert sum("image/png" in x for x in data) == 3, "two pictures and a plot"
    assert sum("<table>" in x.get("text/html", "") for x in data) == 1
    assert "pruned equals masked" in printed and "prompts are too few" in printed and "16 tokens, calibrated" in printed


def test_no_outputs_are_stored():
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
