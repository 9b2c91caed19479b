"""Every notebook, run end to end at the smoke profile as `k25lite reproduce` runs it; and the form all of them share."""

import json
from pathlib import Path

import nbformat
import pytest

from k25lite import results
from k25lite.reproduce import reproduce

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder of their own: nothing that was trained before is taken, but a notebook takes what an earlier one left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K25LITE_STAGES", str(tmp_path_factory.mktemp("stages")))
        yield


@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_the_smoke_profile_and_makes_no_claim(notebook, tmp_path):
    assert reproduce([notebook.stem], profile="smoke", seeds=2, out=tmp_path, root=ROOT)
    record = results.load(tmp_path / "results" / f"{notebook.stem}.json")
    assert record.claims
    assert all(claim.holds is None for claim in record.claims)
    assert record.checks
    assert [check.name for check in record.checks if not check.holds] == []
    (entry,) = json.loads((tmp_path / "scorecard.json").read_text())["notebooks"]
    assert (entry["notebook"], entry["failure"]) == (notebook.stem, None)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_has_the_form_every_notebook_has(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    assert cells[0].cell_type == "markdown"
    assert "Reproduces" in cells[0].source
    assert "find_spec" in cells[1].source, "the second cell installs k25lite on Colab, only if it is missing"
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert line.split("=")[0].strip().isupper(), line
        assert "#" in line, f"{line}: every parameter has a comment"
    assert {"PROFILE", "SEEDS", "OUT"} <= {line.split("=")[0].strip() for line in tagged[0].source.splitlines()}
    assert "record.save(OUT)" in cells[-1].source
    text = "".join(cell.source for cell in cells)
    assert "explore(" in text
    assert text.count("<details>") >= 2, "exercises with folded solutions"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_come_from_one_run_in_order_and_match_the_committed_results(notebook):
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    record = results.load(ROOT / "results" / f"{notebook.stem}.json")
    assert record.notebook == notebook.stem
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert f"profile {record.profile}, {len(record.seeds)} seeds" in printed
    for claim in record.claims:
        assert claim.name in printed, f"{claim.name} is in the results but not in the notebook"
