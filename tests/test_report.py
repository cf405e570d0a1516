import itertools
import math

import numpy as np
import pandas as pd
import pytest

from experiments.benchmark import comparison, figures, report, summary, tables

QEXP, FIRST, SECOND = [0.80, 0.84, 0.85], [0.79, 0.80, 0.86], [0.70, 0.95, 0.70]


def runs(method, metrics, *, epsilon=1.0, n=250, task="toy", model="linear", seeds=None, losses=None):
    """The CSV's rows of one method in one setting."""
    losses = np.full(len(metrics), 0.5) if losses is None else losses
    fixed = dict.fromkeys(comparison.COLUMNS, 1) | {
        "table": "main",
        "delta": 1e-5,
        "metric_name": "accuracy",
        "seconds": 0.1,
    }
    setting = {"task": task, "model": model, "n": n, "epsilon": epsilon, "method": method}
    seeds = range(len(metrics)) if seeds is None else seeds
    return [
        fixed | setting | {"seed": seed, "metric": metric, "loss": loss}
        for seed, metric, loss in zip(seeds, metrics, losses, strict=True)
    ]


def table(*groups):
    return pd.DataFrame([row for group in groups for row in group])


def grid():
    """Two models, n and epsilons, with losses, a setting without ours, one without baselines, one with one seed."""
    settings = [(model, n, epsilon) for model in ("linear", "mlp") for n in (250, 1000) for epsilon in (0.5, 8.0)]
    groups = []
    for i, (model, n, epsilon) in enumerate(settings):
        at = {"model": model, "n": n, "epsilon": epsilon}
        groups += [runs("qexp", np.add(QEXP, 0.01 * (i - 3))[: 1 if i == 7 else 3], **at)] if i != 2 else []
        groups += [runs("dp_gd", FIRST, **at), runs("adassp", SECOND, **at)] if i != 5 else []
    for model, n in {setting[:2] for setting in settings}:
        at = {"model": model, "n": n, "epsilon": math.inf}
        groups += [runs("zero_shot", [0.7] * 3, **at), runs("non_private", [0.9] * 3, **at)]
    return table(*groups)


def page_of(df):
    return tables.page("main", df, comparison.compare(df))


def render(df, folder):
    df.to_csv(folder / "arena.csv", index=False)
    report.main(["--results", str(folder)])
    return (folder / "main.md").read_text()


def test_the_paired_difference_and_its_error_are_those_computed_by_hand():
    # Our seed 3 has no partner: the differences are 0.01, 0.04, -0.01.
    df = table(runs("qexp", [*QEXP, 0.1]), runs("dp_gd", FIRST))
    row = comparison.compare(df).iloc[0]
    assert row["seeds"] == 3
    assert row["difference"] == pytest.approx(0.04 / 3)
    assert row["difference_se"] == pytest.approx(math.sqrt((0.01**2 + 0.08**2 + 0.07**2) / 9 / 2 / 3))
    assert row["ours"] == pytest.approx((0.80 + 0.84 + 0.85 + 0.1) / 4)
    assert row["verdict"] == "within 2 SE"


def test_seeds_are_paired_by_number_and_not_by_order():
    df = table(runs("qexp", QEXP[::-1], seeds=[2, 1, 0]), runs("dp_gd", np.subtract(QEXP, 0.01)))
    row = comparison.compare(df).iloc[0]
    assert row["difference_se"] == pytest.approx(0, abs=1e-12) and row["verdict"] == "ahead"


def test_the_best_baseline_is_the_one_with_the_highest_mean():
    row = comparison.compare(table(runs("qexp", QEXP), runs("dp_gd", FIRST), runs("adassp", SECOND))).iloc[0]
    assert row["baseline"] == "dp_gd" and row["best"] == pytest.approx(np.mean(FIRST))


def test_a_single_seed_has_no_standard_error_and_decides_nothing():
    df = table(runs("qexp", [0.9]), runs("dp_gd", [0.8]), runs("zero_shot", [0.7], epsilon=math.inf))
    row = comparison.compare(df).iloc[0]
    assert math.isnan(row["difference_se"]) and row["verdict"] == "undecided"
    assert "+0.1000 ± n/a" in page_of(df)


def test_a_loss_is_marked():
    df = table(runs("qexp", np.subtract(FIRST, 0.02)), runs("dp_gd", FIRST))
    assert "-0.0200 ± 0.0000 | **behind**" in page_of(df)


