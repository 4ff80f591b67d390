"""A season through the service: what was planted is found in its week, by its name, for the right people, once; and a next version puts it right."""
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT, adult_data


@pytest.fixture(scope="module")
def season():
    "Everything that the lesson has at its end."
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    path, before, began = ROOT / "nbs/tutorials/season.ipynb", os.getcwd(), time.monotonic()
    shell = CaptureShell(path)
    try:
        for cell in NBProcessor(path, rm_directives=False, process=True).nb.cells:
            if cell.cell_type != "code": continue
            shell.cell(cell, timeout=1200)
            if shell.exc: raise shell.exc
        told = dict(shell.user_ns)
    finally:
        shell.close()
        os.chdir(before)
    print(f"\n{told['WEEKS']} weeks of {told['ASKED']} requests in {time.monotonic() - began:.0f} s (load {os.getloadavg()[0]:.1f}); told: {told['told']}; trained: {[(w, r.sentence) for w, r in told['trained']]}; decided: {told['decided']}; right, by week and version: {told['truly']}")
    return told


@pytest.mark.chaos
@adult_data
def test_each_plant_is_found_in_its_window_by_its_name_and_told_once(season):
    begun = [(week, measure, whom) for week, who, measure, whom, begins in season["told"] if begins and who == "income/1"]
    stated = {"moved_share": 1, "equal_opportunity_difference[sex]": 2, "accuracy": 2} # weeks within which it is to be found
    for measure, planted in season["PLANTED"].items():
        weeks = [week for week, m, _ in begun if m == measure]
        assert len(weeks) == 1 and planted <= weeks[0] < planted + stated[measure], f"{measure}: planted in week {planted}, told in {weeks}"
    assert dict((m, whom) for _, m, whom in begun)["equal_opportunity_difference[sex]"] == "sex=Female"
    assert Counter(m for _, m, _ in begun).keys() == season["PLANTED"].keys(), "nothing else was told"


@pytest.mark.chaos
@adult_data
def test_the_next_version_goes_the_same_way_and_quality_returns(season):
    (week, result), truly = season["trained"][0], season["truly"]
    assert result.state == "passed" and result.alias == "canary" and result.gates and all(result.gates.values()) and "accuracy is broken" in result.decision.why[0]
    assert [action for _, action, _ in season["decided"]][-1] == "promote" and season["standing"].over == "promoted"
    before, fallen, after = truly[3]["1"], truly[week]["1"], truly[season["WEEKS"]]["2"]
    assert fallen < before - 0.1 and after > fallen + 0.08 and after > 0.78 and set(truly[season["WEEKS"]]) == {"2"}, (before, fallen, after)
    assert not [t for t in season["told"] if t[1] == "income/2" and t[4]], "the next version breaks no promise"


@pytest.mark.chaos
@adult_data
def test_what_it_learned_from_can_be_read_again(season):
    from mlray.registry import bundle_of, version
    from mlray.rows import read_rows
    bundle = bundle_of(season["registry"], version(season["registry"], "income/2"))
    assert read_rows(bundle.spec, season["settings"]).fingerprints["train"] == bundle.provenance["train_rows"] and Path(season["home"], bundle.spec.data.train.file).is_file()
