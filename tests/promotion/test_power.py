import re

import pytest

from rlhf_core.promotion.gate import judge_outcomes
from rlhf_core.promotion.power import needed_rows, pass_rate, power_rows, prompts_needed

TABLE_ROW = re.compile(r"^\| (\d+%) \| (\d+%) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \|$", re.M)


def documented(root):
    text = (root / "docs" / "promotion.md").read_text(encoding="utf-8")
    return [list(match.groups()) for match in TABLE_ROW.finditer(text)]


def test_simulation_decides_as_the_gate_does():
    from rlhf_core.promotion.power import _passes

    for wins, ties, losses in ((40, 0, 24), (38, 0, 26), (39, 2, 23), (30, 20, 14), (28, 20, 16)):
        rows = [[1.0]] * wins + [[0.5]] * ties + [[0.0]] * losses
        result = judge_outcomes(rows, margin=0.0, confidence=0.95, min_comparisons=1)
        assert _passes(wins, ties, losses, margin=0.0, confidence=0.95) == result.passes


def test_power_is_what_the_docs_say(root):
    rows = {(row[0], row[1]): row[2:] for row in documented(root)}
    for win_rate, ties, column, prompts in ((0.6, "0%", 0, 64), (0.6, "30%", 1, 128), (0.5, "0%", 1, 128)):
        said = float(rows[(f"{win_rate:.0%}", ties)][column].rstrip("%")) / 100
        found = pass_rate(win_rate, prompts, ties=float(ties.rstrip("%")) / 100, trials=1000, seed=7)
        assert found == pytest.approx(said, abs=0.05), (win_rate, ties, prompts)


def test_null_rates_of_the_docs_are_nominal(root):
    rows = [row for row in documented(root) if row[0] == "50%"]
    assert len(rows) == 2
    assert all(float(cell.rstrip("%")) <= 5.0 for row in rows for cell in row[2:])


@pytest.mark.slow
def test_tables_of_the_docs_are_the_simulations(root):
    assert documented(root) == list(power_rows())
    text = (root / "docs" / "promotion.md").read_text(encoding="utf-8")
    for row in needed_rows():
        assert f"| {' | '.join(row)} |" in text


def test_prompts_needed_by_hand():
    # (1.644854 * 0.5 + 0.841621 * sqrt(0.24))^2 / 0.1^2 = 152.4
    assert prompts_needed(0.6) == 153
    assert prompts_needed(0.6, ties=0.3) < prompts_needed(0.6) < prompts_needed(0.6, margin=0.03)


def test_prompts_needed_give_about_the_power_asked_for():
    for ties in (0.0, 0.3):
        count = prompts_needed(0.6, ties=ties)
        assert pass_rate(0.6, count, ties=ties, trials=1500) == pytest.approx(0.8, abs=0.06)


def test_impossible_questions_are_refused():
    with pytest.raises(ValueError, match="no number of prompts"):
        prompts_needed(0.52, margin=0.05)
    with pytest.raises(ValueError, match="impossible"):
        pass_rate(0.9, 10, ties=0.5)