@pytest.mark.parametrize(("drop", "below"), [(0.0029, False), (0.0031, True), (-0.1, False)])
def test_ours_is_below_zero_shot_when_it_loses_more_than_noise_and_the_smallest_drop(drop, below):
    df = table(runs("qexp", [0.7 - drop] * 2), runs("zero_shot", [0.7] * 2, epsilon=math.inf))
    assert comparison.compare(df).iloc[0]["below_zero_shot"] == below


def test_a_drop_below_zero_shot_within_its_noise_is_not_flagged():
    df = table(runs("qexp", [0.5, 0.9, 0.65]), runs("zero_shot", [0.7] * 3, epsilon=math.inf))
    assert not comparison.compare(df).iloc[0]["below_zero_shot"]


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [([0.3, 0.31, 0.32], "lower"), ([0.5, 0.52, 0.54], "higher"), ([0.3, 0.43, 0.5], "within 2 SE")],
)
def test_losses_are_compared_with_those_of_the_baseline_of_best_metric(losses, verdict):
    df = table(
        runs("qexp", QEXP, losses=losses),
        runs("dp_gd", FIRST, losses=[0.4, 0.42, 0.44]),
        runs("adassp", SECOND, losses=[0.1, 0.11, 0.12] if verdict == "lower" else [0.9] * 3),
        runs("zero_shot", [0.7] * 3, epsilon=math.inf, losses=[0.6] * 3),
    )
    row = comparison.compare(df).iloc[0]
    assert row["baseline"] == "dp_gd" and row["loss_verdict"] == verdict
    assert row["ours_loss"] == pytest.approx(np.mean(losses)) and row["best_loss"] == pytest.approx(0.42)
    (line,) = [line for line in page_of(df).splitlines() if "dp_gd 0.8" in line]
    assert [text.strip() for text in line.split("|")][-3:-1] == [f"0.6000 / {np.mean(losses):.4f} / 0.4200", verdict]


def test_runs_without_a_loss_are_compared_by_their_metric_alone(tmp_path):
    table(runs("qexp", QEXP, losses=[math.nan] * 3), runs("dp_gd", FIRST)).to_csv(tmp_path / "arena.csv", index=False)
    row = comparison.compare(comparison.read(tmp_path / "arena.csv")).iloc[0]
    assert row["verdict"] == "within 2 SE" and row["loss_verdict"] == ""


def test_missing_settings_are_listed():
    page = page_of(grid())
    missing = page.partition("## Missing")[2]
    assert "- toy, linear, n = 1000, epsilon = 0.5: no qexp\n" in missing
    assert "- toy, mlp, n = 250, epsilon = 8: no baselines\n" in missing
    assert "6 of 8 settings compared, 2 missing" in page


def test_a_setting_that_lacks_one_baseline_says_so():
    df = table(runs("qexp", QEXP), runs("dp_gd", FIRST), runs("adassp", SECOND, epsilon=8.0))
    missing = page_of(df).partition("## Missing")[2]
    assert "epsilon = 1: without adassp" in missing and "epsilon = 8: no qexp" in missing


def test_the_summary_counts_every_verdict_once():
    df = grid()
    counts = comparison.compare(df)["verdict"].value_counts()
    line = next(line for line in page_of(df).splitlines() if line.startswith("| all"))
    found = [int(text) for text in line.split("|")[2:7]]
    assert found == [6, *(counts.get(verdict, 0) for verdict in comparison.VERDICTS)] and sum(found[1:]) == 6


def test_main_writes_the_page_and_three_pictures(tmp_path):
    render(grid(), tmp_path)
    written = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 0}
    assert written == {"arena.csv", "README.md", "main.md", "epsilon.png", "time.png", "gain.png"}


def test_each_table_has_a_page_and_the_summary_is_of_the_first(tmp_path):
    render(pd.concat([grid(), grid().assign(table="small", task="leaves")]), tmp_path)
    assert "### leaves, linear" in (tmp_path / "small.md").read_text()
    assert "leaves" not in (tmp_path / "main.md").read_text() + (tmp_path / "README.md").read_text()


def of_all_kinds():
    """Ours beside a baseline of each kind, two of them rehearsed, of which the better is ahead of ours."""
    best = np.add(QEXP, 0.01)
    return table(
        runs("qexp", QEXP),
        runs("dp_gd", np.subtract(QEXP, 0.02)),
        runs("one_draw", np.subtract(QEXP, 0.03)),
        runs("rehearsed_dp_sgd_all", np.subtract(QEXP, 0.04)),
        runs("rehearsed_dp_adam_all", best),
        runs("recipe_de", np.subtract(QEXP, 0.05)),
        runs("public_kfac", np.subtract(QEXP, 0.06)),
        runs("zero_shot", [0.7] * 3, epsilon=math.inf),
    )


