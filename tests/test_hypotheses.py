"""hypotheses.py: ranks, risks and scores against plain loops, and the script from end to end."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hypotheses
from checkpoints import Run
from hipart import Config
from hypotheses import (
    best_temperature,
    choose_temperature,
    energy_score,
    measure_hypotheses,
    rank_correlation,
    ranks,
    risk,
    risk_at,
    summarize_hypotheses,
)
from sources.dataset import Split
from train import Training, load_hipart, load_lifter

few_values = st.lists(st.integers(-3, 3), min_size=1, max_size=12)  # many of them are equal


@given(few_values)
def test_ranks_equal_counting(values):
    """How many are smaller, and half of the others that are equal."""
    expected = [sum(w < v for w in values) + (values.count(v) - 1) / 2 for v in values]
    np.testing.assert_array_equal(ranks(np.array(values)), expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_equals_spearmans_double_loop(pairs):
    """Pearson's correlation of the ranks, from all pairs of samples."""
    a, b = (np.array(values) for values in zip(*pairs, strict=True))
    r, s = ranks(a), ranks(b)
    products = squares_r = squares_s = 0.0
    for i in range(len(a)):
        for k in range(len(a)):
            products += (r[i] - r[k]) * (s[i] - s[k])
            squares_r += (r[i] - r[k]) ** 2
            squares_s += (s[i] - s[k]) ** 2
    got = rank_correlation(a, b)
    if squares_r * squares_s == 0:
        assert got is None
    else:
        assert got == pytest.approx(products / math.sqrt(squares_r * squares_s), abs=1e-12)
        assert rank_correlation(a, np.exp(b)) == pytest.approx(got)  # only the order counts
        assert rank_correlation(a, -b) == pytest.approx(-got)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 4)), min_size=1, max_size=7),
       st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=50)
def test_risk_is_what_a_random_order_of_equals_would_give(pairs, seed):
    """On average over many shuffles that keep the order of doubt."""
    error, doubt = (np.array(values, float) for values in zip(*pairs, strict=True))
    rng, n = np.random.default_rng(seed), len(pairs)
    curves = []
    for _ in range(400):
        order = sorted(rng.permutation(n), key=lambda i: doubt[i])
        curves.append(np.cumsum(error[order]) / np.arange(1, n + 1))
    got, spread = risk(error, doubt), np.std(curves, 0)
    assert (np.abs(got - np.mean(curves, 0)) <= 0.3 * spread + 1e-9).all()
    assert got[-1] == pytest.approx(error.mean())
    assert (risk(error, error) <= got + 1e-9).all()  # nobody beats the oracle


def test_risk_at_a_coverage():
    error, doubt = np.array([9.0, 1, 5, 3]), np.array([3, 0, 1, 2])
    assert [risk_at(error, doubt, c) for c in (0.01, 0.5, 0.75, 1)] == [1, 3, 3, 4.5]


def test_energy_score_equals_loops():
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(3, 4, 5, 2)), rng.normal(size=(3, 5, 2))

    def distance(a, b):
        return math.sqrt(np.mean([math.dist(p, q) ** 2 for p, q in zip(a, b, strict=True)]))

    expected = []
    for hypotheses_, y in zip(x, true, strict=True):
        off = np.mean([distance(h, y) for h in hypotheses_])
        apart = [distance(g, h) for i, g in enumerate(hypotheses_)
                 for k, h in enumerate(hypotheses_) if i != k]  # fmt: skip
        expected.append(off - np.mean(apart) / 2)
    got = energy_score(torch.from_numpy(x), torch.from_numpy(true))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    one = energy_score(torch.from_numpy(x[:, :1]), torch.from_numpy(true))
    np.testing.assert_allclose(
        one.numpy(), [distance(h[0], y) for h, y in zip(x, true, strict=True)], atol=1e-12)


@pytest.mark.parametrize("n", [2, 8])
def test_energy_score_prefers_the_true_breadth(n):
    """Hypotheses that are drawn as the truth is score best, whatever their number."""
    g = torch.Generator().manual_seed(0)
    scale = (0.3, 1.0, 3.0)
    true = torch.randn(4000, 1, 2, generator=g)
    x = torch.randn(4000, n, 1, 2, generator=g)
    scores = [float(energy_score(s * x, true).mean()) for s in scale]
    assert scores[1] < min(scores[0], scores[2]) - 0.02


# --------------------------------------------------------------------------------------------------
# On a run