@pytest.mark.parametrize(
    ("against", "verdicts", "difference"),
    [
        ("best rehearsed or recipe", [1, 0, 0, 1], "-0.0100"),
        ("best rehearsed", [1, 0, 0, 1], "-0.0100"),
        ("rehearsed DP-SGD", [1, 1, 0, 0], "+0.0400"),
        ("best recipe", [1, 1, 0, 0], "+0.0500"),
        ("best with public records, tuned on test", [1, 1, 0, 0], "+0.0600"),
        ("best tuned on test", [1, 1, 0, 0], "+0.0200"),
        ("one draw, the paper's mechanism", [1, 1, 0, 0], "+0.0300"),
    ],
)
def test_the_summary_compares_with_each_kind_apart(against, verdicts, difference):
    lines = summary.page(of_all_kinds()).splitlines()
    (line,) = [line for line in lines if line.startswith("|") and line.split("|")[1].strip() == against]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert [int(cell) for cell in cells[:4]] == verdicts and cells[4] == difference


def test_the_summary_marks_where_ours_is_behind_a_baseline_that_users_have():
    page = summary.page(of_all_kinds())
    assert "| *.8300 ± .0306 (0.500)* | .8400 ± .0306 (0.500) " in page
    better = of_all_kinds().query("method != 'rehearsed_dp_adam_all'")
    assert "| **.8300 ± .0306 (0.500)** | .7900 ± .0306 (0.500) " in summary.page(better)


def test_a_recipe_alone_is_no_comparison():
    page = summary.page(table(runs("qexp", QEXP), runs("recipe_de", FIRST)))
    assert any(
        line.startswith("| best rehearsed or recipe ") and line.split("|")[2].strip() == "0"
        for line in page.splitlines()
    )


def test_costs_show_what_a_search_took():
    df = of_all_kinds()
    df.loc[df["method"] == "qexp", ["private_gradients", "search_seconds"]] = [3250, math.nan]
    (line,) = [line for line in summary.page(df).splitlines() if line.startswith("| toy, linear")]
    assert "| 13 passes, 0.1 s |" in line and "| 0.004 passes, 0.1 s + 1 s |" in line


def test_a_model_of_which_only_zero_shot_has_run_is_reported_as_missing(tmp_path):
    df = table(runs("qexp", QEXP), runs("dp_gd", FIRST), runs("zero_shot", [0.7], epsilon=math.inf, model="cnn"))
    assert "- toy, cnn, n = 250, epsilon = 1: no qexp, no baselines" in render(df, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("task,model\ntoy,linear\n", r"lacks the columns \['table', 'pretraining', 'n'"),
        (",".join(comparison.COLUMNS) + "\n", "header without rows"),
        (table(runs("qexp", QEXP)).to_csv(index=False) + "toy,linear,250\n", "half-written.* in line 5"),
        (table(runs("qexp", QEXP), runs("qexp", QEXP)).to_csv(index=False), "already in line 5"),
        (table(runs("zero_shot", QEXP, epsilon=math.inf)).to_csv(index=False), "no rows of a private method"),
    ],
)
def test_malformed_files_are_refused(tmp_path, content, message):
    path = tmp_path / "arena.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        comparison.read(path)


def overlaps(label, seconds):
    """Whether labels of times touch each other, and how many there are."""
    fig, ax = figures.plt.subplots(figsize=(3.4, 2.8), dpi=100)
    ax.scatter(seconds, np.zeros(len(seconds)))
    label(ax)
    fig.canvas.draw()
    texts = [t for t in (*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)) if t.get_text() and t.get_visible()]
    low, high = ax.get_xlim()
    boxes = sorted((t.get_window_extent() for t in texts if low <= t.get_position()[0] <= high), key=lambda b: b.x0)
    figures.plt.close(fig)
    return any(a.x1 > b.x0 for a, b in itertools.pairwise(boxes)), len(boxes)


@pytest.mark.parametrize("seconds", [(0.6, 0.9), (0.6, 7.0), (0.02, 2.0), (0.07, 0.8), (0.002, 300.0), (1e-4, 90.0)])
def test_labels_of_times_do_not_overlap(seconds):
    touching, count = overlaps(figures.label_times, seconds)
    assert not touching and count >= 1


def test_the_default_labels_of_a_short_log_axis_overlap():
    assert overlaps(lambda ax: ax.set_xscale("log"), (0.6, 7.0))[0]