@pytest.fixture(scope="module")
def own_run(tiny_run, tmp_path_factory):
    """runs/tiny in a folder of its own, to write to."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_run / "runs", folder / "runs", ignore=shutil.ignore_patterns("*.npy"))
    return Run(folder / "runs" / "tiny", Config(), Training(), torch.device("cpu"))


@pytest.fixture
def run_script(own_run, monkeypatch, capsys):
    """Run hypotheses.py with these options: exit status, stdout, stderr."""
    monkeypatch.chdir(own_run.path.parent.parent)

    def run(*options, name="tiny"):
        argv = ["hypotheses.py", "--name", name, "--device", "cpu", *options]
        monkeypatch.setattr("sys.argv", argv)
        try:
            hypotheses.main()
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


def test_measures_equal_a_plain_reading(own_run, tiny_data):
    split = Split(f"{tiny_data}/tiny", "test", own_run.device).spread(5)
    hipart, lifter = load_hipart(own_run), load_lifter(own_run, "generated")
    rows = measure_hypotheses(split, hipart, lifter, 0.7, 20, torch.Generator().manual_seed(3))
    b = split.read(slice(0, 5))
    x_d, x_f, log_prob = hipart.sample(
        b["x_s"], b["conf"], 20, 0.7, generator=torch.Generator().manual_seed(3))
    one_d, one_f = hipart.densify(b["x_s"], b["conf"])
    px = split.w / 2
    for i in range(5):
        x, true = x_f[i].double().numpy(), b["x_f"][i].double().numpy()
        centre, y = x.mean(0), b["y"][i].double().numpy()
        expected = dict(
            spread=np.linalg.norm(x - centre, axis=-1).mean() * px,
            error_mean=np.linalg.norm(centre - true, axis=-1).mean() * px,
            error_2d=np.linalg.norm(one_f[i].numpy() - true, axis=-1).mean() * px,
            unlikely=-float(log_prob[i].mean()), unsure=1 - float(b["conf"][i].mean()),
            occluded=float((b["conf"][i] < 0.5).any()))
        lifts = np.stack([lifter(torch.cat([b["x_s"][i], x_d[i, k], x_f[i, k]])[None],
                                 b["conf"][i : i + 1])[0].double().numpy() for k in range(20)])
        off = np.linalg.norm(lifts - y, axis=-1).mean(-1)
        expected |= dict(best_3d_1=off[0], best_3d_5=off[:5].min(), best_3d_20=off.min(),
                         mean_3d=np.linalg.norm(lifts.mean(0) - y, axis=-1).mean())
        single = lifter(torch.cat([b["x_s"][i], one_d[i], one_f[i]])[None], b["conf"][i : i + 1])
        expected["error_3d"] = np.linalg.norm(single[0].double().numpy() - y, axis=-1).mean()
        for name, value in expected.items():
            assert rows[name][i] == pytest.approx(value, rel=1e-4), name


def test_summaries_part_occluded_from_clear():
    rng = np.random.default_rng(0)
    names = ("error_2d", "spread", "unlikely", "unsure")
    rows = {name: rng.random(40) for name in names} | dict(occluded=(np.arange(40) < 10) * 1.0)
    s = summarize_hypotheses(rows)
    assert [s[part]["n"] for part in ("all", "occluded", "clear")] == [40, 10, 30]
    assert s["occluded"]["means"]["spread"] == pytest.approx(rows["spread"][:10].mean())
    clear = [rows[name][10:] for name in ("spread", "error_2d")]
    assert s["clear"]["correlation"]["spread"] == rank_correlation(*clear)
    assert s["all"]["correlation"]["error_2d"] == pytest.approx(1)
    assert s["all"]["risk"]["spread"][-1] == pytest.approx(rows["error_2d"].mean())
    none = summarize_hypotheses({k: v[:10] for k, v in rows.items()})["clear"]
    assert none == dict(n=0, means=dict.fromkeys(rows))


def test_the_lowest_score_chooses_the_temperature():
    best, tried = choose_temperature(lambda t: {
        **{name: np.ones(3) for name in ("error_2d", "spread", "unlikely", "unsure", "occluded")},
        "score": np.full(3, abs(t - 0.3))})  # fmt: skip
    assert best == 0.3 and list(tried) == list(hypotheses.TEMPERATURES)


def test_the_script_from_end_to_end(own_run, run_script):
    assert best_temperature(own_run) == 1.0
    status, out, err = run_script("--samples", "12")
    assert status == 0, err
    text = (own_run.path / "hypotheses.md").read_text()
    numbers = json.loads((own_run.path / "hypotheses.json").read_text())
    assert text in out and (own_run.path / "figures" / "risk_coverage.png").stat().st_size > 10_000
    assert best_temperature(own_run) == numbers["temperature"] in hypotheses.TEMPERATURES
    scores = {float(t): s["all"]["means"]["score"] for t, s in numbers["tried"].items()}
    assert min(scores, key=scores.get) == numbers["temperature"]
    assert set(numbers["splits"]) == {"test", "unseen"}
    for of in numbers["splits"].values():
        assert f"at temperature {numbers['temperature']:g}" in of and "at temperature 1" in of
        for s in of.values():
            means = s["all"]["means"]
            assert s["all"]["n"] == 12 == s["occluded"]["n"] + s["clear"]["n"]
            assert means["best_3d_20"] <= means["best_3d_5"] <= means["best_3d_1"]
            assert f"{means['error_3d']:.1f}" in text and f"{means['best_3d_20']:.1f}" in text
    again = json.dumps(numbers)
    assert run_script("--samples", "12")[0] == 0  # the same numbers again
    assert json.loads((own_run.path / "hypotheses.json").read_text()) == json.loads(again)


def test_refusals_are_one_sentence(own_run, run_script):
    partial = own_run.path.with_name("partial")
    shutil.copytree(own_run.path, partial, ignore=shutil.ignore_patterns("stage3*", "hyp*"))
    for options, name, said in ((("--samples", "0"), "tiny", "--samples must be at least 1"),
                                ((), "partial", "has 2 of the three stages"),
                                ((), "none", "holds no stage")):  # fmt: skip
        status, out, err = run_script(*options, name=name)
        assert status == 2 and said in err and len(err.strip().split("\n")) == 1
    shutil.rmtree(partial)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"temperature": -1}',
                                     '{"temperature": NaN}', '{"temperature": "x"}',
                                     '{"temperature": 1' + "0" * 400 + "}"])
def test_a_damaged_temperature_is_said(own_run, tmp_path, content, capsys):
    run = Run(tmp_path, own_run.config, own_run.training, own_run.device)
    (tmp_path / "hypotheses.json").write_text(content)
    with pytest.raises(SystemExit) as e:
        best_temperature(run)
    assert e.value.code == 2 and "python hypotheses.py --name" in capsys.readouterr().err
